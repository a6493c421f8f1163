"""A run on the disk: its state is saved, restored to resume, and read again once it has ended."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from flax import nnx

from common.config import ConfigError, base_config
from common.input.batch import Batch, Preprocess
from common.input.open import open_data
from common.training.checkpoints import Checkpoints
from common.training.metrics import deployed_state
from common.training.settle import saved_config, settle
from common.training.setup import initial_state, make_evaluation, make_setup
from common.training.step import TrainState

PyTree = Any


class Record(NamedTuple):
    """What a run remembers beside its state; saved as JSON with each checkpoint."""

    images: int  # to train on
    steps_per_epoch: int
    seconds: float = 0.0  # of all its processes, but for what kills lost
    full_precision_top1: float | None = None  # of the weights it started from
    full_precision_test_top1: float | None = None  # likewise, if images were held out
    first_cfs: float | None = None  # CFS / scale after the first epoch
    midway: str | None = None  # the epoch whose weights were kept for the histograms
    best: Mapping[str, Any] | None = None  # figures of the checkpoint, if it was kept as the best


class Run(NamedTuple):
    """A run that was read again, and the data to evaluate it on."""

    config: ml_collections.FrozenConfigDict
    graphdef: nnx.GraphDef
    state: TrainState  # with latent weights, and the scales to deploy them with
    accuracy: Callable[[PyTree, PyTree], dict[str, float]]  # of weights and batch statistics
    batches: Callable[[], Iterator[Batch]]
    preprocess: Preprocess


def save_state(checkpoints: Checkpoints, state: TrainState, record: Record) -> None:
    """Saves a state; the latent weights apart, so that another run can start from them alone."""
    checkpoints.save(int(state.step), _trees(state), record._asdict())


def restore_state(
    checkpoints: Checkpoints, like: TrainState, put_aside: bool = False
) -> tuple[TrainState, Record] | None:
    """Returns the newest readable state and its record; see `Checkpoints.restore_newest`."""
    found = checkpoints.restore_newest(_trees(like), put_aside)
    if found is None:
        return None
    _, trees, record = found
    return TrainState(**trees["weights"], **trees["rest"]), Record(**record)


def _trees(state: TrainState) -> dict[str, dict[str, PyTree]]:
    rest = state._asdict()
    return {"weights": {name: rest.pop(name) for name in ("params", "batch_stats")}, "rest": rest}


def restore(
    workdir: Path,
    changes: Mapping[str, Any] | None = None,
    limit: int | None = None,
    test: bool = False,
) -> Run:
    """Reads the newest state of a run, finished or not, on whatever devices there are.

    Args:
      workdir: of the run.
      changes: fields of its config that may differ; those that are empty or 0 are ignored.
      limit: evaluate on so many images, evenly spread; None: on all.
      test: evaluate on the test images, rather than on those of `metrics.jsonl`.

    Raises:
      FileNotFoundError: if there is no such run, or its data do not exist.
      ValueError: if no checkpoint can be read.
    """
    config = read_config(workdir, changes or {})
    loader = open_data(config)
    setup = make_setup(config, loader, load_weights=False)
    checkpoints = Checkpoints(workdir / "checkpoints")
    found = restore_state(checkpoints, initial_state(setup, config.seed)[0])
    checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {workdir / 'checkpoints'}")
    evaluate = make_evaluation(setup, loader)
    return Run(
        config,
        setup.network.graphdef,
        deployed_state(found[0], setup),
        lambda weights, batch_stats: evaluate(weights, batch_stats, limit, test),
        lambda: loader.evaluation(test)(limit),
        loader.eval_preprocess,
    )


def read_config(workdir: Path, changes: Mapping[str, Any]) -> ml_collections.FrozenConfigDict:
    """Returns a run's config, for an evaluation.

    Args:
      workdir: of the run.
      changes: fields that may differ; those that are empty or 0 are ignored.

    Raises:
      FileNotFoundError: if there is no `config.json`; it names the runs below, if any.
      ConfigError: if it is damaged.
    """
    saved = saved_config(workdir)
    if not saved or not (workdir / "checkpoints").is_dir():
        below = sorted(str(path.parent.parent) for path in workdir.glob("*/checkpoints/*"))
        hint = f"; name one of its runs: {', '.join(dict.fromkeys(below))}" if below else ""
        raise FileNotFoundError(f"{workdir} is not the workdir of a run{hint}")
    fields = {**saved, **{name: value for name, value in changes.items() if value}}
    usual = base_config("", "")
    try:
        for name, value in fields.items():
            if value is None and usual.get(name) is not None:  # which ConfigDict would take
                raise TypeError(f"{name} is null")
        return evaluation_config(fields)
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"{workdir / 'config.json'} is damaged, or of another version ({error}): remove it, "
            "and rerun the command of the run"
        ) from error


def evaluation_config(
    fields: Mapping[str, Any], new: bool = False
) -> ml_collections.FrozenConfigDict:
    """Returns the settled config of a network to evaluate, on whatever devices there are.

    Args:
      fields: those that differ from `base_config`.
      new: whether the weights come from `pretrained`, rather than from a run's checkpoint.
    """
    config = base_config("", "")
    config.update({**fields, "fsdp": 1, "steps_per_epoch": 1})
    return settle(config, None if new else fields)
