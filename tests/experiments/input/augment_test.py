"""Image arithmetic on the device, against Pillow and numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.input import augment
from PIL import Image, ImageEnhance

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class TestPreprocess:
    batch = np.random.default_rng(0).integers(0, 256, (3, 20, 16, 3)).astype(np.uint8)

    def pixels(self, factors):
        """Undoes the normalisation."""
        batch = {"image": self.batch, "jitter": np.tile(np.float32(factors), (3, 1))}
        return np.asarray(jax.jit(augment.preprocess)(batch)) * STD + MEAN

    def test_normalisation(self):
        expected = (self.batch / 255.0 - MEAN) / STD
        np.testing.assert_allclose(augment.preprocess({"image": self.batch}), expected, atol=1e-5)
        assert augment.preprocess({"image": self.batch}, jnp.bfloat16).dtype == jnp.bfloat16

    def test_factors_of_one_change_nothing(self):
        np.testing.assert_allclose(self.pixels([1, 1, 1]), self.batch / 255, atol=1e-6)

    @pytest.mark.parametrize("factor", [0.8, 1.2])
    @pytest.mark.parametrize(
        ("place", "enhance"),
        [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)],
    )
    def test_each_factor_matches_pillow(self, place, enhance, factor):
        factors = [1.0, 1.0, 1.0]
        factors[place] = factor
        expected = [
            np.asarray(enhance(Image.fromarray(image)).enhance(factor)) for image in self.batch
        ]
        # Pillow rounds greys and truncates results.
        np.testing.assert_allclose(255 * self.pixels(factors), expected, atol=1.3)

    def test_three_factors_per_image(self):
        factors = np.float32([[0.8, 1.2, 1.1], [1.2, 0.8, 0.85], [1.1, 1.15, 1.2]])
        actual = augment.preprocess({"image": self.batch, "jitter": factors})
        for image, (brightness, contrast, saturation), result in zip(
            self.batch, factors.astype(float), actual, strict=True
        ):
            x = np.clip(image / 255 * brightness, 0, 1)
            mean = (0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]).mean()
            x = np.clip(contrast * x + (1 - contrast) * mean, 0, 1)
            grey = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
            x = np.clip(saturation * x + (1 - saturation) * grey[..., None], 0, 1)
            np.testing.assert_allclose(result, (x - MEAN) / STD, atol=2e-5)


def test_random_crop_and_flip():
    """Against slicing and mirroring in numpy, trying all positions."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 6, 5, 3)).astype(np.float32)
    cropped, again = (
        np.asarray(augment.random_crop_and_flip(jnp.asarray(images), jax.random.key(1), padding=2))
        for _ in range(2)
    )
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = []
    for image, result in zip(padded, cropped, strict=True):
        places = [
            (top, left, step)
            for top, left, step in itertools.product(range(5), range(5), (1, -1))
            if np.array_equal(image[top : top + 6, left : left + 5][:, ::step], result)
        ]
        assert len(places) == 1
        found += places
    tops, lefts, steps = zip(*found, strict=True)
    assert set(tops) == set(lefts) == set(range(5))
    assert 16 < steps.count(-1) < 48
    np.testing.assert_array_equal(cropped, again)
