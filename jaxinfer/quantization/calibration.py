"""What a model sees on a text: the inputs of its matrices, half a layer at a time.

Shapes: S sequences of T tokens in batches of B, D embed, I inputs of a matrix.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import LayerSpec, LayerWeights, attention_half, layer_spec, mlp_half, slot_window
from jaxinfer.models.positions import rope_angles
from pallas_kernels.errors import QuantizationError
from pallas_kernels.quant_matmul import reference
from pallas_kernels.registry import register, unregister, using
from sharding.context import ALONE

HALVES = ("attention", "mlp")
BATCH_TOKENS = 2048  # that go through a layer together
RECORDING = "recording"


@functools.partial(jax.tree_util.register_dataclass, data_fields=("hessian", "mean", "largest"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Of the inputs X [tokens, I] of a matrix. hessian: X^T X / tokens, [I, I]; mean, largest: of |x|, [I]; float32."""

    hessian: jax.Array
    mean: jax.Array
    largest: jax.Array

    @property
    def importance(self) -> jax.Array:
        """Mean square of every input, [I]."""
        return jnp.diag(self.hessian)

    def divided(self, factors) -> "InputStatistics":
        """Of the inputs x / factors, factors positive [I]."""
        return InputStatistics(
            hessian=self.hessian / (factors[:, None] * factors), mean=self.mean / factors, largest=self.largest / factors
        )


def calibration_tokens(ids: Sequence[int], *, sequences: int, length: int, vocab: int) -> np.ndarray:
    """int32 [sequences, length]: runs of the text that are spread evenly over it, without overlap.

    Raises QuantizationError for a text that is too short, and for tokens that the model does not have.
    """
    if sequences < 1 or length < 2:
        raise QuantizationError(f"calibration with {sequences} sequences of {length} tokens; give at least 1 of at least 2")
    if len(ids) < sequences * length:
        raise QuantizationError(
            f"the calibration text has {len(ids)} tokens, {sequences} sequences of {length} need {sequences * length}; "
            "give a longer text, or fewer or shorter sequences"
        )
    tokens = np.asarray(ids, np.int32)
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise QuantizationError(
            f"the calibration text has tokens up to {tokens.max()}, the model {vocab}; is it another's tokenizer?"
        )
    runs = len(tokens) // length
    chosen = np.linspace(0, runs - 1, sequences).round().astype(int)
    return tokens[: runs * length].reshape(runs, length)[chosen]


class Layers:
    """The layers of a model, run one by one over batches of hidden states."""

    def __init__(self, config: ModelConfig, length: int):
        self.config, self.spec = config, layer_spec(config)
        self.batch = max(1, BATCH_TOKENS // length)
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, length))
        rope = config.attention.rope
        self._angles = rope and rope_angles(rope, positions, jnp.full((1,), length, jnp.int32))

    def run(self, half: str, weights: LayerWeights, x: np.ndarray, layer: int) -> np.ndarray:
        """x float32 [S, T, D] through half a layer."""
        out = [np.asarray(_half(weights, part, *self.more(part, layer), half=half, spec=self.spec)[0]) for part in self._cut(x)]
        return np.concatenate(out)

    def inputs(self, half: str, weights: LayerWeights, x: np.ndarray, layer: int) -> dict[str, InputStatistics]:
        """Statistics of the inputs of each matrix of half a layer by its name; matrices of one input share them."""
        total: dict[str, InputStatistics] = {}
        for part in self._cut(x):
            _, sums = _half(weights, part, *self.more(part, layer), half=half, spec=self.spec, record=True)
            total = _added(total, sums) if total else sums
        tokens = x.shape[0] * x.shape[1]
        mean = {
            first: InputStatistics(hessian=s.hessian / tokens, mean=s.mean / tokens, largest=s.largest)
            for first, s in total.items()
        }
        return {name: mean[names[0]] for names in sharing(weights, half) for name in names}

    def _cut(self, x: np.ndarray):
        return (jnp.asarray(x[at : at + self.batch]) for at in range(0, len(x), self.batch))

    def more(self, part, layer: int) -> tuple:
        """What a layer takes beside its weights and a batch: angles, positions, window."""
        rows = part.shape[0]
        spread = lambda a: jnp.broadcast_to(a, (rows, *a.shape[1:]))
        positions = jnp.broadcast_to(jnp.arange(part.shape[1], dtype=jnp.int32), part.shape[:2])
        return self._angles and tuple(map(spread, self._angles)), positions, slot_window(self.spec, layer, ALONE)


