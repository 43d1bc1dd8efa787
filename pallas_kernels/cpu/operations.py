"""The operations as native calls, their gradients, and which arguments they take.

Gradients are those of the reference: a call has none of its own. Under vmap a call runs once for each element.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cpu import library, operands
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.qtensor import QTensor
from pallas_kernels.shares import share

PRIORITY = 20  # above the dots of XLA
NORMS = {"rms": 0, "rms_offset": 1, "layer": 2, None: 3}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
CACHES = ("float32", "bfloat16", "float16", "int8", "fp8", "int4")  # formats
_CACHE_OPERAND = 8  # place of the cache among the operands of attention_block


def _float(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# --- attention


def _terms(terms) -> list:
    """The operands of an `AttentionTerms`."""
    return [operands.given(terms.lengths, jnp.int32), *(operands.given(a) for a in (terms.sinks, terms.slopes, terms.relative))]


def supports_attention(target, facts) -> bool | str:
    """CPUs; caches of any of their formats, by rows and not by block tables."""
    if facts["paged"]:
        return "it reads rows of a cache, not block tables"
    if facts["cache_format"] not in CACHES:
        return f"it takes caches of {', '.join(CACHES)}, not {facts['cache_format']}"
    return library.refusal(target.platform) or True


def attention(q, cache, *, rows, positions, scale, soft_cap, window, terms, out_dtype):
    return _attention(scale, soft_cap, q, cache, rows, positions, window, terms).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale, soft_cap, q, cache, rows, positions, window, terms):
    taken = [
        q.astype(jnp.float32),
        *(operands.given(a, jnp.int32) for a in (positions, rows, window)),
        *cache.arrays,
        *_terms(terms),
    ]
    integers, numbers = (*library.call_integers(), terms.causal), (scale, soft_cap or 0)
    return operands.call("jaxinfer_attention", _float(*q.shape), taken, integers=integers, numbers=numbers)


def _attention_alone_forward(scale, soft_cap, *arrays):
    return _attention(scale, soft_cap, *arrays), arrays


def _attention_alone_backward(scale, soft_cap, arrays, gradient):
    from pallas_kernels.attention import reference

    def run(q, cache, rows, positions, window, terms):
        named = {"rows": rows, "positions": positions, "window": window, "terms": terms, "out_dtype": jnp.float32}
        return reference.attention(q, cache, scale=scale, soft_cap=soft_cap, **named)

    return jax.vjp(run, *arrays)[1](gradient)


_attention.defvjp(_attention_alone_forward, _attention_alone_backward)


# --- attention_block


def supports_attention_block(target, facts) -> bool | str:
    """CPUs, float32 x; weights as in `operands.refusal`; caches of any of their formats."""
    weights, cache = facts["weights"], facts["cache"]
    split = facts["max_over_shards"] is not None
    reason = library.refusal(target.platform)
    reason = reason or next((r for w in weights.qkv if (r := operands.refusal(w, False))), None)
    reason = reason or operands.refusal(weights.out, split)
    if reason is None and cache is not None and cache.format not in CACHES:
        reason = f"it takes caches of {', '.join(CACHES)}, not {cache.format}"
    return reason or True


def attention_block(x, weights, cache, *, spec, angles, positions, rows, write, residual, lead, window, terms, max_over_shards):
    weights = dataclasses.replace(weights, out_bias=share(lead, weights.out_bias))
    residual = share(lead, residual)
    return _attention_block(spec, max_over_shards, x, weights, cache, angles, positions, rows, write, residual, window, terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention_block(spec, max_over_shards, x, weights, cache, angles, positions, rows, write, residual, window, terms):
    B, T, _ = x.shape
    parts = len(weights.qkv)
    K = sum(w.shape[0] for w in weights.qkv) // ((spec.group + 2) * spec.head_dim)
    qkv = (*weights.qkv, *(None,) * (3 - parts))
    biases = (*(weights.qkv_bias or (None,) * parts), *(None,) * (3 - parts))
    cos, sin = angles or (None, None)
    flat = lambda a: operands.given(a, jnp.int32)
    empty = cache
    if cache is None:
        empty = LayerCache.zeros(rows=B, kv_heads=K, tokens=T, head_dim=spec.head_dim, dtype=_fresh_dtype(spec, weights))
    held = [name for name, a in zip(LayerCache.ARRAYS, empty.arrays, strict=True) if a is not None]
    caches = [getattr(empty, name) for name in held]
    arguments = [
        x.astype(jnp.float32),
        operands.given(residual),
        flat(positions),
        flat(rows),
        operands.given(write, jnp.bool_),
        operands.given(cos),
        operands.given(sin),
        operands.given(window, jnp.int32),
        *(None if cache is None else a for a in empty.arrays),
    ]
    arguments += [operands.given(a) for a in (weights.norm, weights.norm_bias, weights.q_norm, weights.k_norm)]
    arguments += _terms(terms)
    for w, bias in zip(qkv, biases, strict=True):
        arguments += operands.weight(w, bias)
    arguments += operands.weight(weights.out, weights.out_bias)
    facts = [operands.facts(w) for w in (*qkv, weights.out)]
    results = [_float(B, T, weights.out.shape[0]), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in caches)]
    # what a format has comes first among the arrays of a cache
    aliases = [] if cache is None else [(_CACHE_OPERAND + i, 1 + i) for i in range(len(caches))]
    shape = spec.head_dim, spec.group, NORMS[spec.norm], parts, terms.causal
    integers = (*library.call_integers(), *shape, *(n for of in facts for n in of))
    numbers = spec.eps, spec.scale, spec.soft_cap or 0
    y, *new = operands.call("jaxinfer_attention_block", results, arguments, integers=integers, numbers=numbers, aliases=aliases)
    return y, LayerCache(**dict(zip(held, new, strict=True)))


def _fresh_dtype(spec, weights) -> jnp.dtype:
    """Of a fresh cache. Behind weights of fewer bits than float32 many queries meet bfloat16 in any case; half of the bytes are written."""
    exact = any(w.dtype == jnp.float32 for w in weights.qkv if isinstance(w, jax.Array))
    return jnp.dtype(jnp.float32 if exact else spec.fresh)


def _attention_forward(spec, max_over_shards, *arrays):
    return _attention_block(spec, max_over_shards, *arrays), arrays


def _attention_backward(spec, max_over_shards, arrays, gradient):
    from pallas_kernels.attention_block import reference

    names = ("angles", "positions", "rows", "write", "residual", "window", "terms")

    def run(x, weights, cache, *rest):
        named = dict(zip(names, rest, strict=True))
        y, new = reference.attention_block(x, weights, cache, spec=spec, lead=None, max_over_shards=max_over_shards, **named)
        return y, (jax.tree.map(lambda a, g: a.astype(g.dtype), new, gradient[1]) if cache is None else new)

    return jax.vjp(run, *arrays)[1](gradient)


_attention_block.defvjp(_attention_forward, _attention_backward)


# --- mlp_block


def supports_mlp_block(target, facts) -> bool | str:
    """CPUs, float32 x; weights as in `operands.refusal`."""
    weights = facts["weights"]
    reason = library.refusal(target.platform)
    reason = reason or next((r for w in weights.up if (r := operands.refusal(w, False))), None)
    return reason or operands.refusal(weights.down, facts["max_over_shards"] is not None) or True


def mlp_block(x, weights, *, spec, residual, lead, max_over_shards):
    weights = dataclasses.replace(weights, down_bias=share(lead, weights.down_bias))
    return _mlp_block(spec, max_over_shards, x, weights, share(lead, residual))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp_block(spec, max_over_shards, x, weights, residual):
    parts = len(weights.up)
    up = (*weights.up, *(None,) * (2 - parts))
    biases = (*(weights.up_bias or (None,) * parts), *(None,) * (2 - parts))
    arguments = [x.astype(jnp.float32), *(operands.given(a) for a in (residual, weights.norm, weights.norm_bias))]
    for w, bias in zip(up, biases, strict=True):
        arguments += operands.weight(w, bias)
    arguments += operands.weight(weights.down, weights.down_bias)
    facts = [n for w in (*up, weights.down) for n in operands.facts(w)]
    kind, activation = NORMS[spec.norm], ACTIVATIONS[spec.activation]
    integers = (*library.call_integers(), kind, activation, int(spec.gated), parts, *facts)
    result = _float(*x.shape[:2], weights.down.shape[0])
    return operands.call("jaxinfer_mlp_block", result, arguments, integers=integers, numbers=(spec.eps,))


def _mlp_forward(spec, max_over_shards, *arrays):
    return _mlp_block(spec, max_over_shards, *arrays), arrays


def _mlp_backward(spec, max_over_shards, arrays, gradient):
    from pallas_kernels.mlp_block import reference

    def run(x, weights, residual):
        return reference.mlp_block(x, weights, spec=spec, residual=residual, lead=None, max_over_shards=max_over_shards)

    return jax.vjp(run, *arrays)[1](gradient)


_mlp_block.defvjp(_mlp_forward, _mlp_backward)


# --- quant_matmul


def supports_quant_matmul(target, facts) -> bool | str:
    """CPUs; weights as in `operands.refusal`."""
    if reason := library.refusal(target.platform):
        return reason
    if facts["format"] in operands.FLOATS:
        return True
    given = {name: facts[name] for name in ("format", "group", "layout", "activation", "scales", "zeros", "over_shards")}
    return operands.refusal_of(**given) or True


def quant_matmul(x, w, *, bias, max_over_shards):
    return _matmul(None, 0.0, max_over_shards, x, w, bias, None, None, None)


def supports_fused_matmul(target, facts) -> bool | str:
    """CPUs; one weight, as in `operands.refusal`, with norm, bias and residual; what is between two weights is in mlp_block."""
    if len(facts["weights"]) > 1 or facts["activation"] is not None or facts["gated"]:
        return "it multiplies with one weight, and what comes of it is neither activated nor gated"
    return library.refusal(target.platform) or operands.refusal(facts["weights"][0], facts["over_shards"]) or True


def fused_matmul(given, call):
    (w,), bias = given.weights, given.biases[0] if given.biases else None
    arrays = (share(given.lead, bias), given.scale, given.norm_bias, share(given.lead, given.residual))
    return _matmul(call.kind, call.eps, call.max_over_shards, given.x, w, *arrays).astype(call.out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(kind, eps, max_over_shards, x, w, bias, scale, norm_bias, residual):
    """x [..., I] -> float32 [..., O]. kind: of the norm that x goes through first, or None."""
    rows = x.reshape(-1, x.shape[-1])
    residual = None if residual is None else residual.reshape(-1, w.shape[0])
    taken = [rows.astype(jnp.float32), *(operands.given(a) for a in (residual, scale, norm_bias)), *operands.weight(w, bias)]
    integers = (*library.call_integers(), NORMS[kind], *operands.facts(w))
    y = operands.call("jaxinfer_quant_matmul", _float(rows.shape[0], w.shape[0]), taken, integers=integers, numbers=(eps,))
    return y.reshape(*x.shape[:-1], w.shape[0])


def _matmul_forward(kind, eps, max_over_shards, *arrays):
    return _matmul(kind, eps, max_over_shards, *arrays), arrays


def _matmul_backward(kind, eps, max_over_shards, arrays, gradient):
    from pallas_kernels.norm import norm
    from pallas_kernels.quant_matmul import reference, xla

    def run(x, w, bias, scale, norm_bias, residual):
        if kind is not None:
            x = norm(x, scale, norm_bias, kind=kind, eps=eps, implementation="reference")
        # a float weight multiplies inputs that were rounded to its dtype
        run = reference if isinstance(w, QTensor) else xla
        y = run.quant_matmul(x, w, bias=bias, max_over_shards=max_over_shards)
        return y if residual is None else residual.astype(jnp.float32) + y

    return jax.vjp(run, *arrays)[1](gradient)


_matmul.defvjp(_matmul_forward, _matmul_backward)


# --- argmax


def supports_argmax(target, facts) -> bool | str:
    """CPUs, float32 logits."""
    if facts["dtype"] != jnp.float32:
        return f"it reads float32 logits, not {facts['dtype']}"
    return library.refusal(target.platform) or True


def argmax(logits, *, shards):
    rows = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
    logits = jax.lax.stop_gradient(logits)
    results = [rows, _float(*logits.shape[:1])]
    ids, largest = operands.call("jaxinfer_argmax", results, [logits], integers=library.call_integers())
    return _over_shards(ids, largest, shards)


def _over_shards(ids, largest, shards):
    """The global id of the largest logit of all shards, the lowest one on ties."""
    # on the shards that do not hold the largest an id past every other one
    here = jnp.where(largest < shards.max(largest), jnp.int32(2**31 - 1), ids + shards.offset)
    return shards.min(here)


# --- head_argmax

# inputs at once; rows and inputs of a block, bytes of a block, floats of a row: sketch.inc
SKETCH_ROWS, SKETCH_BLOCK, SKETCH_BYTES, SKETCH_NUMBERS = 2, 32, 704, 3
FORMATS, CELLS = ("float32", "bfloat16", "int8"), ("float32", "bfloat16", "float16")  # as types.h numbers them
SLOW_SKETCHES = ("plain",)  # its products of 5-bit levels take longer than those of all bytes


def sketch_refusal(w) -> str | None:
    """Why a weight cannot have a sketch, or None."""
    if isinstance(w, QTensor) and w.format != "int8":
        return f"a sketch has 5 bits a weight, and the head is {w.format}"
    return library.refusal("cpu") or operands.refusal(w, False)


def slow_sketch() -> str | None:
    """Why calls traced now are faster without a sketch, or None."""
    name = library.instruction_set()
    return f"a sketch is slower than all logits with {name} kernels" if name in SLOW_SKETCHES else None


def head_sketch(w) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of a sketch, see head_argmax.HeadSketch, of arrays that are there: no program is compiled for it."""
    found = library.load()
    assert not isinstance(found, str)
    rows, width = w.shape
    count, groups = -(-rows // SKETCH_BLOCK), -(-width // SKETCH_BLOCK)
    blocks = np.empty((count, groups, SKETCH_BYTES), np.uint8)
    numbers = np.empty((count, SKETCH_NUMBERS, SKETCH_BLOCK), np.float32)
    levels = isinstance(w, QTensor)
    arrays = [np.ascontiguousarray(a) for a in ((w.values, w.scales) if levels else (w,))]
    values, scales = (*(a.ctypes.data for a in arrays), None)[:2]
    form = FORMATS.index("int8" if levels else str(w.dtype)), levels and w.layout != "canonical"
    of_scales = (CELLS.index(str(w.scales.dtype)), w.group or 0) if levels else (0, 0)
    found.handle.jaxinfer_sketch(
        *library.call_integers(), *form, rows, width, values, scales, *of_scales, blocks.ctypes.data, numbers.ctypes.data
    )
    return blocks, numbers


def supports_head_argmax(target, facts) -> bool | str:
    """CPUs; weights as in `sketch_refusal`."""
    return library.refusal(target.platform) or sketch_refusal(facts["weight"]) or True


def head_argmax(x, w, *, norm, sketch, vocab, shards):
    ids, largest, _ = head_argmax_counted(x, w, norm=norm, sketch=sketch, limit=vocab - shards.offset)
    return _over_shards(ids, largest, shards)


def head_argmax_counted(x, w, *, norm, sketch, limit):
    """Of each row of x the id of the largest of the first `limit` logits, that logit, and how many blocks of 32 rows of w were read."""
    rows = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    taken = [x.astype(jnp.float32), operands.given(norm.scale), operands.given(norm.bias), jnp.asarray(limit, jnp.int32)]
    taken += [sketch.blocks, sketch.numbers, *operands.weight(w, None)]
    integers = (*library.call_integers(), NORMS[norm.kind], *operands.facts(w))
    results = [rows, _float(*x.shape[:1]), rows]
    taken = [None if a is None else jax.lax.stop_gradient(a) for a in taken]
    return operands.call("jaxinfer_head_argmax", results, taken, integers=integers, numbers=(norm.eps,))


# --- sample


def supports_sample(target, facts) -> bool | str:
    """CPUs, float32 logits of the whole vocabulary."""
    return "it draws from a whole vocabulary" if facts["split"] else supports_argmax(target, facts)


def sample(logits, *, temperature, top_k, top_p, min_p, seeds, steps, shards):
    knobs = (temperature, top_k, top_p, min_p, seeds, steps)
    result = jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32)
    taken = [jax.lax.stop_gradient(logits), *knobs]
    return operands.call("jaxinfer_sample", result, taken, integers=library.call_integers())
