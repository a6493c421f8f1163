"""Fills the tables of README.md and docs/, between their markers, from what the runs wrote.

The runs, on two CPU cores (`seconds` in the summaries says how long each takes). Remove the old
folders first, because finished runs are not repeated. TFDS_DATA_DIR names the folder of
Fashion-MNIST and CIFAR-10:

    results=experiments/results
    for seed in 0 1 2; do
      python experiments/digits.py --config.seed=$seed --workdir=$results/digits/seed$seed
      python experiments/fashion_mnist.py --config.seed=$seed \\
        --workdir=$results/fashion_mnist/seed$seed
    done
    resnet20=$results/cifar10_resnet20
    python experiments/cifar10_resnet20.py --workdir=$resnet20/pretrain --config.phase=pretrain \\
      --config.steps_per_epoch=100 --config.pretrain_epochs=12 --config.warmup_epochs=2
    python experiments/cifar10_resnet20.py --workdir=$resnet20/binary --config.constraint=binary \\
      --config.pretrained=$resnet20/pretrain --config.steps_per_epoch=50 --config.epochs=40 \\
      --config.patience=1 --config.multiplier_learning_rate=3e-3
    study="python experiments/study.py --workdir=$results/study"
    $study/fashion_mnist --config.learning_rates="(0.01,0.03,0.1,0.3)"
    one="--config.learning_rates=(0.1,) --config.rates_alone"
    binary="--config.constraints=('binary',)"
    # The next four start from the weights of the first: copy its folder pretrain into theirs.
    $study/fashion_mnist_course --config.variants=course --config.strengths="(0.0,10.0)" \\
      --config.learning_rates="(0.1,)" $binary
    $study/fashion_mnist_rules --config.variants=rules --config.learning_rates="(0.01,)" $binary
    $study/fashion_mnist_layers --config.variants=layers --config.methods="('closing','cbp')" \\
      --config.learning_rates="(0.1,)" $binary
    $study/fashion_mnist_distilled --config.teacher=pretrained $one $binary \\
      --config.methods="('ste','parq','closing')"
    $study/fashion_mnist_scratch --config.pretrained=random --config.epochs=160 $one $binary \\
      --config.methods="('cbp','closing','ste')"
    python experiments/study.py --workdir=$results/splitting $one --config.keep_weights \\
      --config.methods="('ste','cbp','closing')" --config.constraints="('ternary',)" \\
      --config.tuned_on=ternary --config.seeds=1 \\
      --config.pretrained=$results/study/fashion_mnist/pretrain/seed0
    # FILE: akamaster's resnet20-12fca82f.th
    resnet20="--config.ground=resnet20 --config.pretrained=FILE --config.epochs=12"
    both="--config.learning_rates=(0.03,) --config.rates_alone
      --config.constraints=('binary','ternary')"
    $study/resnet20 $resnet20 $both --config.methods="('ste','parq')" --config.seeds=1
    $study/resnet20 $resnet20 $both --config.methods="('closing',)" --config.seeds=2
    $study/resnet20_course $resnet20 --config.variants=course --config.closes_at="(0.8,)" \\
      --config.strengths="(10.0,)" --config.learning_rates="(0.03,)" $binary --config.seeds=1
    llama="python experiments/shakespeare_llama.py --config.text=FILE"
    $llama --workdir=$results/shakespeare_llama
    $llama --workdir=$results/shakespeare_llama_512 --config.width=512 --config.hidden=1536 \\
      --config.heads=8 --config.kv_heads=4 --config.pretrain_epochs=40 --config.epochs=8 \\
      --config.methods="('closing',)" --config.teacher=pretrained --config.distilled=False
    (cd experiments && python -m benchmarks)   # on a machine that does nothing else
    (cd experiments && python -m benchmarks.closing)
    # RUNS: of both widths, in full precision, and ternary and binary by closing with a teacher
    (cd experiments && python -m benchmarks.llama_cpp --runs=RUNS)
    (cd experiments && python -m faults)
    python experiments/update_pages.py
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shakespeare_llama
from benchmarks import closing, llama_cpp, page, timing
from common import study
from common.report import comparison
from common.report.bits import bits_table
from common.report.claims import claims_table
from common.report.layers import layers_table
from common.report.splitting import plot_splitting
from common.report.tables import format_table
from common.report.workdir import METHODS, Summary, read_metrics
from faults import page as faults_page

import cbp_jax

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
SPLITTING = ("ste", "cbp", "closing")
_MARKER = re.compile(r"<!-- ([\w-]+):(?:begin|end) -->")
_TABLE = re.compile(r"(<!-- ([\w-]+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def seeds_table(experiment: str) -> str:
    """Mean and sample deviation over the seeds of a study, one row per constraint."""
    rows = []
    for constraint in cbp_jax.CONSTRAINTS:
        ste, cbp = (
            [Summary.read(path.parent) for path in sorted((RESULTS / experiment).glob(pattern))]
            for pattern in (
                f"seed*/{constraint}_ste/summary.json",
                f"seed*/{constraint}/summary.json",
            )
        )
        rows.append(
            (
                constraint,
                _spread([s.full_precision_top1 for s in cbp]),
                _spread([s.top1 for s in ste]),
                _spread([s.top1 for s in cbp]),
                f"{max(s.cfs_relative for s in cbp):.1e}",
                str(len(cbp)),
            )
        )
    return format_table(
        ("constraint", "full precision", "STE", "CBP", "CFS / scale, worst", "seeds"), rows
    )


def _spread(accuracies: Sequence[float]) -> str:
    return f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies, ddof=1):.2f}"


def short_run_table(experiment: str) -> str:
    """One row per run of a shortened long experiment: accuracy, and how the constraint was met."""
    rows = []
    for file in sorted((RESULTS / experiment).glob("*/summary.json")):
        summary = Summary.read(file.parent)
        config = json.loads((file.parent / "config.json").read_text())
        if summary.constrained:
            epochs = read_metrics(file.parent)
            rows.append(
                (
                    summary.constraint,
                    METHODS[summary.method],
                    f"{summary.full_precision_top1:.2%}",
                    f"{summary.top1:.2%}",
                    f"{epochs[0]['cfs_relative']:.1e}",
                    f"{summary.cfs_relative:.1e}",
                    f"{epochs[-1]['step']:,} of {config['batch_size']} images",
                )
            )
    header = (
        "constraint",
        "method",
        "top-1 before",
        "after",
        "CFS / scale, first epoch",
        "last epoch",
        "steps",
    )
    return format_table(header, rows)


def text_table(experiment: str) -> str:
    """Bits per byte of each run of a study on text."""
    folder, config = RESULTS / experiment, shakespeare_llama.get_config()
    runs = [folder / entry.name for entry in study.entries(config)]
    found = [Summary.read(run) for run in runs if (run / "summary.json").exists()]
    return bits_table(Summary.read(folder / study.PRETRAIN), found)


# Rows of `closing` that are shown: optimizer, multiplier rate, growth of the window.
_ADVICE = (
    ("SGD, constant", 0.0, ""),
    ("SGD, constant", 1e-3, "+10"),
    ("SGD, constant", 1e-2, "+10"),
    ("SGD, cosine", 1e-4, "+10"),
    ("SGD, cosine", 1e-3, "+10"),
    ("SGD, cosine", 1e-3, "×1.5"),
    ("AdamW, cosine", 0.0, ""),
    ("AdamW, cosine", 1e-3, "×1.5"),
)


def advice_table() -> str:
    """The rows of `closing` that the advice in docs/when_it_does_not_close.md rests on."""
    rows = json.loads((timing.RESULTS / "closing.json").read_text())["runs"]
    found = {
        (row["optimizer"], row["rate"], row["growth"]): row
        for row in rows
        if row["constraint"] == "binary"
    }
    return closing.table([found[key] for key in _ADVICE])


def llama_table() -> str:
    """Size, loss and speed of Llamas in llama.cpp."""
    path = timing.RESULTS / "llama_cpp.json"
    return llama_cpp.table(json.loads(path.read_text()), llama_cpp.SHORT)


def study_tables() -> dict[str, str]:
    """Results and tuning of each study, what it says about layers, and the paper's claims."""
    studies, found = RESULTS / "study", {}
    for folder in sorted(studies.iterdir()):
        table = layers_table if folder.name.endswith("_layers") else comparison.results_table
        found[f"study-{folder.name}"] = table(folder)
        if any(len(trials(file)) > 1 for file in folder.glob("*/*/chosen.json")):
            found[f"study-{folder.name}-tuning"] = comparison.tuning_table(folder)
    pretrained, scratch = studies / "fashion_mnist", studies / "fashion_mnist_scratch"
    return found | {"study-claims": claims_table(pretrained, scratch)}


