"""The batches: their images, sharing among hosts, resumption, bad files and workers."""

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from common.input import pipeline
from common.input.sources import FolderSource, TfdsSource
from greys import Greys, Million, jpeg

SIZE = 16
EXPERIMENTS = pathlib.Path(pipeline.__file__).parents[2]


def train(source, *, batch_size=4, seed=0, start=0, num_workers=0, host=0, hosts=1, num_classes=5):
    return pipeline.train_batches(
        source,
        batch_size=batch_size,
        seed=seed,
        start=start,
        num_workers=num_workers,
        num_classes=num_classes,
        process_index=host,
        process_count=hosts,
        size=SIZE,
    )


def evaluate(source, *, batch_size=4, num_workers=0, host=0, hosts=1, limit=None):
    return pipeline.eval_batches(
        source,
        batch_size=batch_size,
        num_workers=num_workers,
        num_classes=5,
        process_index=host,
        process_count=hosts,
        size=SIZE,
        resize=20,
        limit=limit,
    )


def take(count, batches):
    """Copies the first batches, and closes the iterator."""
    with contextlib.closing(batches):
        return [
            {key: np.array(value) for key, value in batch.items()}
            for batch in itertools.islice(batches, count)
        ]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def rows(batches):
    """Sorts the images, each with its label and jitter."""
    return sorted(
        tuple(np.asarray(batch[key][i]).tobytes() for key in sorted(batch))
        for batch in batches
        for i in range(len(batch["label"]))
    )


def greys(batches):
    means = [batch["image"].mean(axis=(1, 2, 3)) for batch in batches]
    return np.concatenate(means).round().astype(int)


class TestTrain:
    def test_batch_shapes_and_dtypes(self):
        (batch,) = take(1, train(Greys(10)))
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "image": ((4, SIZE, SIZE, 3), np.uint8),
            "label": ((4,), np.int32),
            "jitter": ((4, 3), np.float32),
        }
        np.testing.assert_array_equal(batch["label"], greys([batch]) % 5)

    def test_each_epoch_is_a_new_permutation(self):
        seen = greys(take(6, train(Greys(12)))).reshape(2, 12)
        np.testing.assert_array_equal(np.sort(seen, axis=1), [range(12)] * 2)
        assert (seen[0] != seen[1]).any()
        assert (seen[0] != range(12)).any()

    def test_seed_determines_batches(self):
        source = Greys(12)
        first, again, other = (take(3, train(source, seed=seed)) for seed in (1, 1, 2))
        assert_same(first, again)
        assert (greys(first) != greys(other)).any()
        assert (first[0]["jitter"] != other[0]["jitter"]).any()

    def test_jitter_is_uniform_around_one(self):
        batches = take(100, train(Greys(10), batch_size=10))
        jitter = np.concatenate([batch["jitter"] for batch in batches])
        quantiles = np.quantile(jitter, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quantiles, [0.8, 0.9, 1, 1.1, 1.2], atol=0.015)
        assert abs(np.corrcoef(jitter, rowvar=False)[np.triu_indices(3, 1)]).max() < 0.12

    @pytest.mark.parametrize("start", [2, 3, 7])
    def test_resumed_batches_equal_uninterrupted_ones(self, start):
        source = Greys(10)  # 2.5 batches: epochs end within a batch
        assert_same(take(4, train(source, start=start)), take(start + 4, train(source))[start:])

    def test_hosts_share_a_batch(self):
        source = Greys(13)
        whole = take(5, train(source, batch_size=6))
        halves = [take(5, train(source, batch_size=3, host=host, hosts=2)) for host in range(2)]
        for i in range(5):
            assert rows([whole[i]]) == rows([halves[0][i], halves[1][i]])

    def test_late_start_in_large_data_set_is_fast(self):
        started = time.perf_counter()
        (batch,) = take(1, train(Million(), start=1_000_000))
        assert time.perf_counter() - started < 5
        assert (batch["label"] >= 0).all()

    def test_rejects_fewer_images_than_a_batch(self):
        with pytest.raises(ValueError, match="10 images are fewer than a batch of 12"):
            train(Greys(10), batch_size=6, hosts=2)

    def test_rejects_other_number_of_classes(self):
        for make in (train, evaluate):
            source = Greys(10)
            source.num_classes = 4
            with pytest.raises(ValueError, match="4 classes, not the 5"):
                make(source)

    @pytest.mark.parametrize("label", [-1, 5])
    def test_rejects_label_out_of_range(self, label):
        source = Greys(4, labels=[0, 1, label, 3])
        for make in (train, evaluate):
            with pytest.raises(ValueError, match=rf"grey 2 has label {label}.*\[0, 5\)"):
                take(1, make(source))


