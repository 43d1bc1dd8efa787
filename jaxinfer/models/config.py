"""ModelConfig: everything about an architecture that is fixed when a model is built, composed of small frozen parts."""

import dataclasses
from typing import Any

from jaxinfer.models.positions import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """heads N, kv_heads K (N a multiple of K), head_dim H. bias: on q, k and v; output_bias: on the output. scale: of the scores."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig
    bias: bool = False
    output_bias: bool = False

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.kv_heads} kv heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """width F. activation: see pallas_kernels.mlp_block. gated: act(gate) * up, else act(up). bias: on every matrix."""

    width: int
    activation: str
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. vocab V, embed D, layers L. tied: the head is the embedding. max_positions: tokens the model was made for."""

    family: str
    vocab: int
    embed: int
    layers: int
    attention: AttentionConfig
    mlp: MLPConfig
    norm_eps: float
    tied: bool
    max_positions: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`. Raises TypeError for a missing or unknown field."""
        values = dict(values)
        attention = dict(values.pop("attention"))
        rope_values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in attention.pop("rope").items()}
        rope = RopeConfig(**rope_values)
        return cls(attention=AttentionConfig(rope=rope, **attention), mlp=MLPConfig(**values.pop("mlp")), **values)
