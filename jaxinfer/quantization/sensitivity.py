"""Bits for every matrix from what its error costs: measured on a text, spent where they help most.

Shapes: S sequences of T tokens, D embed, O outputs and I inputs of a matrix.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.readers.base import LazyTensor, PackedFormat, dtype_named
from jaxinfer.config import QuantizationConfig
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import ENDS, DecoderWeights, LayerSpec, embed, head_logits, parameters
from jaxinfer.quantization.calibration import HALVES, Layers, half_layer, matrices, sharing
from jaxinfer.quantization.grids import INTEGER, decoded, nearest, search_grid
from jaxinfer.quantization.policy import spec_of
from jaxinfer.quantization.quantizer import layer_weights, read_float, read_layer
from jaxinfer.values import DTYPES
from pallas_kernels import qtensor
from pallas_kernels.errors import QuantizationError
from pallas_kernels.norm import norm

FORMS = ("w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a16-g32-asym", "w8a16", "bfloat16", "float32")
ROWS = 4096  # of a vocabulary whose errors are weighed at a time
SEED = 0

type Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A form for a matrix. nbytes: of the matrix in it. cost: estimated KL divergence, in nats a token, that its error makes."""

    form: str
    nbytes: int
    cost: float


def sensitivities(
    tensors: Mapping[str, LazyTensor],
    config: ModelConfig,
    tokens: np.ndarray,
    *,
    forms: Sequence[str] = FORMS,
    progress: Progress | None = None,
) -> dict[str, list[Choice]]:
    """For every matrix by module path the forms that it could have, and what each would cost.

        KL(p || p_E) ~ 1/2 sum_o F_o (E H E^T)_oo,    E = Q(W) - W,    H = mean x x^T of its inputs,    F_o = mean d_o^2

    with d the gradients of log p(y) by the matrix's outputs for tokens y that are drawn from the model itself: the Fisher information,
    taken as diagonal in the outputs and independent of the inputs. tokens: int32 [S, T]. forms: short forms of quantisation and dtypes;
    of a matrix whose inputs a form's group does not divide the form is left out. Layers are held one at a time; the hidden states
    before every layer are kept, L * S * T * D floats. Raises QuantizationError where a matrix fits no form.
    Source: second-order sensitivity as in HAWQ, Dong et al. 2019, arXiv:1905.03696; the factors as in K-FAC, Martens and Grosse 2015.
    """
    layers = Layers(config, tokens.shape[1])
    ends: dict[str, Any] = {name: jnp.asarray(read_float(tensors[name])) if name in tensors else None for name in ENDS}
    weights = DecoderWeights(layers=(), embed_scale=config.embed_scale, **ends)
    states = [np.asarray(embed(weights, jnp.asarray(tokens)))]
    total = 2 * config.layers + 1
    told = lambda done: progress(done, total, "sensitivity") if progress else None
    for i in range(config.layers):
        told(i)
        layer = layer_weights(read_layer(tensors, i))
        x = states[-1]
        for half in HALVES:
            x = layers.run(half, layer, x, i)
        states.append(x)
    told(config.layers)
    gradient, head = _of_head(weights, states[-1], config)
    out: dict[str, list[Choice]] = {}
    for i in reversed(range(config.layers)):
        told(2 * config.layers - i)
        values = read_layer(tensors, i)
        gradient, by_matrix = _of_layer(layer_weights(values), states[i], gradient, layers, i)
        for name, (fisher, hessian) in by_matrix.items():
            path = f"blocks.{i}.{name}"
            out[path] = _choices(path, values[name], forms, fisher, hessian)
    rows, tied = _of_embedding(gradient, tokens, config), weights.head is None
    out["embedding"] = _choices("embedding", np.asarray(weights.embedding), forms, *(head if tied else (None, None)), rows=rows)
    if not tied:
        out["head"] = _choices("head", np.asarray(weights.head), forms, *head)
    return {path: out[path] for path in parameters(config) if path in out}


