# What jaxinfer/__init__.py imports when it is asked for, for type checkers and editors.

from jaxinfer import errors as errors
from jaxinfer.api import Generated as Generated
from jaxinfer.api import generate as generate
from jaxinfer.api import init_inference as init_inference
from jaxinfer.config import CacheConfig as CacheConfig
from jaxinfer.config import EngineConfig as EngineConfig
from jaxinfer.config import ParallelConfig as ParallelConfig
from jaxinfer.config import QuantizationConfig as QuantizationConfig
from jaxinfer.engine import Engine as Engine
from jaxinfer.loading import load_model as load_model
from jaxinfer.models import Decoder as Decoder
from jaxinfer.models import ModelConfig as ModelConfig
from jaxinfer.placement import place as place
from jaxinfer.requests import GenerationResult as GenerationResult
from jaxinfer.requests import ScoreResult as ScoreResult
from jaxinfer.requests import TokenLogprob as TokenLogprob
from jaxinfer.sampling_params import SamplingParams as SamplingParams

__all__: list[str]
