"""Decoding, cropping and resizing, against Pillow."""

import io
import math
import zlib

import numpy as np
import pytest
from common.input import decode
from PIL import Image


def smooth_image(height, width, seed=0):
    """A photo-like image: enlarged noise of 6 x 5 pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, image_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **({"quality": 95} if image_format == "JPEG" else {}), **options)
    return file.getvalue()


def torchvision_eval(data, resize, size):
    """Resizes and crops as torchvision does on a Pillow image."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short, long = sorted(image.size)
    new_long = int(resize * long / short)
    width, height = (resize, new_long) if image.width <= image.height else (new_long, resize)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = int(round((height - size) / 2.0)), int(round((width - size) / 2.0))  # noqa: RUF046, as there
    return np.asarray(image.crop((left, top, left + size, top + size)))


class TestDecode:
    @pytest.mark.parametrize(
        ("mode", "image_format", "options"),
        [
            ("RGB", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True}),
            ("RGB", "JPEG", {"subsampling": 0}),
            ("L", "JPEG", {}),
            ("CMYK", "JPEG", {}),
            ("RGB", "PNG", {}),
            ("RGBA", "PNG", {}),
            ("LA", "PNG", {}),
            ("P", "PNG", {}),
            ("P", "PNG", {"transparency": 3}),
            ("1", "PNG", {}),
        ],
    )
    def test_reads_every_kind_of_file_as_pillow_does(self, mode, image_format, options):
        data = encode(smooth_image(60, 90).convert(mode), image_format, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        actual = decode.decode_rgb(data)
        assert actual.dtype == np.uint8
        np.testing.assert_allclose(actual.astype(int), expected, atol=2 if mode == "CMYK" else 0)

    def test_ignores_exif_orientation(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        image = smooth_image(60, 90)
        np.testing.assert_array_equal(
            decode.decode_rgb(encode(image, exif=exif)), decode.decode_rgb(encode(image))
        )

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"no image",
            b"\xff\xd8" + bytes(500),
            encode(smooth_image(60, 90))[:200],
            encode(smooth_image(60, 90))[:-300],
            encode(smooth_image(60, 90), "PNG")[:-3000],
            encode(smooth_image(60, 90), "PNG")[:20],
            encode(smooth_image(60, 90), "BMP")[:60],
        ],
        ids=[
            "empty",
            "text",
            "zeros",
            "half a header",
            "truncated",
            "truncated PNG",
            "PNG header",
            "truncated BMP",
        ],
    )
    def test_damage_raises_one_kind_of_error(self, data):
        with pytest.raises(decode.UnreadableImageError):
            decode.decode_train(data, np.random.default_rng(0), 32)
        with pytest.raises(decode.UnreadableImageError):
            decode.decode_eval(data, 40, 32)

    def test_rejects_too_many_pixels_before_decoding(self, monkeypatch):
        monkeypatch.setattr(decode, "MAX_PIXELS", 60 * 90 - 1)
        monkeypatch.setattr(decode, "decode_rgb", None)
        with pytest.raises(decode.UnreadableImageError, match="90 x 60"):
            decode.decode_eval(encode(smooth_image(60, 90)))

    def test_rejects_scans_without_end_before_decoding(self, monkeypatch):
        """400 kB of them took half a minute."""
        data = encode(smooth_image(2000, 3000), progressive=True)
        assert decode._image_shape(data) == (2000, 3000)
        last = data[data.rindex(decode._SCAN) : -2]
        monkeypatch.setattr(decode, "decode_rgb", None)
        for read in (decode.decode_eval, lambda data: decode.decode_train(data, None)):
            with pytest.raises(decode.UnreadableImageError, match="scans of 3000 x 2000"):
                read(data[:-2] + 600 * last + data[-2:])
        photo_with_a_film = data + np.random.default_rng(0).bytes(1 << 20)
        assert decode._image_shape(photo_with_a_film) == (2000, 3000)

    @pytest.mark.parametrize("image_format", ["EPS", "BMP", "TIFF"])
    def test_other_formats_are_unreadable(self, image_format):
        with pytest.raises(decode.UnreadableImageError, match="cannot identify"):
            decode.decode_rgb(encode(smooth_image(20, 30), image_format))

    def test_an_image_without_pixels(self):
        data = bytearray(encode(smooth_image(20, 30), "PNG"))
        data[16:20] = bytes(4)  # its width
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        for read in (decode.decode_eval, lambda data: decode.decode_train(data, None)):
            with pytest.raises(decode.UnreadableImageError):
                read(bytes(data))

    def test_grey_of_16_bits_keeps_the_upper_eight(self):
        """As Pillow does for 16 bits per colour; `convert` alone saturates all above 255."""
        grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
        expected = np.broadcast_to((grey >> 8)[..., None], (64, 64, 3))
        actual = decode.decode_rgb(encode(Image.fromarray(grey), "PNG"))
        assert actual.dtype == np.uint8
        np.testing.assert_array_equal(actual, expected)

    def test_scaled_image_is_not_too_small(self):
        data = encode(smooth_image(400, 600))
        for shrink, shape in [
            (0.1, (400, 600, 3)),
            (1.99, (400, 600, 3)),
            (2, (200, 300, 3)),
            (3.9, (200, 300, 3)),
            (99, (50, 75, 3)),
        ]:
            assert decode.decode_rgb(data, shrink).shape == shape
        small = np.asarray(smooth_image(400, 600).resize((150, 100), Image.Resampling.BILINEAR))
        assert np.abs(decode.decode_rgb(data, 4).astype(int) - small).mean() < 2
        assert decode.decode_rgb(encode(smooth_image(401, 599)), 2).shape == (201, 300, 3)


