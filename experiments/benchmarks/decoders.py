"""How many photos a second does a core decode, and turn into training and evaluation images, with
which library?

    cd experiments && python -m benchmarks.decoders --data_dir=DIR

DIR is a TFDS folder with `imagenet2012` or a folder tree `train/<class>/*.JPEG`. One process, one
thread, processor time; the candidates take turns, so that other load meets them all, and the
medians count. Writes `results/decoders.json` and `.md`.
"""

import importlib.metadata
import io
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
import simplejpeg
from absl import app, flags
from common.input import decode as photos
from common.input.sources import FolderSource, Source, TfdsSource
from PIL import Image

RESULTS = pathlib.Path(__file__).parent / "results"
LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "simplejpeg")
SHORT_SIDES = (
    None,
    375,
    750,
)  # of the photos; None: as they are. 375 is usual in ImageNet, and some photos are far larger
SIZE, RESIZE = 224, 256
BILINEAR = Image.Resampling.BILINEAR
OURS = "simplejpeg scaled + OpenCV"
OURS_EVAL = "simplejpeg + Pillow"

Decode = Callable[
    [bytes, float], np.ndarray
]  # the file and the factor by which it may be decoded smaller, at least 1


def pillow(data: bytes, factor: float) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pillow_scaled(data: bytes, factor: float) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (int(image.width / factor), int(image.height / factor)))
    return np.asarray(image.convert("RGB"))


def opencv(data: bytes, factor: float) -> np.ndarray:
    return _opencv(data, cv2.IMREAD_COLOR)


def opencv_scaled(data: bytes, factor: float) -> np.ndarray:
    flags_of = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    return _opencv(
        data, flags_of[max(possible for possible in flags_of if possible <= max(factor, 1))]
    )


def _opencv(data: bytes, how: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), how | cv2.IMREAD_IGNORE_ORIENTATION)
    assert pixels is not None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def simplejpeg_full(data: bytes, factor: float) -> np.ndarray:
    return photos.decode_rgb(data)


def simplejpeg_scaled(data: bytes, factor: float) -> np.ndarray:
    return photos.decode_rgb(data, factor)


DECODERS: dict[str, Decode] = {
    "Pillow": pillow,
    "Pillow scaled": pillow_scaled,
    "OpenCV": opencv,
    "OpenCV scaled": opencv_scaled,
    "simplejpeg": simplejpeg_full,
    "simplejpeg scaled": simplejpeg_scaled,
}


def train_transform(
    decode: Decode, resizer: str
) -> Callable[[bytes, np.random.Generator], np.ndarray]:
    """Random crop and flip with a decoder and "Pillow" or "OpenCV" for the resizing."""

    def transform(data: bytes, rng: np.random.Generator) -> np.ndarray:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        top, left, crop_height, crop_width = photos.random_crop(height, width, rng)
        flip = rng.random() < 0.5
        pixels = decode(data, min(crop_height, crop_width) / SIZE)
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        crop = np.ascontiguousarray(
            pixels[
                round(top * down) : round((top + crop_height) * down),
                round(left * across) : round((left + crop_width) * across),
            ]
        )
        if resizer == "Pillow":
            resized = np.asarray(Image.fromarray(crop).resize((SIZE, SIZE), BILINEAR))
        else:
            area = min(crop.shape[:2]) >= SIZE
            resized = cv2.resize(
                crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR
            )
        return np.ascontiguousarray(resized[:, ::-1]) if flip else resized

    return transform


def eval_transform(
    decode: Decode, resizer: str
) -> Callable[[bytes, np.random.Generator], np.ndarray]:
    """Resize and centre crop with a decoder and "Pillow" or "OpenCV" for the resizing."""

    def transform(data: bytes, rng: np.random.Generator) -> np.ndarray:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        short = min(height, width)
        new_height, new_width = RESIZE * height // short, RESIZE * width // short
        pixels = decode(data, short / RESIZE)
        if resizer == "Pillow":
            resized = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), BILINEAR))
        else:
            area = min(pixels.shape[:2]) >= RESIZE
            resized = cv2.resize(
                pixels,
                (new_width, new_height),
                interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR,
            )
        top, left = round((new_height - SIZE) / 2), round((new_width - SIZE) / 2)
        return resized[top : top + SIZE, left : left + SIZE]

    return transform


Candidate = Callable[[bytes, np.random.Generator], np.ndarray]


def candidates() -> dict[str, dict[str, Candidate]]:
    """What is measured: task -> name -> function."""

    def half(decode: Decode) -> Candidate:
        return lambda data, rng: decode(data, 2)

    train, evaluate = {}, {}
    for name, decode in DECODERS.items():
        for resizer in ("Pillow", "OpenCV"):
            if resizer in name or "simplejpeg" in name:  # a library needs no other to resize
                train[f"{name} + {resizer}"] = train_transform(decode, resizer)
                evaluate[f"{name} + {resizer}"] = eval_transform(decode, resizer)
    train[OURS] = lambda data, rng: photos.decode_train(data, rng, SIZE)
    evaluate[OURS_EVAL] = lambda data, rng: photos.decode_eval(data, RESIZE, SIZE)
    return {
        "decode": {name: half(decode) for name, decode in DECODERS.items()},
        "train": train,
        "eval": evaluate,
    }


