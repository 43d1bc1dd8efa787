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
from pallas_kernels.moe import reference as experts_reference
from pallas_kernels.qtensor import ActivationQuant, QTensor
from pallas_kernels.quant_matmul import reference
from pallas_kernels.quantize import dequantize_activations, quantize_activations
from pallas_kernels.quantize.reference import TOPS
from pallas_kernels.registry import register, unregister, using
from sharding.context import ALONE

HALVES = ("attention", "mlp")
BATCH_TOKENS = 2048  # that go through a layer together
RECORDING = "recording"
# parts of the range of inputs that are tried as the range of a static scale: rounding to even steps gains by cutting rare ones off
INPUT_CLIPS = {"int8": tuple(2 ** (-i / 4) for i in range(25)), "fp8": tuple(2 ** (-i / 2) for i in range(5))}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertStatistics:
    """Of the inputs of a stack [E, O, I] of matrices. experts: of each one, over the tokens that were routed to it. tokens: their numbers,
    [E]."""

    experts: tuple[InputStatistics, ...]
    tokens: np.ndarray

    @property
    def together(self) -> InputStatistics:
        """Over all experts, a token as often as it was routed."""
        shares = self.tokens / max(1, int(self.tokens.sum()))
        mean = lambda part: sum(float(n) * getattr(s, part) for n, s in zip(shares, self.experts, strict=True))
        largest = functools.reduce(jnp.maximum, (s.largest for s in self.experts))
        return InputStatistics(hessian=mean("hessian"), mean=mean("mean"), largest=largest)

    def divided(self, factors: Sequence[np.ndarray]) -> "ExpertStatistics":
        """Of the inputs x / factors[e] of each expert."""
        parts = tuple(s.divided(jnp.asarray(f)) for s, f in zip(self.experts, factors, strict=True))
        return dataclasses.replace(self, experts=parts)


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

    def experts(self, weights: LayerWeights, x: np.ndarray, layer: int) -> dict[str, ExpertStatistics]:
        """Statistics of the inputs of the stacks of a layer's experts by name; gate and up, which have one input, share them."""
        count = weights.mlp.down.shape[0]
        sums: dict[str, list[Any]] = {}
        tokens = np.zeros(count, np.int64)
        for part in self._cut(x):
            _, seen = _half(weights, part, *self.more(part, layer), half="mlp", spec=self.spec, record=True)
            for name, (rows, sizes) in seen.items():
                ends = np.cumsum(np.asarray(sizes))
                mine = [_row_sums(r) for r in np.split(np.asarray(rows), ends[:-1])]
                sums[name] = mine if name not in sums else [_plus(a, b) for a, b in zip(sums[name], mine, strict=True)]
            tokens += np.asarray(sizes)
        found = {
            first: ExpertStatistics(experts=tuple(_mean(s, n) for s, n in zip(parts, tokens, strict=True)), tokens=tokens)
            for first, parts in sums.items()
        }
        return {name: found[names[0]] for names in sharing(weights, "mlp") for name in names}

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

    def scales(self, half: str, weights: LayerWeights, x: np.ndarray, layer: int) -> dict[str, np.ndarray]:
        """One scale for the inputs of each matrix of half a layer whose activation is not None, float32 [1, 1]: the one of least error.

            argmin over c of  sum over tokens and inputs of (x - Q_s(x))^2,    s = c max|x| / top

        Matrices of one input share it. Two passes: the range has to be known before errors are summed.
        """
        formats = {name: w.activation.format for name, w in matrices(weights, half).items() if _rounds_inputs(w)}
        largest = self.inputs(half, weights, x, layer)
        tops = {
            name: np.float32(max(float(jnp.max(largest[name].largest)), 1e-12) / TOPS[form]) for name, form in formats.items()
        }
        groups = [tuple(n for n in names if n in formats) for names in sharing(weights, half)]
        shared = {names[0]: names for names in groups if names}
        tried = {first: jnp.asarray([c * tops[first] for c in INPUT_CLIPS[formats[first]]]) for first in shared}
        errors: dict[str, Any] = {}
        for part in self._cut(x):
            more = self.more(part, layer)
            found = _input_errors(weights, part, *more, tried, half=half, spec=self.spec, formats=tuple(formats.items()))
            errors = {first: errors.get(first, 0) + e for first, e in found.items()}
        best = {first: np.asarray(tried[first])[int(np.argmin(e))].reshape(1, 1) for first, e in errors.items()}
        return {name: best[first] for first, names in shared.items() for name in names}

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