def allocate(sensitivity: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for every matrix with the least cost in all that `budget` bytes allow, up to the size of one step.

    From the smallest form of each, the step that takes most cost off a byte is taken as long as it fits: on the lower convex hull of
    every matrix that is Lagrange's solution. Raises QuantizationError where the smallest forms need more.
    """
    hulls = {path: _hull(choices) for path, choices in sensitivity.items()}
    place = dict.fromkeys(hulls, 0)
    size = sum(hull[0].nbytes for hull in hulls.values())
    if size > budget:
        raise QuantizationError(
            f"the budget leaves {budget} bytes for matrices, which need {size} in their smallest forms; raise it"
        )
    for _, path, n, more in _steps(hulls):
        if place[path] == n and size + more <= budget:
            place[path], size = n + 1, size + more
    return {path: hull[place[path]] for path, hull in hulls.items()}


def allocate_to_loss(sensitivity: Mapping[str, Sequence[Choice]], loss: float) -> dict[str, Choice]:
    """One choice for every matrix of the fewest bytes in all whose costs add up to at most log(1 + loss), up to the size of one step: by
    as much does perplexity grow where a text is like what the model says. loss: such as 0.01.

    Raises QuantizationError where the largest forms cost more.
    """
    hulls = {path: _hull(choices) for path, choices in sensitivity.items()}
    place = dict.fromkeys(hulls, 0)
    cost, allowed = sum(hull[0].cost for hull in hulls.values()), math.log1p(loss)
    for _, path, n, _ in _steps(hulls):
        if cost <= allowed:
            break
        place[path] = n + 1
        cost += hulls[path][n + 1].cost - hulls[path][n].cost
    if cost > allowed:
        raise QuantizationError(
            f"a loss of {loss:.2%} allows {allowed:.5f} nats a token, and the largest forms are estimated to cost {cost:.5f}; raise it"
        )
    return {path: hull[place[path]] for path, hull in hulls.items()}


def _steps(hulls: Mapping[str, list[Choice]]) -> list[tuple[float, str, int, int]]:
    """(cost that it takes off a byte, matrix, place on its hull, bytes) of every step to a larger form, those that take off most first."""
    steps = []
    for path, hull in hulls.items():
        for n, (small, large) in enumerate(itertools.pairwise(hull)):
            steps.append(((small.cost - large.cost) / (large.nbytes - small.nbytes), path, n, large.nbytes - small.nbytes))
    return sorted(steps, key=lambda step: -step[0])


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that some price of a byte prefers, the smallest first."""
    hull: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.nbytes, c.cost)):
        if hull and c.cost >= hull[-1].cost:
            continue
        slope = lambda a, b: (a.cost - b.cost) / max(b.nbytes - a.nbytes, 1)
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], c):
            hull.pop()
        if hull and hull[-1].nbytes == c.nbytes:
            hull.pop()
        hull.append(c)
    return hull


def _choices(path: str, w: np.ndarray, forms: Sequence[str], fisher, hessian, *, rows=None) -> list[Choice]:
    """fisher [O], hessian [I, I]: of a matrix that multiplies, or None. rows: of a table that is read, two vectors [O] and [I] whose
    product is what the squared error of an element weighs."""
    out = []
    for form in forms:
        spec = None if form in DTYPES else spec_of(QuantizationConfig.parse(form), w.shape[1])
        if spec is not None and w.shape[1] % (spec.group or 1):
            continue
        if spec is None:
            nbytes = w.size * dtype_named(form).itemsize
        else:
            scale = np.dtype(spec.scale_dtype or qtensor.default_scale_dtype(spec.format))
            packed = PackedFormat(
                format=spec.format, group=spec.group, zeros=not spec.symmetric, scale_dtype=scale,
                zeros_dtype=None if spec.symmetric else scale,
            )  # fmt: skip
            nbytes = packed.nbytes(w.shape)
        cost = 0.0
        for at in range(0, w.shape[0], ROWS):
            part = jnp.asarray(w[at : at + ROWS])
            error = _error(part, spec, form, hessian)
            if fisher is not None:
                cost += float(_weighed(error, fisher[at : at + ROWS], hessian))
            if rows is not None:
                cost += 0.5 * float(jnp.sum(rows[0][at : at + ROWS, None] * rows[1] * error**2))
        out.append(Choice(form=form, nbytes=nbytes, cost=cost))
    if not out:
        raise QuantizationError(
            f"{path} has {w.shape[1]} inputs, and none of the forms {', '.join(forms)} has groups that divide them"
        )
    return out


def _error(w, spec, form: str, hessian):
    if spec is None:
        return w.astype(form).astype(jnp.float32) - w
    if spec.format not in INTEGER:
        q = qtensor.round_to_nearest(np.asarray(w), format=spec.format, group=spec.group)
        return jnp.asarray(qtensor.dequantize(q)) - w
    importance = jnp.ones(w.shape[1]) if hessian is None else jnp.diag(hessian)
    grid = search_grid(w, importance, spec)
    return decoded(nearest(w, grid), grid) - w


