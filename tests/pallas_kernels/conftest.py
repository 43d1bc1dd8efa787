"""Fresh random inputs."""

import secrets

import numpy as np
import pytest


@pytest.fixture
def rng():
    """A generator with a new seed in each run."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)
