"""Turns a photo's file into the network's pixels, on the host: decoding, cropping, resizing.

`experiments/benchmarks/decoders.py` measures the choice of libraries. simplejpeg (libjpeg-turbo)
decodes, at a reduced size if the crop is to be shrunk by two or more. Pillow reads what simplejpeg
cannot, and resizes for evaluation, so that those pixels are torchvision's. OpenCV, which is faster,
resizes for training.

What a stranger's file can cost is bounded by `MAX_PIXELS`, of the image and of the resized one, and
by `MAX_SCANNED`. What exceeds a bound is unreadable.
"""

import contextlib
import io
import math
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 178_956_970  # Pillow's limit: a larger image is an attack or damaged
MAX_SCANNED = 20 * MAX_PIXELS  # pixels times scans: a progressive JPEG usually has ten of these

_FORMATS = ("JPEG", "PNG")  # of all others, Pillow runs Ghostscript for one
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"  # how a file begins, and each scan in it

_AREA = (0.08, 1.0)  # of a random crop, as a share of the image's
_RATIO = (3 / 4, 4 / 3)  # of a random crop, width over height

cv2.setNumThreads(1)  # worker processes run in parallel instead


class UnreadableImageError(Exception):
    """The bytes are not an image that can be decoded completely."""


def decode_train(data: bytes, rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """Takes a random crop, resizes it to a square and flips it half of the time.

    Args:
      data: a JPEG or PNG file.
      rng: decides crop and flip, however the image is decoded.
      size: of the square, pixels.

    Returns:
      RGB, shape=(size, size, 3), dtype=uint8.

    Raises:
      UnreadableImageError: if the data are truncated, damaged or not an image.
    """
    height, width = _image_shape(data)
    top, left, crop_height, crop_width = random_crop(height, width, rng)
    flip = rng.random() < 0.5
    pixels = decode_rgb(data, min(crop_height, crop_width) / size)
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    crop = pixels[
        round(top * down) : round((top + crop_height) * down),
        round(left * across) : round((left + crop_width) * across),
    ]
    method = cv2.INTER_AREA if min(crop.shape[:2]) >= size else cv2.INTER_LINEAR
    resized = cv2.resize(crop, (size, size), interpolation=method)
    return np.ascontiguousarray(resized[:, ::-1]) if flip else resized


def decode_eval(data: bytes, resize: int = 256, size: int = 224) -> np.ndarray:
    """Resizes the shorter side, then takes the centre square: torchvision's transforms on Pillow.

    The filter is bilinear and antialiased.

    Args:
      data: a JPEG or PNG file.
      resize: the shorter side, pixels.
      size: of the square, pixels; at most `resize`.

    Returns:
      RGB, shape=(size, size, 3), dtype=uint8.

    Raises:
      UnreadableImageError: if the data are truncated, damaged or not an image, or if the resized
        image would have more than `MAX_PIXELS`, as that of a strip of 3000 x 1 pixels has.
      ValueError: if the square is larger than the resized image.
    """
    if size > resize:
        raise ValueError(f"cannot cut {size} pixels out of {resize}")
    height, width = _image_shape(data)
    short = min(height, width)
    new_height, new_width = resize * height // short, resize * width // short
    _check_pixels(new_height, new_width, f"{width} x {height}, resized to ")
    pixels = decode_rgb(data)
    resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def random_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws a box of 8 to 100% of the area, 3:4 to 4:3, as torchvision's RandomResizedCrop does.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      rng: decides.

    Returns:
      Top, left, height and width; after ten boxes that do not fit, those of the largest central box
      with an allowed ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    crop_height = min(height, round(width / _RATIO[0]))
    crop_width = min(width, round(height * _RATIO[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def decode_rgb(data: bytes, shrink: float = 1) -> np.ndarray:
    """Decodes a JPEG or PNG file; converts any colour mode to RGB, ignores EXIF orientation.

    Of 16 bits per channel the upper eight are kept, in grey as Pillow does it in colour.

    Args:
      data: the file.
      shrink: a JPEG may be decoded at a half, a quarter or an eighth of its size if that is at
        least 1 / `shrink`.

    Returns:
      shape=(height, width, 3), dtype=uint8.

    Raises:
      UnreadableImageError: if the data are truncated, damaged or not an image.
    """
    # libjpeg-turbo is slow at other factors.
    factor = max(power for power in (1, 2, 4, 8) if power <= max(shrink, 1))
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=math.ceil(height / factor), min_width=math.ceil(width / factor)
        )
    except ValueError:  # not a JPEG, or one with a flaw that Pillow may tolerate
        with _open(data) as image:
            if image.mode.startswith("I"):  # grey of 16 bits, which convert("RGB") saturates
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[..., np.newaxis], 3, axis=-1)
            return np.asarray(image.convert("RGB"))


def _image_shape(data: bytes) -> tuple[int, int]:
    """Reads height and width from the header alone."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        with _open(data) as image:
            width, height = image.size
    _check_pixels(height, width)
    scans = data.count(_SCAN) if data.startswith(_JPEG) else 1
    if scans * height * width > MAX_SCANNED:
        raise UnreadableImageError(f"{scans} scans of {width} x {height} pixels are too many")
    return height, width


def _check_pixels(height: int, width: int, which: str = "") -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise UnreadableImageError(
            f"{which}{width} x {height} pixels are not between 1 and {MAX_PIXELS}"
        )


@contextlib.contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Opens the image in Pillow, and turns every error into `UnreadableImageError`."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImageError(str(error)) from error
