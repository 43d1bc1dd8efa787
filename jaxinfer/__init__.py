"""jaxinfer: an inference runtime for JAX and XLA.

Names are imported when they are first used, so that what needs no jax (fetching, `--help`) does not wait for it.
"""

import importlib

_HOMES = {
    "api": ("Generated", "generate", "init_inference"),
    "config": ("CacheConfig", "EngineConfig", "ParallelConfig", "QuantizationConfig"),
    "engine": ("Engine",),
    "loading": ("load_model",),
    "models": ("Decoder", "ModelConfig"),
    "placement": ("place",),
    "requests": ("GenerationResult", "ScoreResult", "TokenLogprob"),
    "sampling_params": ("SamplingParams",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["errors", *sorted(_HOME)]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"jaxinfer.{_HOME[name]}"), name)
    if name == "errors":
        return importlib.import_module("jaxinfer.errors")
    raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
