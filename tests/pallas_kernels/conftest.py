"""Eight CPU devices, so that operations can be split over a mesh, and fresh random inputs."""

import contextlib
import secrets

import jax
import numpy as np
import pytest

# a backend that an earlier test started keeps its devices; the tests that need several check how many there are
with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def rng():
    """A generator with a new seed in each run."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)
