"""What a native call is given: its operands, those of a weight among them, and which weights it takes."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.qtensor import QTensor

FLOATS = ("float32", "bfloat16")
SCALES = ("float32", "bfloat16", "float16")
LAYOUTS = ("canonical", "cpu32")  # the second one is as it reads weights; the first one it turns into that order in every call
PER_WEIGHT = 4  # operands of a weight: values, scales, zeros, bias


def given(x, dtype=jnp.float32):
    """An optional operand, None or of this dtype."""
    return None if x is None else x.astype(dtype)


def weight(w, bias) -> tuple:
    """The operands of a weight; of None too, whose places stay empty."""
    if w is None:
        return (None,) * PER_WEIGHT
    if not isinstance(w, QTensor):
        return w, None, None, given(bias)
    return w.values, w.scales, w.zeros, given(bias)


def call(name: str, results, operands, *, integers, numbers=(), aliases=()):
    """A native call. operands: by place; None are left out, since XLA takes time for each one. aliases: pairs of the place of an operand
    and the number of the result that takes its memory."""
    places = [place for place, a in enumerate(operands) if a is not None]
    attributes = {"integers": np.asarray((*integers, sum(1 << place for place in places)), np.int64)}
    if numbers:
        attributes["numbers"] = np.asarray(numbers, np.float32)
    taken = {places.index(place): result for place, result in aliases}
    run = jax.ffi.ffi_call(name, results, vmap_method="sequential", input_output_aliases=taken)
    return run(*(operands[place] for place in places), **attributes)


def facts(w) -> tuple[int, int, int]:
    """Inputs that share a scale of the weight (0: all), inputs that share an int8 scale (0: all, -1: they stay floats), and outputs."""
    if not isinstance(w, QTensor):
        return 0, -1, 0 if w is None else w.shape[0]
    return w.group or 0, -1 if w.activation is None else w.activation.group or 0, w.shape[0]


def refusal(w, over_shards: bool) -> str | None:
    """Why a weight cannot enter a native call, or None. over_shards: its inputs are split over devices."""
    if not isinstance(w, QTensor):
        return None if str(w.dtype) in FLOATS else f"it multiplies {' and '.join(FLOATS)} weights, not {w.dtype}"
    zeros = None if w.zeros is None else str(w.zeros.dtype)
    return refusal_of(
        format=w.format,
        group=w.group,
        layout=w.layout,
        activation=w.activation,
        scales=str(w.scales.dtype),
        zeros=zeros,
        over_shards=over_shards,
    )


def refusal_of(*, format, group, layout, activation, scales="float32", zeros=None, over_shards=False) -> str | None:
    """`refusal` from what a weight is, without the weight."""
    if format not in ("int8", "int4"):
        return f"it multiplies {', '.join(FLOATS)}, int8 and int4 weights, not {format}"
    if layout not in LAYOUTS:
        return f"it reads the layouts {' and '.join(LAYOUTS)}, not {layout!r}"
    if group is not None and (group < 32 or group & (group - 1)):
        return f"it takes groups of 32, 64, 128 and further powers of two, not {group}"
    if scales not in SCALES or zeros not in (None, *SCALES, "int8", "uint8"):
        return f"it takes scales of {', '.join(SCALES)} and zeros of these or 8-bit integers, not {scales} and {zeros}"
    if activation is not None and activation.static:
        return "it takes the scales of inputs from the inputs, not a static one"
    inputs = activation and activation.group
    if inputs and inputs % 32:
        return f"it takes input scales per multiple of 32 inputs, not {inputs}"
    if activation is not None and inputs is None and over_shards:
        return "one input scale a token over several shards needs a collective inside the call"
    return None
