"""From a photo's file to the pixels a network is given, on the host: decoding, cropping, resizing.

`experiments/benchmarks` holds the measurements behind the choice of libraries: simplejpeg
(libjpeg-turbo) decodes, at a reduced size where the crop is to be shrunk by two or more; Pillow
reads what simplejpeg cannot, and resizes for evaluation, so that those pixels are torchvision's;
OpenCV, which is faster, resizes for training.
"""

import contextlib
import io
import math
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 178_956_970  # Pillow's own limit: a larger image is taken for an attack, or damage

_AREA = (0.08, 1.0)  # of the image, that a random crop covers
_RATIO = (3 / 4, 4 / 3)  # width over height of a random crop

cv2.setNumThreads(1)  # the worker processes are what runs in parallel


class UnreadableImageError(Exception):
    """The bytes are no image that can be decoded in full."""


def decode_train(data: bytes, rng: np.random.Generator, size: int = 224) -> np.ndarray:
    """A random crop of random size and shape, resized to a square, and flipped half of the time.

    Args:
      data: a JPEG or PNG file.
      rng: decides crop and flip; how the image is decoded does not change what is drawn.
      size: of the square, pixels.

    Returns:
      RGB, shape=(size, size, 3), dtype=uint8.

    Raises:
      UnreadableImageError: if the data are truncated, damaged or no image.
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
    shrinks = min(crop.shape[:2]) >= size
    resized = cv2.resize(
        crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return np.ascontiguousarray(resized[:, ::-1]) if flip else resized


def decode_eval(data: bytes, resize: int = 256, size: int = 224) -> np.ndarray:
    """The centre square of the image whose shorter side was resized to `resize`: bilinear,
    antialiased, as torchvision on Pillow.

    Args:
      data: a JPEG or PNG file.
      resize: the shorter side, pixels.
      size: of the square, pixels, at most `resize`.

    Returns:
      RGB, shape=(size, size, 3), dtype=uint8.

    Raises:
      UnreadableImageError: if the data are truncated, damaged or no image.
      ValueError: if the square is larger than the resized image.
    """
    if size > resize:
        raise ValueError(f"cannot cut {size} pixels out of {resize}")
    _image_shape(data)
    pixels = decode_rgb(data)
    height, width = pixels.shape[:2]
    new_height, new_width = (
        resize * height // min(height, width),
        resize * width // min(height, width),
    )
    resized = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def random_crop(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of 8 to 100% of the area, 3:4 to 4:3: torchvision's RandomResizedCrop.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      rng: decides.

    Returns:
      Top, left, height and width. If ten boxes in turn did not fit, the largest central one with an
      allowed ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*_AREA)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    crop_height, crop_width = (
        min(height, round(width / _RATIO[0])),
        min(width, round(height * _RATIO[1])),
    )
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def decode_rgb(data: bytes, shrink: float = 1) -> np.ndarray:
    """Pixels of a JPEG or PNG file; CMYK, greyscale, palettes and transparency become RGB, EXIF
    orientation is ignored.

    Args:
      data: the file.
      shrink: a JPEG may be decoded to a half, a quarter or an eighth of its size, as far as that is
        not less than 1 / `shrink`.

    Returns:
      shape=(height, width, 3), dtype=uint8.

    Raises:
      UnreadableImageError: if the data are truncated, damaged or no image.
    """
    factor = max(
        power for power in (1, 2, 4, 8) if power <= max(shrink, 1)
    )  # libjpeg-turbo is slow at other factors
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=math.ceil(height / factor), min_width=math.ceil(width / factor)
        )
    except ValueError:  # no JPEG, or one with a blemish that Pillow may forgive
        with _open(data) as image:
            return np.asarray(image.convert("RGB"))


def _image_shape(data: bytes) -> tuple[int, int]:
    """Height and width, from the header alone."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        with _open(data) as image:
            width, height = image.size
    if height * width > MAX_PIXELS:
        raise UnreadableImageError(f"{width} x {height} pixels are too many")
    return height, width


@contextlib.contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Pillow's image, and one kind of error for all that goes wrong with it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImageError(str(error)) from error
