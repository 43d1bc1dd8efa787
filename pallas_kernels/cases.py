"""What the kernel report compiles and measures, and the tuner takes for operations that a model has none of: operations at the sizes of
real models, with what they must move and compute.

A room's cases are a function of this file; its operands are jax.ShapeDtypeStruct. Bytes are unique bytes of device memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activation import activation
from pallas_kernels.activation.specs import SPECS as HIDDEN
from pallas_kernels.attention import attention
from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.cross_entropy import log_probs
from pallas_kernels.dropout import Dropout
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.latent_attention.specs import SPECS as LATENTS
from pallas_kernels.launch import NARROWEST_FP8, OLDEST
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.moe import grouped_matmul, in_order, route
from pallas_kernels.moe.specs import SPECS as EXPERTS
from pallas_kernels.norm import fused_norm, rms_norm
from pallas_kernels.norm.specs import SPECS as NORMS
from pallas_kernels.qtensor import ActivationQuant, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.specs import SPECS as MATMULS
from pallas_kernels.quantize import quantize_activations, quantize_weights
from pallas_kernels.rope_cache import rope_cache
from pallas_kernels.rope_cache.specs import SPECS as HEADS
from pallas_kernels.sampling import argmax, sample
from pallas_kernels.sampling.specs import SPECS as VOCABULARIES
from pallas_kernels.softmax import softmax
from pallas_kernels.softmax.specs import SPECS as ROWS
from pallas_kernels.triangle_attention import triangle_attention
from pallas_kernels.triangle_attention.specs import SPECS as PAIRS

S: Any = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """run: of args. moved: bytes that are read or written at least once. operations: floating-point ones. matrix: whether the tensor cores
    do them. streams: it is bound by reading its arguments, once each. accumulators: bytes of partial sums that each processor hands on to a
    second launch. unused: bytes of its arguments that it has no need of. since: the oldest compute capability that it has a kernel for."""

    op: str
    name: str
    run: Callable[..., Any]
    args: tuple
    moved: int
    operations: float = 0
    matrix: bool = False
    streams: bool = False
    accumulators: int = 0
    unused: int = 0
    since: tuple[int, int] = OLDEST


def size(*trees: Any) -> int:
    """Bytes of arrays."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(trees))


def norms() -> Iterator[Case]:
    for rows, dtype in ((1, jnp.float32), (2048, jnp.bfloat16)):
        width = NORMS["llama_3_1_8b"].width
        x, scale = S((rows, width), dtype), S((width,), jnp.float32)
        name = f"llama_3_1_8b {rows}x{width} {jnp.dtype(dtype).name}"
        yield Case(
            op="rms_norm", name=name, run=functools.partial(rms_norm, eps=1e-5), args=(x, scale), moved=size(x, x, scale)
        )
    quant = ActivationQuant(group=None)
    run = lambda x, r, s: fused_norm(x, s, kind="rms", eps=1e-5, residual=r, quant=quant)
    yield Case(
        op="fused_norm", name=f"{name} + residual, int8", run=run, args=(x, x, scale), moved=size(x, x, x, scale) + x.size
    )

    def dropped(x, scale, bias):
        dropout = Dropout(rate=0.1, seed=jnp.arange(2, dtype=jnp.uint32))
        return fused_norm(x, scale, bias, kind="layer", eps=1e-5, activation="gelu", dropout=dropout)

    name = f"llama_3_1_8b {rows}x{width} {jnp.dtype(dtype).name}, layer norm, GELU, dropout"
    yield Case(op="fused_norm", name=name, run=dropped, args=(x, scale, scale), moved=size(x, x, scale, scale))


def softmaxes() -> Iterator[Case]:
    for rows, name in ((2048, "scores_8k"), (32, "llama_3_1_8b.vocab")):
        x = S((rows, ROWS[name].width), jnp.float32)
        yield Case(op="softmax", name=f"{name}, {rows} rows", run=softmax, args=(x,), moved=size(x, x))