def input_statistics(x: np.ndarray, inputs: Callable[[jax.Array], jax.Array]) -> InputStatistics:
    """Of inputs(x) for x float32 [S, T, D], a sequence at a time."""
    total: dict[str, InputStatistics] = {}
    for row in x:
        sums = {"": _sums(inputs(jnp.asarray(row)))}
        total = _added(total, sums) if total else sums
    s, tokens = total[""], x.shape[0] * x.shape[1]
    return InputStatistics(hessian=s.hessian / tokens, mean=s.mean / tokens, largest=s.largest)


@jax.jit
def _added(a: dict[str, InputStatistics], b: dict[str, InputStatistics]) -> dict[str, InputStatistics]:
    return {
        name: InputStatistics(
            hessian=s.hessian + b[name].hessian,
            mean=s.mean + b[name].mean,
            largest=jnp.maximum(s.largest, b[name].largest),
        )
        for name, s in a.items()
    }


@functools.partial(jax.jit, static_argnames=("half", "spec", "record"))
def _half(weights: LayerWeights, x, angles, positions, window, *, half: str, spec: LayerSpec, record: bool = False):
    """Half a layer over x [B, T, D] -> ([B, T, D], sums of its matrices' inputs, {} without `record`)."""
    inputs: dict[int, Any] = {}

    def seen(x, w, y):
        inputs[id(w)] = x
        return y

    y = half_layer(weights, x, angles, positions, window, half=half, spec=spec, seen=seen)
    named = matrices(weights, half)
    return y, {names[0]: _sums(inputs[id(named[names[0]])]) for names in sharing(weights, half)} if record else {}


def half_layer(
    weights: LayerWeights, x, angles, positions, window, *, half: str, spec: LayerSpec, seen: Callable[[Any, Any, Any], Any]
):
    """Half a layer over whole rows x float32 [B, T, D], while a program is traced: y = seen(inputs, matrix, outputs) for each matrix."""

    def recording(x, w, *, bias, max_over_shards):
        return seen(x, w, reference.quant_matmul(x, w, bias=bias, max_over_shards=max_over_shards))

    register("quant_matmul", RECORDING, recording)
    try:
        with using({f"{half}_block": "reference", "quant_matmul": RECORDING}, without=("native",)):
            if half == "mlp":
                return mlp_half(weights, x, spec=spec, ctx=ALONE)
            return attention_half(weights, x, None, angles, positions, None, window, spec=spec, ctx=ALONE)[0]
    finally:
        unregister("quant_matmul", RECORDING)


def _sums(x) -> InputStatistics:
    """Of one batch, not yet divided by the number of tokens."""
    rows = x.reshape(-1, x.shape[-1])
    return InputStatistics(
        hessian=jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST),
        mean=jnp.sum(jnp.abs(rows), 0),
        largest=jnp.max(jnp.abs(rows), 0),
    )


def matrices(weights: LayerWeights, half: str) -> dict[str, Any]:
    """The matrices of half a layer, which are not joined, by the names of their parameters."""
    if half == "attention":
        q, k, v = weights.attention.qkv
        return {"q": q, "k": k, "v": v, "o": weights.attention.out}
    up = weights.mlp.up
    return {**dict(zip(("gate", "up")[-len(up) :], up, strict=True)), "down": weights.mlp.down}


def sharing(weights: LayerWeights, half: str) -> tuple[tuple[str, ...], ...]:
    """Names of the matrices of half a layer, those with one input together."""
    *first, last = matrices(weights, half)
    return tuple(first), (last,)
