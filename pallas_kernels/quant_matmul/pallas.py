"""Matmuls with float and quantised weights on tensor cores, for NVIDIA GPUs through Pallas and Triton; `tiles` says how they are cut.

The levels of a weight go into the tensor core as they are, bfloat16 or int8, and scales follow in float32: per output after the last
step, per group after each step. With many rows of x that second form would cost more than it saves: there a group's scale is multiplied
into the weights before the product, rounded to bfloat16 once.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gpus
from pallas_kernels.launch import NARROWEST_FP8, gpu_refusal, launch
from pallas_kernels.moe import reference as moe_reference
from pallas_kernels.norm import fused_norm
from pallas_kernels.qtensor import QTensor, packing_block
from pallas_kernels.quant_matmul import fused
from pallas_kernels.quant_matmul.decoding import BYTES, NIBBLES, stored
from pallas_kernels.quant_matmul.pallas_kernel import Spec, kernel
from pallas_kernels.quant_matmul.terms import inputs_dtype, terms
from pallas_kernels.quant_matmul.tiles import SMALL, Problem, check, heuristic, rows_of_expert
from pallas_kernels.quantize import quantize_activations
from pallas_kernels.target import current_target
from pallas_kernels.tuning import tile_for

FLOATS = ("bfloat16", "float16")


def supports_quant_matmul(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if not facts["rows"] or not facts["outputs"] or not facts["inputs"]:
        return "there is nothing to multiply"
    known = {name: facts[name] for name in ("format", "group", "layout", "activation", "zeros")}
    return _rows_refusal(facts["rows"], facts["format"]) or weight_refusal(
        target, **known, elements=facts["outputs"] * facts["inputs"]
    )


def _rows_refusal(rows: int, format: str) -> str | None:
    if format in FLOATS and rows > SMALL:
        return f"cuBLAS, which XLA calls, is the better one for {rows} rows of floats; this takes up to {SMALL}"
    return None


def weight_refusal(target, *, format, group, layout, activation, zeros, elements) -> bool | str:
    """Why the kernel cannot take a weight, or True."""
    if format in FLOATS:
        return True
    if format not in NIBBLES + BYTES:
        return f"it multiplies {', '.join(FLOATS + NIBBLES + BYTES)} weights, not {format}"
    if format not in NIBBLES and 1 << 31 <= elements <= 1 << 32:
        # Triton's indices are 32 bits wide and signed up to arrays of 4 GiB
        return f"it cannot index {elements} weights of a byte"
    if layout != "canonical":
        return f"it reads the canonical layout, not {layout!r}; use qtensor.repack"
    capability = target.capability
    inputs = None if activation is None else activation.format
    if inputs == "fp8" and capability is not None and capability < NARROWEST_FP8:
        return f"{target.device_kind} does not multiply float8_e4m3fn"
    if group is not None and (group < 32 or group & (group - 1)):
        return f"it takes groups of 32, 64, 128 and further powers of two, not {group}"
    if (
        activation is not None
        and activation.group is not None
        and (activation.group < 32 or activation.group & (activation.group - 1))
    ):
        return f"it takes input scales per token, or per power of two from 32 on, not per {activation.group}"
    if activation is not None and activation.static:
        return "it takes the scales of inputs from the inputs, not a static one"
    if inputs == "int8" and (format not in ("int8", "int4") or zeros is not None):
        return f"int8 inputs meet symmetric int8 and int4 weights here, not {format} with zeros {zeros}"
    return True


def supports_grouped_matmul(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to multiply"
    return weight_refusal(target, **_form(facts["weight"]), elements=math.prod(facts["weight"].shape))


def supports_fused_matmul(target, facts) -> bool | str:
    if (refused := weights_refusal(target, facts)) is not True:
        return refused
    return _rows_refusal(math.prod(facts["shape"][:-1]), _form(facts["weights"][0])["format"]) or True


def weights_refusal(target, facts) -> bool | str:
    """Why the kernel cannot take the weights of a fused matmul, with however many rows, or True."""
    if reason := gpu_refusal(target):
        return reason
    if 0 in facts["shape"]:
        return "there is nothing to multiply"
    forms = [_form(w) for w in facts["weights"]]
    if any(form != forms[0] for form in forms):
        return "it takes weights of one form"
    return weight_refusal(target, **forms[0], elements=max(math.prod(w.shape) for w in facts["weights"]))


def _form(w) -> dict:
    if not isinstance(w, QTensor):
        return {"format": str(w.dtype), "group": None, "layout": "canonical", "activation": None, "zeros": None}
    form = {name: getattr(w, name) for name in ("format", "group", "layout", "activation")}
    return form | {"zeros": None if w.zeros is None else str(w.zeros.dtype)}


def quant_matmul(x, w, *, bias, max_over_shards):
    call = fused.Call(
        activation=None, gated=False, kind=None, eps=0.0, out_dtype=jnp.dtype(jnp.float32), max_over_shards=max_over_shards
    )
    biases = () if bias is None else (bias,)
    return fused_matmul(fused.Operands(x=x, weights=(w,), biases=biases, scale=None, norm_bias=None, residual=None), call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fused_matmul(operands: fused.Operands, call: fused.Call):
    """See `fused.fused_matmul`."""
    x = operands.x
    rows = math.prod(x.shape[:-1])
    first = operands.weights[0]
    quant = first.activation if isinstance(first, QTensor) else None
    norm_inside = call.kind is not None and rows <= SMALL and quant is None
    x_scales = None
    if call.kind is not None and not norm_inside:
        # a norm sees whole rows, so that its output has scales without other shards
        dtype = inputs_dtype(first, rows) if isinstance(first, QTensor) and x.dtype == jnp.float32 else x.dtype
        standardise = functools.partial(fused_norm, kind=call.kind, eps=call.eps, quant=quant, out_dtype=dtype)
        made = standardise(x, operands.scale, operands.norm_bias)
        x, x_scales = made.y, made.scales
    elif quant is not None:
        x, x_scales = quantize_activations(x, quant, call.max_over_shards)
    x = x.reshape(rows, -1)
    x_scales = None if x_scales is None else x_scales.reshape(rows, -1)
    biases = operands.biases or (None,) * len(operands.weights)
    residual = None if operands.residual is None else operands.residual.reshape(rows, -1)
    normed = (operands.scale, operands.norm_bias) if norm_inside else None
    make = functools.partial(_product, x, x_scales, normed=normed, lead=operands.lead, call=call)
    if (call.gated and len(operands.weights) == 2) or len(operands.weights) == 1:
        y = make(operands.weights, biases, residual=residual)
    else:
        parts, start = [], 0
        for w, b in zip(operands.weights, biases, strict=True):
            stop = start + w.shape[0]
            parts.append(make((w,), (b,), residual=None if residual is None else residual[:, start:stop]))
            start = stop
        y = jnp.concatenate(parts, -1)
    return y.reshape(*operands.x.shape[:-1], y.shape[-1])


def _forward(operands, call):
    return fused_matmul(operands, call), operands


def _backward(call, operands, gradient):
    _, pull = jax.vjp(lambda o: fused.compose(o, call, implementation="reference"), operands)
    return pull(gradient)


fused_matmul.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Experts:
    """Rows in the order of experts. sizes: int32 [count], rows of each. rows: int32 [N], which of x each is, or None."""

    sizes: jax.Array
    count: int
    rows: jax.Array | None

    def blocks(self, rows: int, block: int) -> int:
        """Blocks of so many rows of one expert, at most: where each expert's last one holds a single row."""
        return (rows + min(self.count, rows) * (block - 1)) // block


