"""Eight virtual devices for the sharding tests, which must be said before jax starts; data and environment of the long runs."""

import os

import pytest

_COUNT = "--xla_force_host_platform_device_count"

if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """40 photos to train on and 16 to evaluate on in four classes, as a folder tree; one of each cannot be read."""
    import numpy as np
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for label in range(4):
            folder = root / split / f"n{label:02d}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(
                    folder / f"{index}.JPEG"
                )
        (root / split / "n00" / "0.JPEG").write_bytes(b"no photo")
    return root


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One device; what one process compiles the next ones read."""
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
