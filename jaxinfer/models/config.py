"""ModelConfig: everything about an architecture that is fixed when a model is built, composed of small frozen parts.

Fields that came later have the value that models had before as a default: checkpoints store the configuration by field name.
"""

import dataclasses
from typing import Any

from jaxinfer.models.positions import RopeConfig
from pallas_kernels.norm import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """heads N, kv_heads K (N a multiple of K), head_dim H. bias: on q, k and v; output_bias: on the output. scale: of the scores.
    rope: None where heads are not rotated. qk_norm: a norm of each head of q and k before that. soft_cap: of the scores, or None. integer:
    what is multiplied are 8-bit levels, a choice of `quantization.attention_bits` and not of the architecture."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None
    bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    soft_cap: float | None = None
    integer: bool = False

    def __post_init__(self):
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.kv_heads} kv heads")
        _check_soft_cap("the scores' soft cap", self.soft_cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """width F. activation: see pallas_kernels.mlp_block. gated: act(gate) * up, else act(up). bias: on every matrix."""

    width: int
    activation: str
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """experts E gated MLPs of `width` without biases, of which a router chooses `used` for each token. normalise: the weights of those
    add up to one, else they are shares of the softmax over all experts. layers: that have them, in order; others have the dense MLP."""

    experts: int
    used: int
    width: int
    normalise: bool
    layers: tuple[int, ...]

    def __post_init__(self):
        if not 1 <= self.used <= self.experts:
            raise ValueError(f"{self.used} experts of a token, there are {self.experts}; give at least 1 and at most all")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers with experts are {self.layers}; give their numbers in order, at least one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. vocab V, embed D, layers L. tied: the head is the embedding. max_positions: tokens the model was made for.

    norm: kind of all norms, one of `pallas_kernels.norm.KINDS`; a layer norm has a bias. post_norms: each half layer's result is normed
    before it is added. windows: keys that a query of each layer sees, its own among them, None for all; () where no layer has a
    window. embed_scale: factor on embeddings. learned_positions: a table of max_positions rows is added to the embeddings.
    soft_cap: of the logits, or None. moe: experts, which some layers or all have in place of the MLP, or None. Raises ValueError.
    """

    family: str
    vocab: int
    embed: int
    layers: int
    attention: AttentionConfig
    mlp: MLPConfig
    norm_eps: float
    tied: bool
    max_positions: int
    norm: str = "rms"
    post_norms: bool = False
    windows: tuple[int | None, ...] = ()
    embed_scale: float = 1.0
    learned_positions: bool = False
    soft_cap: float | None = None
    moe: MoEConfig | None = None

    def __post_init__(self):
        if self.norm not in KINDS:
            raise ValueError(f"norm {self.norm!r} is not one of {KINDS}")
        if self.norm == "layer" and self.post_norms:
            raise ValueError("norms after half a layer have no bias; norm 'layer' with post_norms is not supported")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows for {self.layers} layers; give one a layer, or none")
        if bad := [w for w in self.windows if w is not None and w < 1]:
            raise ValueError(f"a window of {bad[0]} keys; give at least 1, or None for all")
        _check_soft_cap("the logits' soft cap", self.soft_cap)
        if self.moe is not None:
            if self.moe.layers[-1] >= self.layers:
                raise ValueError(f"layer {self.moe.layers[-1]} has experts, but there are {self.layers} layers, from 0 on")
            if self.norm == "layer" or not self.mlp.gated or self.mlp.bias:
                raise ValueError(
                    "experts are gated MLPs without biases after a root-mean-square norm; other ones are not supported"
                )

    def kind(self, layer: int) -> str:
        """What a layer has after its attention: "moe" or "dense". Layers of one kind have parameters of the same shapes."""
        return "moe" if self.moe is not None and layer in self.moe.layers else "dense"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`. Raises TypeError for a missing or unknown field."""
        values = _with_tuples(values)
        attention, mlp = dict(values.pop("attention")), MLPConfig(**values.pop("mlp"))
        stored = attention.pop("rope")
        rope = None if stored is None else RopeConfig(**_with_tuples(stored))
        moe = values.pop("moe", None)
        moe = None if moe is None else MoEConfig(**_with_tuples(moe))
        return cls(attention=AttentionConfig(rope=rope, **attention), mlp=mlp, moe=moe, **values)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists; what is compared and hashed here are tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _check_soft_cap(what: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{what} is {value}; give a positive number, or None for none")