@jax.jit
def _weighed(error, fisher, hessian):
    by_output = jnp.sum(jnp.matmul(error, hessian, precision=jax.lax.Precision.HIGHEST) * error, -1)
    return 0.5 * jnp.sum(fisher * by_output)


# --- gradients, from the head down


def _of_head(weights: DecoderWeights, x: np.ndarray, config: ModelConfig):
    """Gradients [S, T, D] of log p(y) by the hidden states, and (F [V], H [D, D]) of the head."""
    gradients, fisher, hessian = [], 0.0, 0.0
    for n, row in enumerate(x):  # the logits of one sequence at a time
        g, f, h = _head(weights, jnp.asarray(row[None]), jax.random.fold_in(jax.random.key(SEED), n), config)
        gradients.append(np.asarray(g))
        fisher, hessian = fisher + f, hessian + h
    tokens = x.shape[0] * x.shape[1]
    return np.concatenate(gradients), (fisher / tokens, hessian / tokens)


@functools.partial(jax.jit, static_argnames="config")
def _head(weights: DecoderWeights, x, key, config: ModelConfig):
    def likelihood(x):
        logits = head_logits(weights, x, config)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.take_along_axis(log_p, drawn[..., None], -1)), log_p

    gradient, log_p = jax.grad(likelihood, has_aux=True)(x)
    p = jnp.exp(log_p)
    n = _normed(weights, x, config).reshape(-1, x.shape[-1])
    return gradient, jnp.sum(p * (1 - p), (0, 1)), jnp.matmul(n.T, n, precision=jax.lax.Precision.HIGHEST)


def _normed(weights: DecoderWeights, x, config: ModelConfig):
    return norm(x, weights.norm, weights.norm_bias, kind=config.norm, eps=config.norm_eps)


def _of_embedding(gradient: np.ndarray, tokens: np.ndarray, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """What a squared error of an element of the table weighs: how often its row is read [V], times the mean square of the gradient
    [D]."""
    counts = np.bincount(tokens.reshape(-1), minlength=config.vocab) / tokens.size
    squares = np.mean(gradient.reshape(-1, gradient.shape[-1]) ** 2, 0) * config.embed_scale**2
    return jnp.asarray(counts, jnp.float32), jnp.asarray(squares)


def _of_layer(weights, x: np.ndarray, gradient: np.ndarray, layers: Layers, i: int):
    """Gradients [S, T, D] before a layer, and {matrix: (F [O], H [I, I])} of it."""
    before, total = [], None
    for at in range(0, len(x), layers.batch):
        part, g = jnp.asarray(x[at : at + layers.batch]), jnp.asarray(gradient[at : at + layers.batch])
        g, sums = _backward(weights, part, g, *layers.more(part, i), spec=layers.spec)
        before.append(np.asarray(g))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    tokens = x.shape[0] * x.shape[1]
    return np.concatenate(before), jax.tree.map(lambda a: a / tokens, total)


@functools.partial(jax.jit, static_argnames="spec")
def _backward(weights, x, gradient, angles, positions, window, *, spec: LayerSpec):
    """The gradient before a layer, and for each of its matrices the sums of the squared gradients of its outputs and of x x^T."""

    def run(x, probes):
        hessians: dict[str, Any] = {}
        for half in HALVES:
            named = matrices(weights, half)
            names = {id(w): f"{half}.{name}" for name, w in named.items()}
            first = {f"{half}.{name}": f"{half}.{shared[0]}" for shared in sharing(weights, half) for name in shared}

            def probed(n, w, y, names=names, first=first):
                name = names[id(w)]
                if first[name] not in hessians:
                    rows = n.reshape(-1, n.shape[-1])
                    hessians[first[name]] = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
                hessians[name] = hessians[first[name]]
                return _probe(y, probes[name])

            x = half_layer(weights, x, angles, positions, window, half=half, spec=spec, seen=probed)
        return x, hessians

    probes = {
        f"{half}.{name}": jnp.zeros(w.shape[0], jnp.float32) for half in HALVES for name, w in matrices(weights, half).items()
    }
    _, pull, hessians = jax.vjp(run, x, probes, has_aux=True)
    before, fisher = pull(gradient)
    return before, {name: (f, hessians[name]) for name, f in fisher.items()}


@jax.custom_vjp
def _probe(y, squares):
    """y [..., O] itself; the gradient by `squares` [O] is the sum of the squared gradients by y."""
    return y


def _probe_forward(y, squares):
    return y, None


def _probe_backward(_, gradient):
    return gradient, jnp.sum(gradient.reshape(-1, gradient.shape[-1]) ** 2, 0)


_probe.defvjp(_probe_forward, _probe_backward)
