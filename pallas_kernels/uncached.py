"""Compiling past the persistent cache: programs for devices that are not here, and those that are stored otherwise."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


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
