"""jaxinfer: an inference runtime for JAX and XLA."""

from jaxinfer import errors
from jaxinfer.api import Generated, generate, init_inference
from jaxinfer.config import CacheConfig, EngineConfig, ParallelConfig, QuantizationConfig, SamplingParams
from jaxinfer.engine import Engine
from jaxinfer.loading import load_model
from jaxinfer.models import Decoder, ModelConfig
from jaxinfer.placement import place
from jaxinfer.requests import GenerationResult, ScoreResult, TokenLogprob

__all__ = [
    "CacheConfig",
    "Decoder",
    "Engine",
    "EngineConfig",
    "Generated",
    "GenerationResult",
    "ModelConfig",
    "ParallelConfig",
    "QuantizationConfig",
    "SamplingParams",
    "ScoreResult",
    "TokenLogprob",
    "errors",
    "generate",
    "init_inference",
    "load_model",
    "place",
]
