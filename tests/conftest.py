"""Eight virtual devices for the sharding tests; must be said before jax starts."""

import os

_COUNT = "--xla_force_host_platform_device_count"

if _COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()