def caches(spec, rows: int, tokens: int, dtype) -> LayerCache:
    return jax.eval_shape(
        lambda: LayerCache.zeros(rows=rows, kv_heads=spec.kv_heads, tokens=tokens, head_dim=spec.head_dim, dtype=dtype)
    )


def rope_caches() -> Iterator[Case]:
    spec = HEADS["llama_3_1_8b"]
    for tokens, dtype in ((1, "bfloat16"), (1, "int8"), (2048, "bfloat16")):
        heads = lambda n, tokens=tokens: S((1, tokens, n, spec.head_dim), jnp.float32)
        q, k, angles = heads(spec.heads), heads(spec.kv_heads), S((1, tokens, spec.rotated // 2), jnp.float32)
        cache = caches(spec, 1, 8192, dtype)
        written = size(cache) * tokens // 8192
        yield Case(
            op="rope_cache",
            name=f"llama_3_1_8b, {tokens} tokens, {dtype} cache",
            run=lambda q, k, v, cos, sin, cache, at: rope_cache(q, k, v, cos, sin, cache, rows=None, positions=at),
            args=(q, k, k, angles, angles, cache, S((1, tokens), jnp.int32)),
            moved=size(q, q, k, k, angles, angles) + written,
        )


def attentions() -> Iterator[Case]:
    """Queries at the end of a full cache: measured with positions that say so."""
    for model, rows, tokens, cached, dtype in (
        ("llama_3_1_8b", 1, 1, 8192, "bfloat16"),
        ("llama_3_1_8b", 16, 1, 8192, "bfloat16"),
        ("llama_3_1_8b", 16, 1, 8192, "int8"),
        ("llama_3_1_8b", 1, 1, 8192, "float32"),
        ("llama_3_1_8b", 1, 1, 8192, "int8"),
        ("llama_3_1_8b", 1, 1, 8192, "float8_e4m3fn"),
        ("llama_3_1_8b", 1, 4, 8192, "bfloat16"),
        ("gemma_2_9b", 1, 1, 8192, "bfloat16"),
        ("llama_2_7b", 8, 1, 4096, "bfloat16"),
        ("gemma_2_9b", 8, 1, 8192, "bfloat16"),
        ("llama_3_1_8b", 1, 4096, 4096, "bfloat16"),
        ("gemma_2_9b", 1, 4096, 4096, "bfloat16"),
        ("llama_3_1_8b", 1, 4096, 4096, "int8"),
    ):
        spec = HEADS[model]
        q, cache = S((rows, tokens, spec.heads, spec.head_dim), jnp.float32), caches(spec, rows, cached, dtype)
        seen = rows * (cached * tokens - tokens * (tokens - 1) // 2)

        def run(q, cache, soft_cap=spec.soft_cap, first=cached - tokens):
            at = jnp.broadcast_to(first + jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2]) if first else None
            return attention(q, cache, rows=None, positions=at, scale=0.1, soft_cap=soft_cap)

        yield Case(
            op="attention",
            name=f"{model}, {rows}x{tokens} queries, {cached} keys, {dtype} cache",
            run=run,
            args=(q, cache),
            moved=size(q, q, cache),
            operations=4.0 * seen * spec.heads * spec.head_dim,
            matrix=dtype != "float32",
            streams=tokens <= 4,
            since=NARROWEST_FP8 if "float8" in dtype else OLDEST,
        )


def attentions_for_training() -> Iterator[Case]:
    """Gradients of q, k and v, and attention of other kinds."""
    spec, tokens = HEADS["llama_3_1_8b"], 4096
    q, keys = S((1, tokens, spec.heads, spec.head_dim), jnp.float32), S((1, spec.kv_heads, tokens, spec.head_dim), jnp.bfloat16)
    loss = lambda q, k, v: attention(q, LayerCache(k=k, v=v), rows=None, positions=None, scale=0.1).sum()
    yield Case(
        op="attention",
        name=f"llama_3_1_8b, gradients of {tokens} tokens, bfloat16",
        run=jax.grad(loss, (0, 1, 2)),
        args=(q, keys, keys),
        moved=size(q, q, q, keys, keys, keys, keys),
        operations=7.0 * tokens**2 * spec.heads * spec.head_dim,
        matrix=True,
    )
    pairs = PAIRS["alphafold_2.256"]
    J, N, H = pairs.residues, pairs.heads, pairs.head_dim
    row, bias = S((1, J, J, N, H), jnp.bfloat16), S((1, N, J, J), jnp.float32)
    yield Case(
        op="triangle_attention",
        name=f"alphafold_2, {J} residues, bfloat16",
        run=functools.partial(triangle_attention, scale=0.2),
        args=(row, row, row, bias),
        moved=size(row, row, row, row, bias),
        operations=4.0 * J**3 * N * H,
        matrix=True,
    )


def latents() -> Iterator[Case]:
    """As bound by its products as by reading. That all processors read one sequence's cache has its price: what their accumulators hold is
    combined by a second launch, bytes in proportion to processors and not to the cache."""
    block = 32  # heads that a processor's accumulators are of
    for rows, cached in ((1, 8192), (16, 8192)):
        spec = LATENTS["deepseek_v3"]
        width = spec.latent + spec.rotated
        q, cache = S((rows, 1, spec.heads, width), jnp.float32), S((rows, cached, width), jnp.bfloat16)

        def run(q, cache, cached=cached, values=spec.latent):
            at = jnp.full(q.shape[:2], cached - 1, jnp.int32)
            return latent_attention(q, cache, values=values, positions=at, scale=0.1)

        yield Case(
            op="latent_attention",
            name=f"deepseek_v3, {rows} queries, {cached} tokens, bfloat16 cache",
            run=run,
            args=(q, cache),
            moved=size(q, cache) + 4 * rows * spec.heads * spec.latent,
            operations=2.0 * rows * cached * spec.heads * (width + spec.latent),
            matrix=True,
            streams=True,
            accumulators=block * (2 * spec.latent + 8),
        )


def samplings() -> Iterator[Case]:
    for rows in (1, 32):
        logits = S((rows, VOCABULARIES["llama_3_1_8b"].size), jnp.float32)
        yield Case(op="argmax", name=f"llama_3_1_8b, {rows} rows", run=argmax, args=(logits,), moved=size(logits))
        row = lambda dtype, rows=rows: S((rows,), dtype)
        run = lambda z, t, seeds, steps: sample(
            z,
            temperature=t + 1,  # measured with zeros
            top_k=jnp.zeros_like(steps),
            top_p=jnp.ones_like(t),
            min_p=jnp.zeros_like(t),
            seeds=seeds,
            steps=steps,
        )
        args = (logits, row(jnp.float32), row(jnp.uint32), row(jnp.int32))
        yield Case(op="sample", name=f"llama_3_1_8b, {rows} rows, temperature", run=run, args=args, moved=size(logits))
        cut = lambda z, t, seeds, steps: sample(
            z,
            temperature=t + 1,
            top_k=jnp.full_like(steps, 50),
            top_p=jnp.full_like(t, 0.9),
            min_p=jnp.zeros_like(t),
            seeds=seeds,
            steps=steps,
        )
        yield Case(op="sample", name=f"llama_3_1_8b, {rows} rows, top-k and top-p", run=cut, args=args, moved=size(logits))


FORMS: dict[str, dict] = {
    "int8": {"format": "int8"},
    "int4 g128": {"format": "int4", "group": 128},
    "int4 g64 zeros": {"format": "int4", "group": 64, "symmetric": False},
    "nf4 g64": {"format": "nf4", "group": 64},
    "mxfp4": {"format": "mxfp4", "group": 32},
    "fp8 g128": {"format": "fp8", "group": 128},
    "int8, int8 inputs": {"format": "int8", "activation": ActivationQuant()},
    "int8, int8 tokens": {"format": "int8", "activation": ActivationQuant(group=None)},
}


def weight(shape: tuple[int, ...], form: str) -> Any:
    """A weight of a form, or a float one of a dtype."""
    if form not in FORMS:
        return S(shape, form)
    return jax.eval_shape(lambda w: round_to_nearest(w, **FORMS[form]), S(shape, jnp.float32))


def matmuls() -> Iterator[Case]:
    for model, form, rows in (
        ("llama_3_1_8b.q", "bfloat16", 1),
        ("llama_3_1_8b.q", "int8", 1),
        ("llama_3_1_8b.q", "int4 g128", 1),
        ("llama_3_1_8b.down", "int4 g128", 1),
        ("llama_3_1_8b.down", "int4 g64 zeros", 1),
        ("llama_3_1_8b.down", "nf4 g64", 1),
        ("llama_3_1_8b.down", "mxfp4", 1),
        ("llama_3_1_8b.down", "fp8 g128", 1),
        ("llama_3_1_8b.down", "int4 g128", 16),
        ("llama_3_1_8b.down", "int8", 16),
        ("llama_3_1_8b.down", "int8, int8 inputs", 16),
        ("llama_3_1_8b.head", "bfloat16", 1),
        ("llama_3_1_8b.down", "int4 g128", 2048),
        ("llama_3_1_8b.down", "int8", 2048),
        ("llama_3_1_8b.down", "int8, int8 tokens", 2048),
    ):
        spec = MATMULS[model]
        x, w = S((rows, spec.inputs), jnp.float32), weight((spec.outputs, spec.inputs), form)
        moved = size(x, w) + 4 * rows * spec.outputs
        operations = 2.0 * rows * spec.outputs * spec.inputs
        name = f"{model}, {form}, {rows} rows"
        yield Case(
            op="quant_matmul",
            name=name,
            run=quant_matmul,
            args=(x, w),
            moved=moved,
            operations=operations,
            matrix=True,
            streams=rows <= 16,
        )


def attention_blocks() -> Iterator[Case]:
    """One token at the end of a full cache."""
    heads, width, cached = HEADS["llama_3_1_8b"], MATMULS["llama_3_1_8b.q"].inputs, 8192
    spec = AttentionSpec(head_dim=heads.head_dim, group=heads.heads // heads.kv_heads, scale=0.1, eps=1e-5)
    outputs = (heads.heads + 2 * heads.kv_heads) * heads.head_dim
    for form in ("bfloat16", "int4 g128"):
        qkv, out = weight((outputs, width), form), weight((width, width), form)
        weights = AttentionWeights(norm=S((width,), jnp.float32), qkv=(qkv,), qkv_bias=(), out=out, out_bias=None)
        x, cache = S((1, 1, width), jnp.float32), caches(heads, 1, cached, "bfloat16")
        angles = S((1, 1, heads.rotated // 2), jnp.float32)

        def run(x, weights, cache, cos, sin):
            at = jnp.full(x.shape[:2], cached - 1, jnp.int32)
            return attention_block(x, weights, cache, spec=spec, angles=(cos, sin), positions=at, residual=x)

        yield Case(
            op="attention_block",
            name=f"llama_3_1_8b, {form}, {cached} tokens in a bfloat16 cache",
            run=run,
            args=(x, weights, cache, angles, angles),
            moved=size(x, x, weights, cache),
            matrix=True,
        )


def mlp_blocks() -> Iterator[Case]:
    gate, down = MATMULS["llama_3_1_8b.gate"], MATMULS["llama_3_1_8b.down"]
    spec = MLPSpec(activation="silu", gated=True, eps=1e-5)
    for form, rows in (("bfloat16", 1), ("int8", 1), ("int4 g128", 1), ("int4 g128", 2048)):
        up = (weight((2 * gate.outputs, gate.inputs), form),)
        vector = S((gate.inputs,), jnp.float32)
        weights = MLPWeights(norm=vector, up=up, up_bias=(), down=weight((down.outputs, down.inputs), form), down_bias=None)
        x = S((1, rows, gate.inputs), jnp.float32)
        yield Case(
            op="mlp_block",
            name=f"llama_3_1_8b, {form}, {rows} rows",
            run=lambda x, w: mlp_block(x, w, spec=spec, residual=x),
            args=(x, weights),
            moved=size(x, x, weights),
            operations=6.0 * rows * gate.outputs * gate.inputs,
            matrix=True,
            streams=rows <= 16,
        )


def experts() -> Iterator[Case]:
    """Rows that go to the first experts in equal parts; and the choice of experts with the order of rows."""
    for model, form, tokens in (("mixtral_8x7b", "int4 g128", 1), ("qwen3_30b_a3b", "int8", 1), ("qwen3_30b_a3b", "int8", 512)):
        spec = EXPERTS[model]
        rows, used = tokens * spec.chosen, min(spec.experts, tokens * spec.chosen)
        w = weight((spec.experts, 2 * spec.hidden, spec.embed), form)
        x = S((tokens, spec.embed), jnp.float32)

        def run(x, w, rows=rows, used=used):
            sizes = jnp.where(jnp.arange(w.shape[0]) < used, rows // used, 0).astype(jnp.int32)
            return grouped_matmul(x, w, sizes, rows=jnp.arange(rows) % x.shape[0], activation="silu", gated=True)

        unused = size(w) * (spec.experts - used) // spec.experts
        yield Case(
            op="grouped_matmul",
            name=f"{model}, {form}, {tokens} tokens",
            run=run,
            args=(x, w),
            moved=size(x, w) - unused + 4 * rows * spec.hidden,
            operations=4.0 * rows * spec.hidden * spec.embed,
            matrix=True,
            streams=tokens == 1,
            unused=unused,
        )
    for model, tokens in (("deepseek_v3", 1), ("deepseek_v3", 16), ("qwen3_30b_a3b", 2048)):
        spec = EXPERTS[model]
        logits = S((tokens, spec.experts), jnp.float32)

        def choose(logits, spec=spec):
            routing = route(logits, normalise=True, **spec.routing)
            return routing.experts, routing.weights, in_order(routing, spec.experts)

        made = size(jax.eval_shape(choose, logits))
        yield Case(op="route", name=f"{model}, {tokens} tokens", run=choose, args=(logits,), moved=size(logits) + made)


def elementwise() -> Iterator[Case]:
    spec = HIDDEN["llama_3_1_8b"]
    x = S((2048, 2 * spec.width), jnp.bfloat16)
    run = lambda x: activation(x, kind=spec.kind, gated=spec.gated)
    yield Case(op="activation", name="llama_3_1_8b, 2048 rows", run=run, args=(x,), moved=size(x) * 3 // 2)
    x = S((2048, spec.width), jnp.bfloat16)
    levels = lambda x: quantize_activations(x, ActivationQuant())
    yield Case(
        op="quantize_activations", name="llama_3_1_8b, 2048 rows", run=levels, args=(x,), moved=size(x) + x.size + x.size // 16
    )
    w = S((4096, 14336), jnp.bfloat16)
    yield Case(
        op="quantize_weights",
        name="llama_3_1_8b.down, int8",
        run=functools.partial(quantize_weights, format="int8", group=None),
        args=(w,),
        moved=size(w) + w.size + 4 * w.shape[0],
    )
    z, targets = S((512, VOCABULARIES["llama_3_1_8b"].size), jnp.float32), S((512,), jnp.int32)
    yield Case(op="log_probs", name="llama_3_1_8b, 512 tokens", run=log_probs, args=(z, targets), moved=size(z, targets))


ROOMS: tuple[Callable[[], Iterator[Case]], ...] = (
    norms,
    rope_caches,
    attentions,
    attentions_for_training,
    latents,
    softmaxes,
    samplings,
    matmuls,
    attention_blocks,
    mlp_blocks,
    experts,
    elementwise,
)


def cases() -> list[Case]:
    return [case for room in ROOMS for case in room()]
