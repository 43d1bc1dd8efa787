"""Model architectures: one decoder made of shared blocks, and a short file per family that says how to build it."""

from jaxinfer.models.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.positions import RopeConfig

__all__ = ["AttentionConfig", "Decoder", "MLPConfig", "MoEConfig", "ModelConfig", "RopeConfig"]