class TestEval:
    @pytest.mark.parametrize(
        "shape",
        [
            (300, 400),
            (401, 300),
            (256, 256),
            (288, 433),
            (100, 130),
            (700, 1001),
            (40, 600),
            (511, 257),
        ],
    )
    def test_pixels_equal_torchvision(self, shape):
        data = encode(smooth_image(*shape))
        actual = decode.decode_eval(data)
        assert actual.dtype == np.uint8
        np.testing.assert_array_equal(actual, torchvision_eval(data, 256, 224))

    @pytest.mark.parametrize("shape", [(1, 65000), (20000, 1), (1, 3000), (7, 60000)])
    def test_rejects_strips_before_decoding(self, shape, monkeypatch):
        """Resized to 256 pixels, 65000 x 1 would be 4 billion pixels."""
        data = encode(Image.new("RGB", shape[::-1]))
        assert decode.decode_train(data, np.random.default_rng(0)).shape == (224, 224, 3)
        monkeypatch.setattr(decode, "decode_rgb", None)
        with pytest.raises(decode.UnreadableImageError, match=f"{shape[1]} x {shape[0]}, resized"):
            decode.decode_eval(data)

    def test_rejects_crop_larger_than_image(self):
        with pytest.raises(ValueError, match="224"):
            decode.decode_eval(encode(smooth_image(60, 90)), resize=200, size=224)


class TestRandomCrop:
    def test_boxes_are_inside_and_in_range(self):
        rng = np.random.default_rng(0)
        height, width = 600, 800
        boxes = np.array([decode.random_crop(height, width, rng) for _ in range(4000)])
        top, left, crop_height, crop_width = boxes.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + crop_height <= height).all()
        assert (left + crop_width <= width).all()
        area, ratio = crop_height * crop_width / (height * width), crop_width / crop_height
        assert 0.079 < area.min() < 0.085
        assert 0.95 < area.max() <= 1
        assert 0.745 < ratio.min() < 0.76
        assert 1.32 < ratio.max() < 1.34
        for place in (top / (height - crop_height).clip(1), left / (width - crop_width).clip(1)):
            assert abs(place[area < 0.5].mean() - 0.5) < 0.02

    def test_small_boxes_are_uniform_in_area_and_log_ratio(self):
        rng = np.random.default_rng(1)
        boxes = np.array([decode.random_crop(1000, 1000, rng) for _ in range(8000)])
        area = boxes[:, 2] * boxes[:, 3] / 1e6
        small = boxes[area < 0.56]  # below 0.5625 = 0.75² / 1 every ratio fits
        quartiles = np.quantile(area[area < 0.56], [0.25, 0.5, 0.75])
        np.testing.assert_allclose(quartiles, [0.2, 0.32, 0.44], atol=0.015)
        logs = np.quantile(np.log(small[:, 3] / small[:, 2]) / math.log(4 / 3), [0.25, 0.5, 0.75])
        np.testing.assert_allclose(logs, [-0.5, 0, 0.5], atol=0.05)

    @pytest.mark.parametrize(
        ("height", "width", "expected"),
        [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 3000, (0, 1499, 1, 1))],
    )
    def test_strip_gets_central_crop(self, height, width, expected):
        assert decode.random_crop(height, width, np.random.default_rng(0)) == expected


class TestTrain:
    @pytest.mark.parametrize(
        "shape", [(300, 400), (900, 1200), (64, 48), (30, 40), (7, 400), (1, 1)]
    )
    def test_crop_is_close_to_pillows(self, shape):
        data = encode(smooth_image(*shape))
        full = Image.open(io.BytesIO(data))
        for seed in range(5):
            actual = decode.decode_train(data, np.random.default_rng(seed), 64)
            rng = np.random.default_rng(seed)
            top, left, height, width = decode.random_crop(*shape, rng)
            box = (left, top, left + width, top + height)
            expected = np.asarray(full.crop(box).resize((64, 64), Image.Resampling.BILINEAR))
            if rng.random() < 0.5:
                expected = expected[:, ::-1]
            assert actual.shape == (64, 64, 3)
            assert actual.dtype == np.uint8
            # The filter differs; a wrong box or flip gives 20 and more.
            assert np.abs(actual.astype(int) - expected).mean() < 3

    def test_half_of_the_images_are_flipped(self):
        ramp = np.broadcast_to(np.arange(0, 240, 3, dtype=np.uint8)[None, :, None], (60, 80, 3))
        data = encode(Image.fromarray(np.ascontiguousarray(ramp)))
        rng = np.random.default_rng(0)
        falls = [
            np.subtract(*decode.decode_train(data, rng, 16).mean(axis=(0, 2))[[0, -1]]) > 0
            for _ in range(400)
        ]
        assert 0.42 < np.mean(falls) < 0.58
