"""What every GPU kernel is compiled for without a GPU: each implementation at the sizes of all models of its room, in all element types.

A program is one of these. What differs in numbers of rows alone is here once: they are the grid's.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activation import activation
from pallas_kernels.activation.specs import SPECS as HIDDEN
from pallas_kernels.attention import attention
from pallas_kernels.attention.terms import AttentionTerms
from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.cross_entropy import log_probs
from pallas_kernels.cross_entropy.specs import SPECS as TARGETS
from pallas_kernels.dropout import Dropout
from pallas_kernels.kernel_math import power_of_two
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.latent_attention.specs import SPECS as LATENTS
from pallas_kernels.launch import NARROWEST_FP8, OLDEST
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.models import MODELS
from pallas_kernels.moe import grouped_matmul, route, sort_tokens
from pallas_kernels.moe.specs import SPECS as EXPERTS
from pallas_kernels.norm import fused_norm, layer_norm, rms_norm
from pallas_kernels.norm.specs import SPECS as NORMS
from pallas_kernels.qtensor import ActivationQuant, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.fused import Norm, fused_matmul
from pallas_kernels.quant_matmul.specs import SPECS as MATMULS
from pallas_kernels.quant_matmul.specs import TINY
from pallas_kernels.quant_matmul.tiles import SMALL
from pallas_kernels.quantize import quantize_activations, quantize_weights
from pallas_kernels.quantize.specs import SPECS as QUANTIZED
from pallas_kernels.rope_cache import rope, rope_cache
from pallas_kernels.rope_cache.specs import SPECS as HEADS
from pallas_kernels.sampling import argmax, sample
from pallas_kernels.sampling.specs import SPECS as VOCABULARIES
from pallas_kernels.softmax import softmax
from pallas_kernels.softmax.specs import SPECS as ROWS
from pallas_kernels.triangle_attention import triangle_attention
from pallas_kernels.triangle_attention.specs import SPECS as PAIRS

S: Any = jax.ShapeDtypeStruct
FLOATS = ("float32", "bfloat16")
CACHES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
FORMS = {
    "int8": {"format": "int8"},
    "int8-64": {"format": "int8", "group": 64},
    "int4-32": {"format": "int4", "group": 32},
    "int4-64": {"format": "int4", "group": 64},
    "int4-128": {"format": "int4", "group": 128},
    "int4-32-minimum": {"format": "int4", "group": 32, "symmetric": False},
    "int4-64-zeros": {"format": "int4", "group": 64},
    "fp8": {"format": "fp8"},
    "fp8-128": {"format": "fp8", "group": 128},
    "nf4-64": {"format": "nf4", "group": 64},
    "mxfp4": {"format": "mxfp4", "group": 32},
}
INPUTS = {
    "groups": ActivationQuant(),
    "token": ActivationQuant(group=None),
    "fp8 token": ActivationQuant(group=None, format="fp8"),
    "fp8-128": ActivationQuant(group=128, format="fp8"),
}
LEVELS = (("int8", "groups"), ("int8", "token"), ("int4-128", "groups"), ("fp8", "fp8 token"), ("fp8-128", "fp8-128"))
ROUNDED = ("int8", "int8-64", "int4-32", "int4-128", "int4-32-minimum", "fp8")  # what a GPU rounds weights to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """run: of args. kernels: of ours that it launches. matrix: the first of them multiplies on tensor cores. loads: bytes that one thread
    of it reads at once, at least. tiled: sizes are but numbers in it beside its tiles. since: the oldest compute capability that it has a
    kernel for."""

    name: str
    run: Callable[..., Any]
    args: tuple
    kernels: tuple[str, ...]
    matrix: bool = False
    loads: int = 0
    tiled: bool = False
    since: tuple[int, int] = OLDEST


def since(*formats: Any) -> tuple[int, int]:
    """The oldest compute capability that converts all of these."""
    return NARROWEST_FP8 if any("fp8" in str(f) or "float8" in str(f) for f in formats) else OLDEST


def weight(shape: tuple[int, ...], form: str, inputs: str | None = None) -> Any:
    """A weight [..., O, I] of a form, or a float one of a dtype. inputs: what is multiplied with it is rounded so."""
    if form not in FORMS:
        return S(shape, form)
    make = functools.partial(round_to_nearest, **FORMS[form], activation=INPUTS[inputs] if inputs else None)
    w = jax.eval_shape(make, S(shape, jnp.float32))
    return w.replace(zeros=S(w.scales.shape, jnp.uint8)) if form.endswith("zeros") else w


def norms(name: str, run: Callable[..., Any], vectors: int) -> Iterator[Program]:
    spec = NORMS[name]
    for dtype in FLOATS:
        args = (S((7, spec.width), dtype), *[S((spec.width,), jnp.float32)] * vectors)
        yield Program(name=dtype, run=functools.partial(run, eps=spec.eps), args=args, kernels=("norm",))


def fused_norms(name: str) -> Iterator[Program]:
    spec = NORMS[name]
    seed = S((2,), jnp.uint32)
    for dtype, quant in itertools.product(FLOATS, (None, *INPUTS.values())):

        def run(x, scale, bias, seed, quant=quant):
            more = {"dropout": Dropout(rate=0.1, seed=seed)} if quant is None else {"quant": quant}
            return fused_norm(x, scale, bias, kind="layer", eps=spec.eps, residual=x, activation="gelu", **more)

        args = (S((7, spec.width), dtype), *[S((spec.width,), jnp.float32)] * 2, seed)
        yield Program(name=f"{dtype}, {quant}", run=run, args=args, kernels=("norm",), since=since(quant and quant.format))


def activations(name: str) -> Iterator[Program]:
    spec = HIDDEN[name]
    for dtype, quant in itertools.product(FLOATS, (None, *INPUTS.values())):
        x = S((7, spec.width * (2 if spec.gated else 1)), dtype)
        run = functools.partial(activation, kind=spec.kind, gated=spec.gated, quant=quant)
        kernels = ("activation",)
        yield Program(name=f"{dtype}, {quant}", run=run, args=(x,), kernels=kernels, since=since(quant and quant.format))


def parts_of_vocabularies(name: str) -> Iterator[Program]:
    spec = TARGETS[name]
    for dtype in FLOATS:
        args = (S((spec.tokens, spec.vocabulary), dtype), S((spec.tokens,), jnp.int32))
        yield Program(name=dtype, run=log_probs, args=args, kernels=("cross_entropy",))


def softmaxes(name: str) -> Iterator[Program]:
    for dtype, masked in itertools.product(FLOATS, (False, True)):
        shape = (4, ROWS[name].width)
        args = (S(shape, dtype), *[S(shape, jnp.bool_)] * masked)
        yield Program(name=f"{dtype}, masked {masked}", run=softmax, args=args, kernels=("softmax",))


def levels_of_activations(name: str) -> Iterator[Program]:
    spec = QUANTIZED[name]
    for dtype, format in itertools.product(FLOATS, ("int8", "fp8")):
        run = functools.partial(quantize_activations, quant=ActivationQuant(group=spec.group, format=format))
        args = (S((4, spec.inputs), dtype),)
        yield Program(name=f"{dtype}, {format}", run=run, args=args, kernels=("quantize_activations",), since=since(format))


def levels_of_weights(name: str) -> Iterator[Program]:
    spec = MATMULS[name]
    for dtype, form in itertools.product(FLOATS, ROUNDED):
        if spec.inputs % FORMS[form].get("group", 1) == 0:
            args, run = (S((spec.outputs, spec.inputs), dtype),), functools.partial(quantize_weights, **FORMS[form])
            yield Program(
                name=f"{dtype}, {form}", run=run, args=args, kernels=("quantize_weights",), tiled=True, since=since(form)
            )


def cache_of(spec: Any, rows: int, tokens: int, dtype: str) -> LayerCache:
    make = functools.partial(LayerCache.zeros, rows=rows, kv_heads=spec.kv_heads, tokens=tokens, head_dim=spec.head_dim)
    return jax.eval_shape(functools.partial(make, dtype=dtype))


def ropes(name: str) -> Iterator[Program]:
    spec = HEADS[name]
    tokens = 300
    for dtype, interleaved in itertools.product(FLOATS, (False, True)):
        angles = S((2, tokens, spec.rotated // 2), jnp.float32)
        run = functools.partial(rope, interleaved=interleaved)
        args = (S((2, tokens, spec.heads, spec.head_dim), dtype), angles, angles)
        yield Program(name=f"{dtype}, interleaved {interleaved}", run=run, args=args, kernels=("rope_cache",))


def rope_caches(name: str) -> Iterator[Program]:
    """Of one token into a page, and of many into a row; in common dtypes the other way round too."""
    spec = HEADS[name]
    cases = itertools.product(CACHES, ((1, 64), (300, None)))
    for dtype, (tokens, page) in (*cases, *itertools.product(("bfloat16", "int8"), ((1, None), (300, 64)))):
        heads = lambda n, tokens=tokens: S((4, tokens, n, spec.head_dim), jnp.float32)
        angles = S((4, tokens, spec.rotated // 2), jnp.float32)
        cache = cache_of(spec, *((4, 4096) if page is None else (4 * 4096 // page, page)), dtype)
        args = (heads(spec.heads), *[heads(spec.kv_heads)] * 2, angles, angles, cache, S((4, tokens), jnp.int32))
        args = args if page is None else (*args, S((4, 4096 // page), jnp.int32))

        def run(q, k, v, cos, sin, cache, positions, rows=None):
            return rope_cache(q, k, v, cos, sin, cache, rows=rows, positions=positions)

        title = f"{dtype}, {tokens} tokens, pages of {page}"
        yield Program(name=title, run=run, args=args, kernels=("rope_cache",), since=since(dtype))


def attentions(name: str) -> Iterator[Program]:
    """Of one query over a row, of a few under a window over pages, of many under a window over a row; where decoding and reading prompts
    know no window, over pages too; then its gradients."""
    spec = HEADS[name]
    cases = itertools.product(CACHES, ((1, None, False), (4, 64, True), (300, None, True)))
    for dtype, (tokens, page, windowed) in (
        *cases,
        *itertools.product(("bfloat16", "int8"), ((1, 64, False), (300, 64, False))),
    ):
        cache = cache_of(spec, *((1, 8192) if page is None else (8192 // page, page)), dtype)
        args = (S((1, tokens, spec.heads, spec.head_dim), jnp.float32), cache, S((1, tokens), jnp.int32), S((), jnp.int32))
        args = args if page is None else (*args, S((1, 8192 // page), jnp.int32))

        def run(q, cache, positions, window, rows=None, windowed=windowed):
            more = {"window": window} if windowed else {}
            return attention(q, cache, rows=rows, positions=positions, scale=0.1, soft_cap=spec.soft_cap, **more)

        few = tokens * spec.heads // spec.kv_heads <= 64
        kernels = ("decode_attention", "decode_reduce") if few else ("prefill_attention",)
        checks = {"matrix": dtype != "float32", "loads": 16 if few and name != "odd" else 0}
        title = f"{dtype}, {tokens} queries, pages of {page}, window {windowed}"
        yield Program(name=title, run=run, args=args, kernels=kernels, **checks, since=since(dtype))
    for dtype in CACHES[:3]:
        keys, lengths = S((1, spec.kv_heads, 512, spec.head_dim), dtype), S((1,), jnp.int32)

        def loss(q, k, v, lengths):
            terms = {"terms": AttentionTerms(lengths=lengths), "soft_cap": spec.soft_cap}
            return attention(q, LayerCache(k=k, v=v), rows=None, positions=None, scale=0.1, **terms).sum()

        args = (S((1, 512, spec.heads, spec.head_dim), jnp.float32), keys, keys, lengths)
        kernels = ("prefill_attention", "attention_dq", "attention_dkv")
        run = jax.grad(loss, (0, 1, 2))
        yield Program(name=f"{dtype}, gradients", run=run, args=args, kernels=kernels, matrix=dtype != "float32")


def latents(name: str) -> Iterator[Program]:
    spec = LATENTS[name]
    size = spec.latent + spec.rotated
    for dtype, (B, T) in (*zip(CACHES, itertools.repeat((1, 1)), strict=False), ("bfloat16", (4, 2))):

        def run(q, cache, positions, scales=None):
            return latent_attention(q, cache, values=spec.latent, positions=positions, scale=0.1, scales=scales)

        scales = [S((B, 8192), jnp.float32)] * (jnp.dtype(dtype).itemsize == 1)
        args = (S((B, T, spec.heads, size), jnp.float32), S((B, 8192, size), dtype), S((B, T), jnp.int32), *scales)
        kernels = ("latent_attention", "latent_reduce")
        checks = {"matrix": dtype != "float32", "loads": 0 if name == "odd" else 16}
        title = f"{dtype}, {B} x {T} queries"
        yield Program(name=title, run=run, args=args, kernels=kernels, **checks, since=since(dtype))


def triangles(name: str) -> Iterator[Program]:
    """With their gradients."""
    J, N, H = PAIRS[name].residues, PAIRS[name].heads, PAIRS[name].head_dim
    for dtype in ("float32", "bfloat16", "float16"):

        def loss(q, k, v, bias, mask):
            return triangle_attention(q, k, v, bias, mask, scale=0.2).astype(jnp.float32).sum()

        row = S((1, J, J, N, H), dtype)
        args = (row, row, row, S((1, N, J, J), jnp.float32), S((1, J, J), jnp.bool_))
        kernels = ("triangle_attention", "triangle_dq", "triangle_dkv", "triangle_dbias")
        run = jax.grad(loss, (0, 1, 2, 3))
        yield Program(name=dtype, run=run, args=args, kernels=kernels, matrix=dtype != "float32")


def routes(name: str) -> Iterator[Program]:
    spec = EXPERTS[name]
    for tokens, dtype in ((1, "float32"), (16, "bfloat16"), (64, "float32"), (8192, "float32")):
        run = lambda logits, bias: route(logits, bias=bias, normalise=True, **spec.routing)
        args = (S((tokens, spec.experts), dtype), S((spec.experts,), jnp.float32))
        yield Program(name=f"{dtype}, {tokens} tokens", run=run, args=args, kernels=("route",))


def sorts(name: str) -> Iterator[Program]:
    spec = EXPERTS[name]
    for tokens in (1, 64, 65536):
        one = tokens * spec.chosen * power_of_two(spec.experts) <= 4 * 4096
        kernels = ("sort",) if one else ("count", "sort")
        run = functools.partial(sort_tokens, count=spec.experts)
        args = (S((tokens, spec.chosen), jnp.int32),)
        yield Program(name=f"{tokens} tokens", run=run, args=args, kernels=kernels)


def experts(name: str) -> Iterator[Program]:
    spec = EXPERTS[name]
    shape = (spec.experts, 2 * spec.hidden, spec.embed)
    forms = ("bfloat16", "int8", "int4-32", "int4-128")
    for (form, inputs), tokens in itertools.product((*((f, None) for f in forms), ("int8", "groups")), (1, 16, 512)):
        if spec.embed % FORMS.get(form, {}).get("group", 1):
            continue
        run = lambda x, w, sizes: grouped_matmul(x, w, sizes, activation="silu", gated=True)
        x, sizes = S((tokens * spec.chosen, spec.embed), jnp.float32), S((spec.experts,), jnp.int32)
        kernels = ("quant_matmul",) if inputs is None else ("quant_matmul", "quantize_activations")
        args = (x, weight(shape, form, inputs), sizes)
        title, oldest = f"{form}, {inputs}, {tokens} tokens", since(inputs)
        yield Program(name=title, run=run, args=args, kernels=kernels, matrix=True, tiled=True, since=oldest)


def argmaxes(name: str) -> Iterator[Program]:
    for dtype in FLOATS:
        kernels = ("choose", "choose_of_blocks")
        yield Program(name=dtype, run=argmax, args=(S((3, VOCABULARIES[name].size), dtype),), kernels=kernels)


def draws(name: str) -> Iterator[Program]:
    row = lambda dtype: S((3,), dtype)

    def run(logits, temperature, top_k, top_p, min_p, seeds, steps):
        knobs = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seeds": seeds, "steps": steps}
        return sample(logits, temperature=temperature, **knobs)

    args = (S((3, VOCABULARIES[name].size), jnp.float32), row("float32"), row("int32"), row("float32"), row("float32"))
    args = (*args, row("uint32"), row("int32"))
    kernels = ("choose", "choose_of_blocks", "threshold", "threshold_of_sums")
    yield Program(name="all", run=run, args=args, kernels=kernels, tiled=True)


def matmuls(name: str) -> Iterator[Program]:
    spec = MATMULS[name]
    forms, all_rows = [(form, None) for form in ("bfloat16", "float16", *FORMS)] + [*LEVELS], (1, 16, 512)
    if name.startswith("odd"):
        forms, all_rows = forms[::3], (1, 512)
    elif name == "llama_3_1_8b.q":
        all_rows = (1, 2, 4, 8, 16, 40, 512)
    for (form, inputs), rows in itertools.product(forms, all_rows):
        if (form not in FORMS and rows > SMALL) or spec.inputs % FORMS.get(form, {}).get("group", 1):
            continue
        args = (S((rows, spec.inputs), jnp.float32), weight((spec.outputs, spec.inputs), form, inputs))
        kernels = ("quant_matmul",) if inputs is None else ("quant_matmul", "quantize_activations")
        checks = {"matrix": True, "loads": 0 if name.startswith("odd") else 8}
        title, oldest = f"{form}, {inputs}, {rows} rows", since(inputs)
        yield Program(name=title, run=quant_matmul, args=args, kernels=kernels, **checks, tiled=True, since=oldest)


def fused_matmuls(name: str) -> Iterator[Program]:
    """Gate and up with everything before and behind them; many rows have the norm before them."""
    m = MODELS[name]
    forms = ("bfloat16", "int8", "int4-64-zeros", "int4-128")
    for form, (rows, kind) in itertools.product(forms, ((1, "rms"), (1, "layer"), (8, "rms"), (16, "rms"), (512, "rms"))):
        if (form not in FORMS and rows > SMALL) or m.embed % FORMS.get(form, {}).get("group", 1):
            continue

        def run(x, up, bias, scale, residual, kind=kind):
            norm = Norm(kind=kind, eps=m.eps, scale=scale, bias=scale if kind == "layer" else None)
            return fused_matmul(x, (up,), biases=(bias,), norm=norm, activation="silu", gated=True, residual=residual)

        row = functools.partial(S, dtype=jnp.float32)
        args = (
            row((rows, m.embed)),
            weight((2 * m.mlp, m.embed), form),
            row((2 * m.mlp,)),
            row((m.embed,)),
            row((rows, m.mlp)),
        )
        kernels = ("quant_matmul",) if rows <= SMALL else ("quant_matmul", "norm")
        title = f"{form}, {rows} rows, {kind}"
        yield Program(name=title, run=run, args=args, kernels=kernels, matrix=True, tiled=True)


def mlp_blocks(name: str) -> Iterator[Program]:
    m = MODELS[name]
    spec = MLPSpec(activation="silu", gated=True, eps=m.eps)
    for form, rows in itertools.product(("bfloat16", "int8", "int4-32"), (1, 512)):
        if m.embed % FORMS.get(form, {}).get("group", 1):
            continue
        vector, down = S((m.embed,), jnp.float32), weight((m.embed, m.mlp), form)
        weights = MLPWeights(norm=vector, up=(weight((2 * m.mlp, m.embed), form),), up_bias=(), down=down, down_bias=None)
        run = lambda x, w: mlp_block(x, w, spec=spec, residual=x)
        kernels = ("quant_matmul",) if rows == 1 else ("quant_matmul", "norm") if form in FORMS else ("norm",)
        x = S((1, rows, m.embed), jnp.float32)
        yield Program(name=f"{form}, {rows} rows", run=run, args=(x, weights), kernels=kernels, tiled=True)


def attention_blocks(name: str) -> Iterator[Program]:
    m = MODELS[name]
    spec = AttentionSpec(head_dim=m.head_dim, group=m.heads // m.kv_heads, scale=0.1, eps=m.eps, soft_cap=m.soft_cap)
    for (form, dtype), tokens in itertools.product((("bfloat16", "bfloat16"), ("int4-32", "int8")), (1, 300)):
        if m.embed % FORMS.get(form, {}).get("group", 1):
            continue
        outputs = (m.heads + 2 * m.kv_heads) * m.head_dim
        qkv, out = weight((outputs, m.embed), form), weight((m.embed, m.heads * m.head_dim), form)
        weights = AttentionWeights(norm=S((m.embed,), jnp.float32), qkv=(qkv,), qkv_bias=(), out=out, out_bias=None)

        def run(x, weights, cache, cos, sin, positions):
            return attention_block(x, weights, cache, spec=spec, angles=(cos, sin), positions=positions, residual=x)

        x, angles = S((1, tokens, m.embed), jnp.float32), S((1, tokens, m.head_dim // 2), jnp.float32)
        args = (x, weights, cache_of(m, 1, 8192, dtype), angles, angles, S((1, tokens), jnp.int32))
        kernels = ("norm",) if tokens > 1 else ()
        kernels += ("quant_matmul",) if tokens == 1 or form in FORMS else ()
        kernels += ("rope_cache", *(("decode_attention", "decode_reduce") if tokens == 1 else ("prefill_attention",)))
        yield Program(name=f"{form}, {dtype} cache, {tokens} tokens", run=run, args=args, kernels=kernels)


# by operation: names of its sizes, and the programs at one of them; all through Pallas and Triton
PRODUCTS: dict[str, tuple[Any, Callable[[str], Iterator[Program]]]] = {
    "activation": (HIDDEN, activations),
    "argmax": (VOCABULARIES, argmaxes),
    "attention": (HEADS, attentions),
    "attention_block": (("smollm2_135m", "llama_3_1_8b"), attention_blocks),
    "fused_matmul": (MODELS, fused_matmuls),
    "fused_norm": (NORMS, fused_norms),
    "grouped_matmul": (EXPERTS, experts),
    "latent_attention": (LATENTS, latents),
    "layer_norm": (NORMS, functools.partial(norms, run=layer_norm, vectors=2)),
    "mlp_block": (MODELS, mlp_blocks),
    "quant_matmul": ({(spec.outputs, spec.inputs): name for name, spec in reversed(MATMULS.items())}.values(), matmuls),
    "quantize_activations": (QUANTIZED, levels_of_activations),
    "quantize_weights": (
        ("llama_3_1_8b.q", "llama_3_1_8b.down", "llama_2_7b.down", "smollm2_135m.q", *TINY),
        levels_of_weights,
    ),
    "rms_norm": (NORMS, functools.partial(norms, run=rms_norm, vectors=1)),
    "rope": (HEADS, ropes),
    "rope_cache": (HEADS, rope_caches),
    "route": (EXPERTS, routes),
    "sample": (VOCABULARIES, draws),
    "softmax": (ROWS, softmaxes),
    "sort_tokens": (EXPERTS, sorts),
    "triangle_attention": (PAIRS, triangles),
    "vocabulary_parts": (TARGETS, parts_of_vocabularies),
}
