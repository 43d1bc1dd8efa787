"""What several rooms of tests share: eight CPU devices, a compilation cache that is not the user's, the real model."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import psutil
import pytest

# before any test starts the backend; a mesh takes as many as it needs
jax.config.update("jax_num_cpu_devices", 8)

# a shell that starts the tests in the background lets them ignore SIGINT, and so would every child that a test interrupts
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of a process that tests, until it lets go of what it has compiled. XLA maps some twenty pieces of memory a program, 36,000 for those of
# test_meshes.py; past the kernel's vm.max_map_count, 65,530 unless set, it dies by SIGSEGV where it writes the next one to the cache.
MOST_BYTES, MOST_MAPS = 3 << 30, 10_000
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_addoption(parser):
    parser.addoption("--golden", metavar="DIR", help="golden cases of this folder instead of tests/golden")
    parser.addoption("--fresh-seeds", action="store_true", help="random inputs of kernels that were never tried before")


lost = pytest.StashKey[bool]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    if error:
        node.config.stash[lost] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """pytest-xdist calls it a success where a worker dies between tests, or before the first."""
    if session.config.stash.get(lost, False) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled programs are shared by all tests, in JAX_COMPILATION_CACHE_DIR where that is set; never in the user's folder."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_go() -> Iterator[None]:
    """A quarter of an hour of slow tests leaves gigabytes of programs that no further test runs."""
    yield
    maps = Path("/proc/self/maps")  # of Linux
    if psutil.Process().memory_info().rss > MOST_BYTES or (maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS):
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rough_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slow tests compile for the CPU with few of LLVM's passes, in two thirds of the time; quick ones beside them as users do."""
    slow = request.node.get_closest_marker("slow") is not None
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or slow)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model: from JAXINFER_TEST_GGUF, or as scripts/demo.sh leaves it in the user's cache folder."""
    if given := os.environ.get("JAXINFER_TEST_GGUF"):
        path = Path(given)
        assert path.is_file(), f"JAXINFER_TEST_GGUF={given} is not a file"
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer"
    found = sorted(cache.rglob(SMOLLM2)) if cache.is_dir() else []
    assert found, f"{SMOLLM2} is not under {cache}: run scripts/demo.sh once, or point JAXINFER_TEST_GGUF to the file"
    return found[0]
