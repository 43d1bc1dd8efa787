"""The blocks that models are made of: Flax NNX modules that hold parameters, and name their axes once.

The arithmetic is in `pallas_kernels`; a block only says which weights go in. `weights()` gives them as the pytree that the runtime
runs on, so that the module and the placed program share one forward pass.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.config import ModelConfig
from pallas_kernels.attention_block import AttentionWeights
from pallas_kernels.mlp_block import MLPWeights


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype) -> nnx.Param:
    """A weight [out, in], or a stack of them, normal with variance 1 / in. axes: logical names, see sharding.rules; None for one that is
    never split."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(shape[-1])
    return nnx.Param(value.astype(dtype), axes=axes)


def vector(fill: float, size: int, axis: str, dtype) -> nnx.Param:
    return nnx.Param(jnp.full((size,), fill, dtype), axes=(axis,))


def norm_scale(config: ModelConfig, size: int, axis: str) -> nnx.Param:
    """A norm's scale that multiplies by one."""
    return vector(0.0 if config.norm == "rms_offset" else 1.0, size, axis, jnp.float32)


class WeightBlock(nnx.Module):
    """A block whose parameters go into one half-layer operation."""

    @staticmethod
    def build(get: Callable[[str], Any]) -> Any:
        """The operation's weights, made of get(name) for every parameter name; None stands for a parameter that is absent."""
        raise TypeError("a block of its own says how its weights are built")

    def weights(self) -> Any:
        """The operation's weights as arrays and QTensors."""
        return self.build(lambda name: getattr(self, name).get_value() if hasattr(self, name) else None)

    def axes(self) -> dict[str, tuple[str, ...]]:
        """Logical axes of every parameter, by name."""
        return {n: p.get_metadata("axes") for n, p in vars(self).items() if isinstance(p, nnx.Param)}


def present(*values):
    return tuple(v for v in values if v is not None)


class Attention(WeightBlock):
    """Grouped-query self-attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        a, D = config.attention, config.embed
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        self.norm = norm_scale(config, D, "embed")
        if config.norm == "layer":
            self.norm_bias = vector(0.0, D, "embed", jnp.float32)
        self.q = matrix(rngs, (q, D), ("heads", "embed"), dtype)
        self.k = matrix(rngs, (kv, D), ("kv_heads", "embed"), dtype)
        self.v = matrix(rngs, (kv, D), ("kv_heads", "embed"), dtype)
        self.o = matrix(rngs, (D, q), ("embed", "heads"), dtype)
        if a.bias:
            self.q_bias = vector(0.0, q, "heads", jnp.float32)
            self.k_bias = vector(0.0, kv, "kv_heads", jnp.float32)
            self.v_bias = vector(0.0, kv, "kv_heads", jnp.float32)
        if a.output_bias:
            self.o_bias = vector(0.0, D, "embed", jnp.float32)
        if a.qk_norm:
            self.q_norm = norm_scale(config, a.head_dim, "head_dim")
            self.k_norm = norm_scale(config, a.head_dim, "head_dim")

    @staticmethod
    def build(get) -> AttentionWeights:
        return AttentionWeights(
            norm=get("norm"),
            norm_bias=get("norm_bias"),
            qkv=present(get("q"), get("k"), get("v")),
            qkv_bias=present(get("q_bias"), get("k_bias"), get("v_bias")),
            q_norm=get("q_norm"),
            k_norm=get("k_norm"),
            out=get("o"),
            out_bias=get("o_bias"),
        )


class MLP(WeightBlock):
    """Gated or plain MLP."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype=jnp.float32):
        D, F = config.embed, config.mlp.width
        self.norm = norm_scale(config, D, "embed")
        if config.norm == "layer":
            self.norm_bias = vector(0.0, D, "embed", jnp.float32)
        if config.mlp.gated:
            self.gate = matrix(rngs, (F, D), ("mlp", "embed"), dtype)
        self.up = matrix(rngs, (F, D), ("mlp", "embed"), dtype)
        self.down = matrix(rngs, (D, F), ("embed", "mlp"), dtype)
        if config.mlp.bias:
            if config.mlp.gated:
                self.gate_bias = vector(0.0, F, "mlp", jnp.float32)
            self.up_bias = vector(0.0, F, "mlp", jnp.float32)
            self.down_bias = vector(0.0, D, "embed", jnp.float32)

    @staticmethod
    def build(get) -> MLPWeights:
        return MLPWeights(
            norm=get("norm"),
            norm_bias=get("norm_bias"),
            up=present(get("gate"), get("up")),
            up_bias=present(get("gate_bias"), get("up_bias")),
            down=get("down"),
            down_bias=get("down_bias"),
        )
