"""Eight virtual devices and one compilation cache for all tests; what the long runs need."""

import os
import shutil
import tempfile

import hypothesis
import pytest

# No test depends on how fast the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

_COUNT = "--xla_force_host_platform_device_count"
_CACHE = "JAX_COMPILATION_CACHE_DIR"

# All of this must be set before JAX starts, and workers and subprocesses inherit it.
if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_configure(config):
    """Makes a compilation cache, which xdist's workers find in their environment."""
    if _CACHE not in os.environ:
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Folders of 40 training and 16 validation photos, four classes; one in each is unreadable."""
    import numpy as np
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for label in range(4):
            folder = root / split / f"n{label:02d}"
            folder.mkdir(parents=True)
            for index in range(count):
                image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
                image.save(folder / f"{index}.JPEG")
        (root / split / "n00" / "0.JPEG").write_bytes(b"no photo")
    return root


@pytest.fixture(scope="session")
def environment():
    """The environment of a subprocess: one CPU device, and the tests' compilation cache."""
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