def grouped_matmul(x, w, sizes, bias, rows, *, activation, gated, out_dtype):
    return _grouped(x, w, sizes, bias, rows, activation, gated, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _grouped(x, w, sizes, bias, rows, activation, gated, out_dtype):
    count = w.shape[0]
    call = fused.Call(activation=activation, gated=gated, kind=None, eps=0.0, out_dtype=out_dtype, max_over_shards=None)
    x_scales = None
    if isinstance(w, QTensor) and w.activation is not None:
        x, x_scales = quantize_activations(x, w.activation)
    flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), w)
    biases = (None if bias is None else bias.reshape(-1),)
    experts = _Experts(sizes=sizes, count=count, rows=rows)
    return _product(x, x_scales, (flat,), biases, residual=None, normed=None, call=call, experts=experts)


def _grouped_forward(x, w, sizes, bias, rows, *static):
    return _grouped(x, w, sizes, bias, rows, *static), (x, w, sizes, bias, rows)


def _grouped_backward(activation, gated, out_dtype, saved, gradient):
    run = functools.partial(moe_reference.grouped_matmul, activation=activation, gated=gated, out_dtype=out_dtype)
    return jax.vjp(run, *saved)[1](gradient)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _product(x, x_scales, weights, biases, *, residual, normed, call, lead=None, experts: _Experts | None = None):
    """One launch: weights is one [O, I], or gate and up, apart or joined along their outputs; with experts, [E * O, I]."""
    first = weights[0]
    quantised = isinstance(first, QTensor)
    rows, inputs = x.shape
    if experts and experts.rows is not None:
        rows = experts.rows.shape[0]
    outputs = first.shape[0] // (2 if call.gated and len(weights) == 1 else 1) // (experts.count if experts else 1)
    parts = 2 if call.gated else 1
    levels = x_scales is not None
    dtype = jnp.dtype(jnp.bfloat16) if quantised else first.dtype
    group = (first.group or 0) if quantised else None
    x_group = None
    if levels:
        dtype, x_group = x.dtype, (first.activation.group or 0)
    shared = [g for g in (group, x_group) if g]
    problem = Problem(
        rows=rows_of_expert(rows, experts.count) if experts else rows,
        outputs=outputs,
        inputs=inputs,
        bits=first.kind.bits if quantised else 8 * first.dtype.itemsize,
        group=min(shared) if shared else None,
        terms=1,
        parts=parts,
        quantised=levels,
        normed=normed is not None,
        shifted=quantised and first.zeros is not None,
        experts=min(rows, experts.count) if experts else 1,
    )
    if not levels:
        problem = dataclasses.replace(problem, terms=terms(x.dtype, first, problem.rows))
    gpu = gpus.describe(current_target().device_kind)
    key = dataclasses.asdict(problem) | {"format": first.format if quantised else str(first.dtype)}
    tile = tile_for("quant_matmul", heuristic(problem, gpu), **key)
    check(tile, problem)
    unit = 0 if problem.group is None else min(problem.group, tile.inputs)
    given = {"x": x, "x_scales": x_scales}
    blocks = -(-rows // tile.rows)
    if experts:
        given |= {"sizes": experts.sizes.astype(jnp.int32), "x_rows": experts.rows}
        blocks = experts.blocks(rows, tile.rows)
    if normed is not None:
        given |= {"norm_scale": normed[0], "norm_bias": normed[1]}
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        given[f"bias{i}"] = b
        if quantised:
            given |= {f"values{i}": stored(w.values, dtype), f"scales{i}": w.scales, f"zeros{i}": w.zeros}
        else:
            given[f"values{i}"] = w
    given["residual"] = residual
    if lead is not None and (residual is not None or any(b is not None for b in biases)):
        given["lead"] = lead.astype(jnp.int32).reshape(1)
    given = {name: a for name, a in given.items() if a is not None}
    spec = Spec(
        names=(*given, "out"),
        tile=tile,
        shape=(rows, outputs, inputs),
        offsets=(0, outputs if len(weights) == 1 else 0)[:parts],
        separate=len(weights) == 2,
        format=first.format if quantised else str(first.dtype),
        dtype=np.dtype(dtype),
        half=packing_block(first.group) // 2 if quantised and first.kind.nibbles else 0,
        group=group,
        x_group=x_group,
        unit=unit,
        terms=problem.terms,
        before=bool(group) and not levels and problem.rows > SMALL,
        kind=None if normed is None else call.kind,
        eps=call.eps,
        activation=call.activation,
    )
    return launch(
        functools.partial(kernel, spec=spec),
        *given.values(),
        name="quant_matmul",
        out=jax.ShapeDtypeStruct((rows, outputs), call.out_dtype),
        grid=(blocks, -(-outputs // tile.outputs)),
        warps=tile.warps,
        stages=tile.stages,
    )