def measure(
    functions: Mapping[str, Candidate], files: list[bytes], repetitions: int
) -> dict[str, float]:
    """Images per second of processor time, median over the repetitions."""
    speeds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions):
        for name, function in functions.items():
            rng = np.random.default_rng(repetition)  # the same crops for all
            started = time.process_time()
            for data in files:
                function(data, rng)
            speeds[name].append(len(files) / (time.process_time() - started))
    return {name: statistics.median(values) for name, values in speeds.items()}


def differences(
    functions: Mapping[str, Candidate], files: list[bytes]
) -> dict[str, tuple[int, float]]:
    """Greatest and mean difference of evaluation images to those of Pillow alone, in levels of 256."""
    rng = np.random.default_rng(0)
    reference = [functions["Pillow + Pillow"](data, rng).astype(int) for data in files]
    found = {}
    for name, function in functions.items():
        gaps = [
            np.abs(function(data, rng) - expected)
            for data, expected in zip(files, reference, strict=True)
        ]
        found[name] = (
            max(int(gap.max()) for gap in gaps),
            float(np.mean([gap.mean() for gap in gaps])),
        )
    return found


def enlarged(data: bytes, short_side: int) -> bytes:
    """The photo with another shorter side, as JPEG of quality 90."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = short_side / min(image.size)
    image = image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def cpu_model() -> str:
    """The processor's name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def as_markdown(results: Mapping[str, Any]) -> str:
    """The report as tables."""
    libraries = ", ".join(f"{name} {version}" for name, version in results["libraries"].items())
    lines = [
        "# Images per second and core",
        f"{results['cpu']}, Python {results['python']}, {libraries}; one thread, processor time, medians over "
        f"{results['repetitions']} passes in turn over {results['photos']} photos. By `experiments/benchmarks/decoders.py`.",
        "",
        "`decode` is the file to RGB, at half size where it says scaled. `train` is random crop, resize to 224 and flip; scaled "
        "decoding serves crops that are shrunk by two or more. `eval` is resize to 256 and centre crop 224; difference is to "
        "Pillow alone, greatest and mean, of 256 levels. In bold what `common/photos.py` does. Enlarged photos were resampled "
        "(bicubic) and encoded again (quality 90): they have the size of large photos, not their detail.",
    ]
    for sizes in results["sizes"]:
        lines += [
            "",
            f"## {sizes['name']}: {sizes['width']:.0f} x {sizes['height']:.0f} pixels and {sizes['kilobytes']:.0f} kB in the mean",
        ]
        for task, rows in sizes["images_per_second"].items():
            is_eval = task == "eval"
            lines += [
                "",
                f"| {task} | images/s |" + (" difference |" if is_eval else ""),
                "| --- | --- |" + (" --- |" if is_eval else ""),
            ]
            for name, speed in rows.items():
                chosen = name == {"train": OURS, "eval": OURS_EVAL}.get(task)
                row = f"| **{name}** | **{speed:.0f}** |" if chosen else f"| {name} | {speed:.0f} |"
                lines.append(
                    row + (" {}, {:.2f} |".format(*sizes["difference"][name]) if is_eval else "")
                )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Measures, prints and writes."""
    del argv
    data_dir, count, repetitions = flags.FLAGS.data_dir, flags.FLAGS.photos, flags.FLAGS.repetitions
    is_tree = data_dir and os.path.isdir(os.path.join(data_dir, "train"))
    source: Source = (
        FolderSource(data_dir, "train")
        if is_tree
        else TfdsSource("imagenet2012", "train", data_dir)
    )
    originals = [source[i * len(source) // count].image for i in range(count)]
    cv2.setNumThreads(1)
    sizes = []
    for short_side in SHORT_SIDES:
        files = [enlarged(data, short_side) for data in originals] if short_side else originals
        shapes = [simplejpeg.decode_jpeg_header(data)[:2] for data in files]
        tasks = candidates()
        sizes.append(
            {
                "name": f"enlarged to a shorter side of {short_side}"
                if short_side
                else "as they are",
                "height": statistics.mean(height for height, _ in shapes),
                "width": statistics.mean(width for _, width in shapes),
                "kilobytes": statistics.mean(len(data) for data in files) / 1000,
                "images_per_second": {
                    task: measure(functions, files, repetitions)
                    for task, functions in tasks.items()
                },
                "difference": differences(tasks["eval"], files),
            }
        )
    results = {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "photos": count,
        "repetitions": repetitions,
        "sizes": sizes,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "decoders.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (RESULTS / "decoders.md").write_text(as_markdown(results))
    print(as_markdown(results))


if __name__ == "__main__":
    flags.DEFINE_string(
        "data_dir", None, "TFDS folder, or folder tree; TFDS_DATA_DIR if not given."
    )
    flags.DEFINE_integer("photos", 48, "How many photos.", lower_bound=1)
    flags.DEFINE_integer("repetitions", 7, "How many passes over them.", lower_bound=1)
    app.run(main)