def _row_sums(rows: np.ndarray) -> InputStatistics:
    """Sums over rows float32 [n, I] on the host, of which there is another number for each expert."""
    size = np.abs(rows)
    largest = size.max(0, initial=0.0)
    return InputStatistics(hessian=rows.T @ rows, mean=size.sum(0), largest=largest)  # type: ignore[arg-type]


def _plus(a: InputStatistics, b: InputStatistics) -> InputStatistics:
    return InputStatistics(hessian=a.hessian + b.hessian, mean=a.mean + b.mean, largest=np.maximum(a.largest, b.largest))  # type: ignore[arg-type]


def _mean(sums: InputStatistics, tokens) -> InputStatistics:
    n = max(1, int(tokens))
    return InputStatistics(
        hessian=jnp.asarray(sums.hessian) / n, mean=jnp.asarray(sums.mean) / n, largest=jnp.asarray(sums.largest)
    )


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
    """Half a layer over x [B, T, D] -> ([B, T, D], sums of its matrices' inputs; of experts their inputs [N, I], each one's one after
    another, and how many each has [E]; {} without `record`)."""
    inputs: dict[int, Any] = {}

    def seen(x, w, y, sizes=None):
        inputs[id(w)] = _sums(x) if sizes is None else (x, sizes)
        return y

    y = half_layer(weights, x, angles, positions, window, half=half, spec=spec, seen=seen)
    named = matrices(weights, half)
    return y, {names[0]: inputs[id(named[names[0]])] for names in sharing(weights, half)} if record else {}


def _rounds_inputs(w) -> bool:
    return isinstance(w, QTensor) and w.activation is not None


@functools.partial(jax.jit, static_argnames=("half", "spec", "formats"))
def _input_errors(
    weights: LayerWeights, x, angles, positions, window, tried: dict[str, Any], *, half: str, spec: LayerSpec, formats: tuple
):
    """For the inputs of each matrix in `tried` the squared errors of its scales there: [n] likewise. formats: (matrix, format) pairs."""
    inputs: dict[int, Any] = {}

    def seen(x, w, y):
        inputs[id(w)] = x
        return y

    half_layer(weights, x, angles, positions, window, half=half, spec=spec, seen=seen)
    named, form = matrices(weights, half), dict(formats)

    def error(rows, scale, format: str):
        quant = ActivationQuant(group=None, format=format, static=True)
        return jnp.sum((rows - dequantize_activations(*quantize_activations(rows, quant, static=scale), quant)) ** 2)

    return {
        name: jax.lax.map(lambda s, name=name: error(inputs[id(named[name])], s.reshape(1, 1), form[name]), scales)
        for name, scales in tried.items()
    }


def half_layer(weights: LayerWeights, x, angles, positions, window, *, half: str, spec: LayerSpec, seen: Callable[..., Any]):
    """Half a layer over whole rows x float32 [B, T, D], while a program is traced: y = seen(inputs, matrix, outputs) for each matrix, and
    seen(inputs, stack, outputs, sizes) for those of experts"""

    def recording(x, w, *, bias, max_over_shards):
        return seen(x, w, reference.quant_matmul(x, w, bias=bias, max_over_shards=max_over_shards))

    def grouped(x, w, sizes, bias, rows, **call):
        x = x if rows is None else x[rows]
        y = experts_reference.grouped_matmul(x, w, sizes, bias, None, **call)
        return seen(x, w, y, sizes)

    register("quant_matmul", RECORDING, recording)
    register("grouped_matmul", RECORDING, grouped)
    try:
        blocks = {f"{half}_block": "reference", "quant_matmul": RECORDING, "grouped_matmul": RECORDING}
        with using(blocks, without=("native",)):
            if half == "mlp":
                return mlp_half(weights, x, spec=spec, ctx=ALONE)
            return attention_half(weights, x, None, angles, positions, None, window, spec=spec, ctx=ALONE)[0]
    finally:
        unregister("quant_matmul", RECORDING)
        unregister("grouped_matmul", RECORDING)


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
