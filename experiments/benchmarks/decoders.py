"""Photos per second and core, decoded and turned into training and evaluation images, by library.

    cd experiments && python -m benchmarks.decoders --data_dir=DIR

DIR is a TFDS folder with `imagenet2012` or a folder tree `train/<class>/*.JPEG`. One process, one
thread, processor time; the candidates take turns, so that other load affects them all, and the
medians count. Writes `results/decoders.json` and `.md`.
"""

import importlib.metadata
import io
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
from benchmarks import timing
from common.input.decode import decode_eval, decode_rgb, decode_train, random_crop
from common.input.sources import FolderSource, Source, TfdsSource
from common.report.tables import format_table
from PIL import Image

LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "simplejpeg")
# Of the photos; None: unchanged. 375 is common in ImageNet, and some photos are far larger.
SHORT_SIDES = (None, 375, 750)
SIZE, RESIZE = 224, 256
BILINEAR = Image.Resampling.BILINEAR
OURS = "simplejpeg scaled + OpenCV"
OURS_EVAL = "simplejpeg + Pillow"

# Of the file, and the factor, at least 1, by which it may be decoded smaller.
Decode = Callable[[bytes, float], np.ndarray]
Candidate = Callable[[bytes, np.random.Generator], np.ndarray]


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
    possible = max(reduction for reduction in flags_of if reduction <= max(factor, 1))
    return _opencv(data, flags_of[possible])


def _opencv(data: bytes, how: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), how | cv2.IMREAD_IGNORE_ORIENTATION)
    assert pixels is not None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def simplejpeg_full(data: bytes, factor: float) -> np.ndarray:
    return decode_rgb(data)


def simplejpeg_scaled(data: bytes, factor: float) -> np.ndarray:
    return decode_rgb(data, factor)


DECODERS: dict[str, Decode] = {
    "Pillow": pillow,
    "Pillow scaled": pillow_scaled,
    "OpenCV": opencv,
    "OpenCV scaled": opencv_scaled,
    "simplejpeg": simplejpeg_full,
    "simplejpeg scaled": simplejpeg_scaled,
}


def resize(pixels: np.ndarray, height: int, width: int, resizer: str) -> np.ndarray:
    """Resizes with "Pillow" or "OpenCV"."""
    if resizer == "Pillow":
        return np.asarray(Image.fromarray(pixels).resize((width, height), BILINEAR))
    shrinks = min(pixels.shape[:2]) >= min(height, width)
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(pixels, (width, height), interpolation=method)


def train_transform(decode: Decode, resizer: str) -> Candidate:
    """Random crop and flip with the given decoder and resizer."""

    def transform(data: bytes, rng: np.random.Generator) -> np.ndarray:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        top, left, crop_height, crop_width = random_crop(height, width, rng)
        flip = rng.random() < 0.5
        pixels = decode(data, min(crop_height, crop_width) / SIZE)
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        crop = np.ascontiguousarray(
            pixels[
                round(top * down) : round((top + crop_height) * down),
                round(left * across) : round((left + crop_width) * across),
            ]
        )
        resized = resize(crop, SIZE, SIZE, resizer)
        return np.ascontiguousarray(resized[:, ::-1]) if flip else resized

    return transform


def eval_transform(decode: Decode, resizer: str) -> Candidate:
    """Resize and centre crop with the given decoder and resizer."""

    def transform(data: bytes, rng: np.random.Generator) -> np.ndarray:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        short = min(height, width)
        new_height, new_width = RESIZE * height // short, RESIZE * width // short
        resized = resize(decode(data, short / RESIZE), new_height, new_width, resizer)
        top, left = round((new_height - SIZE) / 2), round((new_width - SIZE) / 2)
        return resized[top : top + SIZE, left : left + SIZE]

    return transform


def candidates() -> dict[str, dict[str, Candidate]]:
    """Returns the functions to measure by task and name."""

    def half(decode: Decode) -> Candidate:
        return lambda data, rng: decode(data, 2)

    train, evaluate = {}, {}
    for name, decode in DECODERS.items():
        for resizer in ("Pillow", "OpenCV"):
            if resizer in name or "simplejpeg" in name:  # Pillow and OpenCV resize themselves
                train[f"{name} + {resizer}"] = train_transform(decode, resizer)
                evaluate[f"{name} + {resizer}"] = eval_transform(decode, resizer)
    train[OURS] = lambda data, rng: decode_train(data, rng, SIZE)
    evaluate[OURS_EVAL] = lambda data, rng: decode_eval(data, RESIZE, SIZE)
    return {
        "decode": {name: half(decode) for name, decode in DECODERS.items()},
        "train": train,
        "eval": evaluate,
    }


