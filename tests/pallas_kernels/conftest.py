"""Random inputs: of a seed for each test by default, or new ones."""

import secrets
import zlib

import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest):
    """A generator whose seed is a function of the test's name, or with --fresh-seeds a new one in each run."""
    fresh = request.config.getoption("--fresh-seeds")
    seed = secrets.randbits(32) if fresh else zlib.crc32(request.node.name.encode())
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)