def trials(chosen: Path) -> list[Mapping[str, Any]]:
    """The trials that a method's `chosen.json` lists."""
    return json.loads(chosen.read_text())["trials"]


def draw_study() -> None:
    """Draws the figures of the comparisons of methods beside their runs."""
    for name in ("fashion_mnist", "resnet20"):
        folder = RESULTS / "study" / name
        figures, title = folder / "figures", name.replace("_", " ")
        if len({constraint for constraint, _ in comparison.cells(folder)}) > 2:
            comparison.plot_accuracy_against_bits(figures / "bits.png", title, folder)
        if list(folder.glob("binary/*/seed*/metrics.jsonl")):
            comparison.plot_over_steps(figures / "binary.png", f"{title}, binary", folder, "binary")
    runs = {method: RESULTS / f"splitting/ternary/{method}/seed0" for method in SPLITTING}
    if all(list(run.glob("weights_step*.npz")) for run in runs.values()):
        path = RESULTS / "splitting" / "figures" / "ternary.png"
        plot_splitting(path, "fashion mnist, ternary", runs, "hidden2/kernel", "ternary")


def tables() -> dict[str, str]:
    """Every table by the name in its markers."""
    return {
        "digits": (RESULTS / "digits" / "seed0" / "table.md").read_text().strip(),
        "digits-seeds": seeds_table("digits"),
        "fashion_mnist-seeds": seeds_table("fashion_mnist"),
        "cifar10_resnet20": short_run_table("cifar10_resnet20"),
        "closing": advice_table(),
        **study_tables(),
        "shakespeare_llama": text_table("shakespeare_llama"),
        "llama_cpp": llama_table(),
        "cost": page.aims(),
        "faults": faults_page.faults_table(),
        "readers": faults_page.readers_table(),
    }


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(texts: Sequence[str], contents: Mapping[str, str]) -> list[str]:
    """Puts each table between its markers, `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

    Raises:
      ValueError: if a table has no markers or several, or markers have no table.
    """
    markers = Counter(name for text in texts for name in _MARKER.findall(text))
    found = Counter(name for text in texts for _, name, _ in _TABLE.findall(text))
    names = contents.keys() | markers.keys()
    if wrong := {n for n in names if n not in contents or (markers[n], found[n]) != (2, 1)}:
        raise ValueError(
            f"tables and markers differ in {', '.join(sorted(wrong))}: each table needs one "
            "<!-- NAME:begin --> and <!-- NAME:end --> in all pages, and each such pair a table"
        )
    return [_TABLE.sub(lambda m: f"{m[1]}{contents[m[2]]}\n{m[3]}", text) for text in texts]


def fill() -> None:
    """Fills the tables of all pages."""
    texts = [path.read_text() for path in pages()]
    try:
        new = filled(texts, tables())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for path, text in zip(pages(), new, strict=True):
        path.write_text(text)


if __name__ == "__main__":
    draw_study()
    fill()