class TestBadFiles:
    def test_are_black_marked_and_reported_once(self, capfd, monkeypatch):
        monkeypatch.setattr(pipeline, "_reported", set())
        source = Greys(12, damaged={7}, unreadable={9})
        batches = take(6, train(source))  # two epochs
        labels = np.concatenate([batch["label"] for batch in batches])
        images = np.concatenate([batch["image"] for batch in batches])
        assert (labels == pipeline.UNREADABLE).sum() == 4
        assert not images[labels == pipeline.UNREADABLE].any()
        good = np.unique(greys(batches)[labels >= 0])
        np.testing.assert_array_equal(good, [0, 1, 2, 3, 4, 5, 6, 8, 10, 11])
        warnings = capfd.readouterr().err
        assert warnings.count("grey 7") == 1
        assert warnings.count("record 9") == 1
        assert "grey 9: no such file" in warnings

    def test_are_skipped_in_evaluation_too(self):
        (batch,) = take(2, evaluate(Greys(4, damaged={1})))
        np.testing.assert_array_equal(batch["label"], [0, pipeline.UNREADABLE, 2, 3])

    def test_end_the_run_if_most_are_bad(self, monkeypatch):
        monkeypatch.setattr(pipeline, "_WINDOW", 8)
        assert len(take(6, train(Greys(8, unreadable=range(4))))) == 6
        with pytest.raises(RuntimeError, match="5 of the last 8"):
            take(6, train(Greys(8, unreadable=range(5))))


class TestEval:
    def test_each_image_once_in_padded_batches(self):
        batches = take(10, evaluate(Greys(10)))
        labels = np.concatenate([batch["label"] for batch in batches])
        np.testing.assert_array_equal(labels, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, -1, -1])
        np.testing.assert_array_equal(greys(batches), [*range(10), 0, 0])
        assert batches[0].keys() == {"image", "label"}
        assert batches[-1]["image"].shape == (4, SIZE, SIZE, 3)

    def test_hosts_get_the_same_number_of_batches(self):
        halves = [take(10, evaluate(Greys(9), host=host, hosts=2)) for host in range(2)]
        assert [len(half) for half in halves] == [2, 2]  # 9 images in batches of 8, padded
        labels = np.concatenate([batch["label"] for half in halves for batch in half])
        assert (labels == pipeline.PADDING).sum() == 7
        assert sorted(greys(halves[0] + halves[1])[labels >= 0]) == list(range(9))

    def test_limit_spreads_over_the_source(self):
        some = greys(take(10, evaluate(Greys(100), limit=4)))
        np.testing.assert_array_equal(some, [0, 25, 50, 75])
        assert len(take(10, evaluate(Greys(10), limit=50))) == 3

    def test_rejects_crop_larger_than_image(self):
        shared = {"num_workers": 0, "num_classes": 5, "process_index": 0, "process_count": 1}
        with pytest.raises(ValueError, match="cannot cut 30"):
            pipeline.eval_batches(Greys(4), batch_size=2, size=30, resize=20, **shared)