def measure(
    functions: Mapping[str, Candidate], files: list[bytes], repetitions: int
) -> dict[str, float]:
    """Returns images per second of processor time, the median over the repetitions."""
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
    """Compares evaluation images to Pillow's: largest and mean difference, in levels of 256."""
    rng = np.random.default_rng(0)
    reference = [functions["Pillow + Pillow"](data, rng).astype(int) for data in files]
    found = {}
    for name, function in functions.items():
        pairs = zip(files, reference, strict=True)
        gaps = [np.abs(function(data, rng) - expected) for data, expected in pairs]
        mean = float(np.mean([gap.mean() for gap in gaps]))
        found[name] = (max(int(gap.max()) for gap in gaps), mean)
    return found


def enlarged(data: bytes, short_side: int) -> bytes:
    """Resizes the photo to another shorter side, as JPEG of quality 90."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = short_side / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def cpu_model() -> str:
    """Returns the processor's name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    libraries = ", ".join(f"{name} {version}" for name, version in results["libraries"].items())
    parts = [
        "# Images per second and core\n"
        f"{results['cpu']}, Python {results['python']}, {libraries}; one thread, processor time; "
        f"medians over {results['repetitions']} passes, taken in turns, over {results['photos']} "
        "photos. By `python -m benchmarks.decoders`.",
        "`decode` is the file to RGB, at half size where scaled. `train` is a random crop, resized "
        "to 224 and flipped; scaled decoding serves crops that are shrunk by two or more. `eval` "
        "is resizing to 256 and the centre crop of 224; the difference, largest and mean, is from "
        "Pillow alone, in levels of 256. Bold: the ones in `common/input/decode.py`. Enlarged "
        "photos were resampled (bicubic) and re-compressed as JPEG (quality 90): they have the "
        "size of large photos, not their detail.",
    ]
    for sizes in results["sizes"]:
        parts.append(
            f"## {sizes['name']}: on average {sizes['width']:.0f} x {sizes['height']:.0f} pixels "
            f"and {sizes['kilobytes']:.0f} kB"
        )
        for task, speeds in sizes["images_per_second"].items():
            chosen = {"train": OURS, "eval": OURS_EVAL}.get(task)
            rows = []
            for name, speed in speeds.items():
                cells = [name, f"{speed:.0f}"]
                if name == chosen:
                    cells = [f"**{cell}**" for cell in cells]
                if task == "eval":
                    cells.append("{}, {:.2f}".format(*sizes["difference"][name]))
                rows.append(cells)
            header = (task, "images/s", "difference") if task == "eval" else (task, "images/s")
            parts.append(format_table(header, rows))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    data_dir, count, repetitions = flags.FLAGS.data_dir, flags.FLAGS.photos, flags.FLAGS.repetitions
    source: Source
    if data_dir and os.path.isdir(os.path.join(data_dir, "train")):
        source = FolderSource(data_dir, "train")
    else:
        source = TfdsSource("imagenet2012", "train", data_dir)
    originals = [source[i * len(source) // count].image for i in range(count)]
    cv2.setNumThreads(1)
    sizes = []
    for short_side in SHORT_SIDES:
        files = [enlarged(data, short_side) for data in originals] if short_side else originals
        shapes = [simplejpeg.decode_jpeg_header(data)[:2] for data in files]
        tasks = candidates()
        speeds = {task: measure(functions, files, repetitions) for task, functions in tasks.items()}
        name = f"enlarged to a shorter side of {short_side}" if short_side else "as they are"
        sizes.append(
            {
                "name": name,
                "height": statistics.mean(height for height, _ in shapes),
                "width": statistics.mean(width for _, width in shapes),
                "kilobytes": statistics.mean(len(data) for data in files) / 1000,
                "images_per_second": speeds,
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
    timing.write("decoders", results, as_markdown(results))


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", None, "TFDS folder or folder tree; by default TFDS_DATA_DIR.")
    flags.DEFINE_integer("photos", 48, "Number of photos.", lower_bound=1)
    flags.DEFINE_integer("repetitions", 7, "Passes over them.", lower_bound=1)
    app.run(main)
