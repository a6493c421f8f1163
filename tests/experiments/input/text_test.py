"""Text as windows of bytes: its parts, the stream of training, the passes of evaluation."""

import itertools
import sysconfig
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
from common.config import ConfigError
from common.input.batch import PADDING
from common.input.open import open_data
from common.input.text import load_text

# Each byte tells its part: 1800 bytes to train on, 100 to validate, 100 to test.
PARTS = {"train": range(0, 90), "validation": range(90, 190), "test": range(190, 250)}
TEXT = b"".join(
    bytes(itertools.islice(itertools.cycle(PARTS[name]), size))
    for name, size in (("train", 1800), ("validation", 100), ("test", 100))
)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT)
    return tmp_path / "text.txt"


def make_config(path, **changes):
    config = {"data": "text", "text": str(path), "context": 8, "num_classes": 256, "seed": 0}
    sizes = {"batch_size": 16, "eval_batch_size": 8, "eval_windows": 0, "validation_images": 0}
    return ml_collections.ConfigDict({**config, **sizes, **changes})


def rows(batches):
    """The windows of batches that are no padding."""
    every = {name: [] for name in ("image", "label")}
    for batch in batches:
        assert batch["image"].shape == batch["label"].shape
        assert batch["label"].dtype == np.int32
        kept = (batch["label"] != PADDING).all(axis=1)
        assert (batch["label"][~kept] == PADDING).all()
        for name, array in batch.items():
            every[name].append(array[kept])
    return {name: np.concatenate(arrays) for name, arrays in every.items()}


def test_a_text_is_split_by_position(path):
    text = load_text(str(path))
    assert [len(part) for part in text] == [1800, 100, 100]
    assert b"".join(part.tobytes() for part in text) == TEXT


def test_training_windows_stay_in_their_part_and_reach_its_ends(path):
    loader = open_data(make_config(path))
    found = rows(itertools.islice(loader.train(0), 1000))
    assert set(np.unique(found["label"])) == set(PARTS["train"])
    np.testing.assert_array_equal(found["label"][:, :-1], found["image"][:, 1:])
    np.testing.assert_array_equal(found["label"], (found["image"] + 1) % 90)  # what follows
    marked = bytearray(TEXT)
    marked[0] = marked[1799] = 255
    path.write_bytes(marked)
    found = rows(itertools.islice(open_data(make_config(path)).train(0), 1000))
    assert (found["image"][:, 0] == 255).any()
    assert (found["label"][:, -1] == 255).any()


def test_training_starts_from_any_step(path):
    whole = list(itertools.islice(open_data(make_config(path)).train(0), 20))
    for expected, actual in zip(whole[13:], open_data(make_config(path)).train(13), strict=False):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert len({batch["image"].tobytes() for batch in whole}) == 20
    other = next(open_data(make_config(path, seed=1)).train(0))
    assert (other["image"] != whole[0]["image"]).any()


def test_evaluation_sees_the_validation_part_once(path):
    loader = open_data(make_config(path))
    assert (loader.train_images, loader.eval_images) == (224, 12)
    found = rows(loader.evaluate(None))
    part = np.frombuffer(TEXT[1800:1900], np.uint8)
    np.testing.assert_array_equal(found["image"].ravel(), part[:96])
    np.testing.assert_array_equal(found["label"].ravel(), part[1:97])


def test_the_end_of_the_text_tests(path):
    found = rows(open_data(make_config(path)).test(None))
    np.testing.assert_array_equal(found["image"].ravel(), np.frombuffer(TEXT[1900:1996], np.uint8))


@pytest.mark.parametrize(
    ("windows", "limit", "expected"),
    [
        (0, 4, [0, 3, 6, 9]),
        (0, 5, [0, 2, 4, 7, 9]),
        (0, 99, range(12)),
        (6, None, [0, 2, 4, 6, 8, 10]),
        (6, 3, [0, 4, 8]),
    ],
)
def test_evaluation_of_some_windows_spreads_over_the_part(path, windows, limit, expected):
    loader = open_data(make_config(path, eval_windows=windows))
    assert loader.eval_images == (windows or 12)
    found = rows(loader.evaluate(limit))
    np.testing.assert_array_equal(found["image"][:, 0], [90 + 8 * index for index in expected])


def test_hosts_share_out_every_batch(path, monkeypatch):
    config, hosts = make_config(path), []
    whole = open_data(config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        hosts.append(open_data(config))
    for batches, *parts in [
        [itertools.islice(loader.train(2), 3) for loader in (whole, *hosts)],
        [loader.evaluate(None) for loader in (whole, *hosts)],
    ]:
        for batch, *shares in zip(batches, *parts, strict=True):
            for name, array in batch.items():
                together = np.stack([share[name] for share in shares], axis=1)
                np.testing.assert_array_equal(together.reshape(array.shape), array)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name, text in {"b.txt": "two", "a.py": "one", "c.md": "no", "d.txt": "three"}.items():
        (tmp_path / name).write_text(text)
    assert b"".join(part.tobytes() for part in load_text(str(tmp_path))) == b"onetwothree"


def test_without_a_path_it_is_the_standard_library():
    found = b"".join(part.tobytes() for part in load_text())
    assert (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes() in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 100}, r"the validation part .* 100 bytes, and a window needs 101"),
        ({"num_classes": 255}, r"num_classes=255: text has 256 bytes"),
    ],
)
def test_impossible_configs_are_rejected(path, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_data(make_config(path, **changes))


@pytest.mark.parametrize("name", ["", "missing.txt"])
def test_missing_text_says_what_was_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"--config.text=.*: give a file, or a folder of"):
        open_data(make_config(tmp_path / name))
