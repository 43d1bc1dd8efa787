"""XLA's persistent compilation cache, so that a second start does not compile again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxinfer.demo import cache_dir


def use_compilation_cache(folder: str | Path | bool | None) -> None:
    """Keep compiled programs in `folder`; None is the user's cache folder, False (or a cache that is set already) leaves jax alone."""
    if folder is False or jax.config.jax_compilation_cache_dir:
        return
    path = Path(folder).expanduser() if isinstance(folder, str | Path) else cache_dir() / "xla"
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """While inside, nothing in this process is read from the persistent cache or written to it."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether it is used is looked up once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
