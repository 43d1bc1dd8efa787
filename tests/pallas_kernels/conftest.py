"""Random inputs: of a seed for each test by default, or new ones; and what the interpreter of Mosaic GPU kernels found."""

import secrets
import zlib

import numpy as np
import pytest

from pallas_kernels.cpu import build, library


@pytest.fixture
def rng(request: pytest.FixtureRequest):
    """A generator whose seed is a function of the test's name, or with --fresh-seeds a new one in each run."""
    fresh = request.config.getoption("--fresh-seeds")
    seed = secrets.randbits(32) if fresh else zlib.crc32(request.node.name.encode())
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


@pytest.fixture
def races(monkeypatch):
    """A function that says whether the last interpreted Mosaic GPU kernel had a race.

    jax 0.11.2 merges the clock of who arrives at a barrier after it has woken those who wait, who then may not know of the last arrival,
    and find a race that there is not: here it is merged before.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

    barrier = shared_memory.Barrier
    arrive = barrier.arrive

    def merged_first(self, thread, clock=None, logging_info=None):
        if clock is not None:
            with self.cv:
                if self.clock is None:
                    self.clock = clock.copy()
                else:
                    self.clock.update(clock)
        return arrive(self, thread, clock, logging_info)

    monkeypatch.setattr(barrier, "arrive", merged_first)
    return lambda: gpu_callbacks.get_races().races_found


@pytest.fixture(scope="session")
def native() -> library.Library:
    """The native kernels; without a compiler their tests are skipped."""
    found = library.load()  # raises where JAXINFER_REQUIRE_NATIVE asks for it
    if isinstance(found, str):
        try:
            build.compiler()
        except build.BuildError as error:
            pytest.skip(str(error))
        pytest.fail(found)
    return found
