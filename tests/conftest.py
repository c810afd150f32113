"""Set before jax is imported anywhere: tests run on the CPU, as eight devices, so that meshes can be tried."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
