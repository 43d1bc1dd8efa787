"""XLA's persistent compilation cache, so that a second start does not compile again."""

from pathlib import Path

import jax

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