class TestWorkers:
    def test_change_nothing_and_need_no_accelerator(self, tmp_path, monkeypatch, capfd):
        for i in range(10):
            folder = tmp_path / "train" / f"n{i % 5}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.JPEG").write_bytes(b"damaged" if i == 3 else jpeg(20 * i))
        source = FolderSource(str(tmp_path), "train")
        jax.devices()  # jax has its devices here; a worker that asks for them now fails
        monkeypatch.setenv("JAX_PLATFORMS", "none_such")
        assert_same(take(5, train(source, start=1, num_workers=2)), take(5, train(source, start=1)))
        assert f"n3{os.sep}3.JPEG" in capfd.readouterr().err

    def test_error_in_one_of_more_workers_than_batches(self):
        source = Greys(4, labels=[0, 1, 2, 99])
        with pytest.raises(ValueError, match="grey 3 has label 99"):
            take(3, evaluate(source, num_workers=3))

    def test_die_with_a_killed_script(self, tmp_path):
        (tmp_path / "train" / "n0").mkdir(parents=True)
        for i in range(8):
            (tmp_path / "train" / "n0" / f"{i}.jpg").write_bytes(jpeg(i))
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        arguments = [sys.executable, str(script), str(tmp_path), str(EXPERIMENTS)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            worker = int(process.stdout.readline())
            os.kill(worker, signal.SIGTERM)  # not a worker's business
            assert process.stdout.readline() == "twenty batches\n"
            assert alive(worker)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == -signal.SIGTERM
        deadline = time.monotonic() + 10
        while alive(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(worker)


SCRIPT = """
import multiprocessing, sys, time
from absl import app

def main(argv):
    sys.path.insert(0, argv[2])
    from common.input import pipeline, sources
    batches = pipeline.train_batches(
        sources.FolderSource(argv[1], "train"), batch_size=4, seed=0, start=0, num_workers=1,
        num_classes=1, process_index=0, process_count=1, size=16)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(0.5)
    for _ in range(20):
        next(batches)
    print("twenty batches", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    app.run(main)
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


class TestSynthetic:
    def test_noise_is_endless_and_like_real_batches(self):
        batches = pipeline.synthetic_batches(batch_size=4, num_classes=3, size=SIZE)
        batch, again = next(batches), next(batches)
        (real,) = take(1, train(Greys(10)))
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            key: (value.shape, value.dtype) for key, value in real.items()
        }
        assert batch is again
        np.testing.assert_array_equal(batch["label"], [0, 1, 2, 0])
        assert batch["image"].std() > 70  # uniform noise: 73.9
        assert 0.8 <= batch["jitter"].min() < batch["jitter"].max() <= 1.2

    def test_hosts_differ_and_evaluation_ends(self):
        options = {"batch_size": 4, "num_classes": 9, "size": SIZE, "color_jitter": None}
        one, other = (
            list(pipeline.synthetic_batches(process_index=host, count=3, **options))
            for host in range(2)
        )
        assert len(one) == 3
        assert one[0].keys() == {"image", "label"}
        assert (one[0]["image"] != other[0]["image"]).any()
        np.testing.assert_array_equal(other[0]["label"], [4, 5, 6, 7])


class TestPrefetch:
    def test_runs_ahead_by_depth_and_loses_nothing(self):
        put = []

        def start(batch):
            put.append(batch)
            return -batch

        ahead = pipeline.prefetch_to_device(iter(range(1, 7)), start, depth=2)
        assert next(ahead) == -1
        assert put == [1, 2, 3]
        assert list(ahead) == [-2, -3, -4, -5, -6]

    def test_fewer_batches_than_depth(self):
        assert list(pipeline.prefetch_to_device(iter([1]), lambda batch: batch, depth=3)) == [1]

    def test_closing_closes_the_batches(self):
        closed = []

        def batches():
            try:
                yield from range(10)
            finally:
                closed.append(True)

        ahead = pipeline.prefetch_to_device(batches(), lambda batch: batch)
        next(ahead)
        ahead.close()
        assert closed == [True]


def test_imagenet_sample():
    try:
        source = TfdsSource("imagenet2012", "train")
    except FileNotFoundError:
        pytest.skip("no ImageNet sample: set TFDS_DATA_DIR")
    labels = {source[i].label for i in range(len(source))}
    batches = take(2, train(source, batch_size=32, num_classes=1000))
    assert {int(label) for batch in batches for label in batch["label"]} <= labels
    assert all(batch["image"].std() > 40 for batch in batches)
