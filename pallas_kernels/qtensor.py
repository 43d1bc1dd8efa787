"""QTensor: a quantised weight as a pytree of packed arrays, and the lossless ways between its forms.

Shapes: [..., O, I] is a weight with O outputs and I inputs (the contracted axis); leading axes (stage, expert) are free.
Formats of one byte store [..., O, I]. Formats of nibbles store uint8 [..., O, I / 2]: inputs are cut into blocks of gcd(group, 32),
byte j of a block of P holds input j in its low nibble and input j + P/2 in its high nibble, which is GGUF's order, so that its
bytes load unchanged. What a byte or a nibble q stands for: `value_formats`.

    zeros is None         w = value(q) * scale                int8, int4, int4_ordered, fp8, nf4
    zeros is a float      w = q * scale + zeros               int4: a minimum per group, GGUF Q4_1
    zeros is an integer   w = (q - zeros) * scale             int4, int4_ordered, uint8: a zero point per group, AWQ and GPTQ
    mxfp4                 w = value(q) * 2^(scale - 127)      scale uint8 per 32 inputs

Blocks of outputs and inputs that share a scale, as DeepSeek's 128 x 128, are groups of 128 inputs whose scale every output of the
block repeats: 0.25 bits a weight more, and any cut, join or order of the outputs stays possible.

Everything works on numpy arrays (while loading) and on jax arrays (under jit) alike.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import QuantizationError, ShapeError
from pallas_kernels.value_formats import (
    E2M1,
    E2M1_EXPONENT,
    FP8_MAX,
    MX_BIAS,
    MX_GROUP,
    VALUE_FORMATS,
    ValueFormat,
)

FORMATS = tuple(VALUE_FORMATS)
ROUNDED = tuple(name for name, kind in VALUE_FORMATS.items() if kind.top)  # formats that floats are rounded to
LAYOUTS = ("canonical", "cpu32", "gpu")
CPU_BLOCK, CPU_WORD = 32, 4  # outputs that cpu32 has side by side, and bytes of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationQuant:
    """Symmetric quantisation of the inputs of a matmul.

    group: inputs that share a scale (64 by default: no collective under tensor parallelism), or None for one scale a token.
    format: int8, or fp8 (e4m3) for fp8 weights. static: one scale for all inputs of all tokens, which the weight brings along
    (QTensor.input_scale), instead of scales that are taken from the inputs; has no group.
    """

    bits: int = 8
    group: int | None = 64
    format: str = "int8"
    static: bool = False

    def __post_init__(self):
        if self.format not in ("int8", "fp8"):
            raise QuantizationError(f"activation format {self.format!r}: int8 and fp8 are supported")
        if self.bits != 8:
            raise QuantizationError(
                f"activation bits {self.bits}: only 8 is supported; leave activations unquantised otherwise"
            )
        if self.group is not None and self.group < 1:
            raise QuantizationError(f"activation group {self.group}: give a positive number of inputs, or None for per token")
        if self.static and self.group is not None:
            raise QuantizationError(
                f"activation group {self.group}: a static scale is one for all inputs; leave the group None"
            )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "zeros", "order", "input_scale"),
    meta_fields=("format", "group", "layout", "activation", "outputs"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QTensor:
    """A packed weight [..., O, I].

    values: [..., O, I], or uint8 [..., O, I/2] of nibbles. scales: float [..., O, I/group], or [..., O, 1] per channel; uint8 for
    mxfp4. zeros: None, or like scales; see the module for its meaning. group: inputs per scale, None per channel (formats of a
    byte only). layout: canonical | cpu32 | gpu, see `repack`. activation: how inputs are quantised in matmuls with this weight,
    or None. order: of int4_ordered only, int32 [..., 1, I], which of the scales [..., O, groups] an input has, -1 for an input of
    zeros; `group` is then how nibbles are packed. input_scale: float32 [..., 1, 1] where `activation` is static, else None. outputs: O
    where cpu32 has filled up its last block. Raises QuantizationError for an activation format that the weights have not.
    """

    values: jax.Array | np.ndarray
    scales: jax.Array | np.ndarray
    zeros: jax.Array | np.ndarray | None = None
    format: str
    group: int | None = None
    layout: str = "canonical"
    activation: ActivationQuant | None = None
    order: jax.Array | np.ndarray | None = None
    input_scale: jax.Array | np.ndarray | None = None
    outputs: int | None = None

    def __post_init__(self):
        if self.activation is not None and self.activation.format == "fp8" and self.format != "fp8":
            raise QuantizationError(f"fp8 inputs meet fp8 weights only, not {self.format}; use ActivationQuant(format='int8')")

    @property
    def kind(self) -> ValueFormat:
        """What its values are. Raises QuantizationError for an unknown format."""
        return value_format(self.format)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., O, I] of the weight."""
        v = self.values.shape
        per_value = 2 if self.kind.nibbles else 1
        if self.layout == "cpu32":  # [..., O/32, I', 32, c]
            return (*v[:-4], self.outputs or v[-4] * CPU_BLOCK, v[-3] * v[-1] * per_value)
        if self.layout == "gpu":  # [..., I', O]
            return (*v[:-2], v[-1], v[-2] * per_value)
        return (*v[:-1], v[-1] * per_value)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed arrays."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    def replace(self, **changes) -> "QTensor":
        return dataclasses.replace(self, **changes)


def value_format(name: str) -> ValueFormat:
    """The ValueFormat of a name. Raises QuantizationError."""
    if name not in VALUE_FORMATS:
        raise QuantizationError(f"format {name!r} is not one of {', '.join(FORMATS)}")
    return VALUE_FORMATS[name]


def _namespace(x):
    return jnp if isinstance(x, jax.Array) else np


def packing_block(group: int | None) -> int:
    """Inputs that are packed together: a block of 32, or the part of it that no border of a group cuts."""
    return math.gcd(group or 32, 32)


def pack_int4(q, group: int | None):
    """Nibbles 0..15 as uint8 [..., I] -> packed bytes uint8 [..., I/2]. `group` fixes the block of gcd(group, 32) inputs."""
    xp, block = _namespace(q), packing_block(group)
    if q.shape[-1] % block or block % 2:
        raise ShapeError(f"{q.shape[-1]} inputs are not a multiple of the packing block {block} (even, from group {group})")
    q = q.reshape(*q.shape[:-1], -1, 2, block // 2).astype(xp.uint8)
    packed = q[..., 0, :] | (q[..., 1, :] << 4)
    return packed.reshape(*packed.shape[:-2], -1)


def unpack_int4(packed, group: int | None):
    """Inverse of `pack_int4`: uint8 [..., I/2] -> nibbles 0..15 as uint8 [..., I]."""
    xp, half = _namespace(packed), packing_block(group) // 2
    b = packed.reshape(*packed.shape[:-1], -1, half)
    q = xp.stack([b & 15, b >> 4], -2)
    return q.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def round_to_nearest(
    w,
    *,
    format: str,
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype=None,
    activation: ActivationQuant | None = None,
) -> QTensor:
    """Quantise a float weight [..., O, I] by rounding to the nearest level of its channel or group.

    symmetric: scale = max|w| / top, top being 127 (int8), 7 (int4), 448 (fp8), 1 (nf4); mxfp4: scale = 2^(floor(log2 max|w|) - 2),
    and values over 6 become 6. Otherwise, for int4 only, scale = (max - min) / 15 and a float minimum per group. group None is one
    scale per output channel. scale_dtype: by default float16 for int4 and float32 for others, because small weights have int8
    scales below float16's normal range; rounding uses the scale as it is stored. Raises QuantizationError for a format, group or
    value that does not fit, NaN and infinity included.
    """
    xp = _namespace(w)
    check_format(format, group, symmetric)
    kind, inputs = VALUE_FORMATS[format], w.shape[-1]
    size = group or inputs
    if inputs % size:
        raise QuantizationError(f"group {size} does not divide {inputs} inputs; choose one of {divisors(inputs)}")
    if format == "mxfp4" and scale_dtype not in (None, np.uint8):
        raise QuantizationError(f"scales of mxfp4 are exponents of a byte, not {np.dtype(scale_dtype)}")
    scale_dtype = np.dtype(scale_dtype or kind.scale)
    g = w.reshape(*w.shape[:-1], inputs // size, size).astype(xp.float32)
    low, high = g.min(-1, keepdims=True), g.max(-1, keepdims=True)
    if xp is np:  # under jit the caller checks
        largest = float(np.maximum(np.abs(low), np.abs(high)).max()) if g.size else 0.0
        if not np.isfinite(largest):
            raise QuantizationError("the weight holds NaN or infinity; repair the checkpoint before quantising")
        if format != "mxfp4" and largest / (kind.top if symmetric else 1) > float(np.finfo(scale_dtype).max):
            raise QuantizationError(f"values up to {largest:g} do not fit scales of {scale_dtype}; pass scale_dtype=float32")
    zeros = None
    if not symmetric:
        scales = ((high - low) / 15).astype(scale_dtype)
        zeros = low.astype(scale_dtype)
        q = xp.clip(xp.rint(_safe_divide(xp, g - zeros.astype(xp.float32), scales)), 0, 15)
        zeros = zeros[..., 0]
    elif format == "mxfp4":
        # the exponent that the bits of a float32 hold is floor(log2) + 127; log2 itself may be off by one at powers of two
        exponent = (xp.maximum(xp.abs(low), xp.abs(high)).view(xp.uint32) >> 23).astype(xp.int32)
        scales = xp.clip(exponent - E2M1_EXPONENT, 1, 254).astype(xp.uint8)  # not 0: 2^-127 is a denormal, which XLA makes 0
        q = _nearest_entry(xp, g / _exponential(scales), E2M1)
    else:
        scales = (xp.maximum(xp.abs(low), xp.abs(high)) / xp.float32(kind.top)).astype(scale_dtype)
        q = _safe_divide(xp, g, scales)
        if kind.table is not None:
            q = _nearest_entry(xp, q, kind.table)
        elif format == "fp8":
            q = xp.clip(q, -FP8_MAX, FP8_MAX)
        else:
            q = xp.clip(xp.rint(q), -kind.top, kind.top) + kind.offset
    values = q.reshape(w.shape).astype(kind.dtype)
    if kind.nibbles:
        values = pack_int4(values, group)
    return QTensor(values=values, scales=scales[..., 0], zeros=zeros, format=format, group=group, activation=activation)


def _nearest_entry(xp, x, table: np.ndarray):
    """Index of the entry of a table that is nearest; a tie goes to the even index, e2m1's even mantissa."""
    order = np.argsort(table, kind="stable")
    # e2m1 holds a zero of either sign; the first one is taken
    order = order[np.concatenate([[True], np.diff(table[order]) > 0])]
    middles = (table[order][1:] + table[order][:-1]) / 2
    # an entry wins the tie at its lower end where its index is even
    above = xp.searchsorted(middles, x, side="left")
    tied = xp.searchsorted(middles, x, side="right")
    place = xp.where(xp.asarray(order)[tied] % 2 == 0, tied, above)
    return xp.asarray(order)[place]


def _exponential(scales):
    """2^(byte - 127) as float32, exactly: the byte is a float32's own exponent, but for 0, which is no denormal there."""
    xp = _namespace(scales)
    power = (scales.astype(xp.uint32) << 23).view(xp.float32)
    return xp.where(scales == 0, xp.float32(2.0**-MX_BIAS), power)


def default_scale_dtype(format: str) -> np.dtype:
    """Dtype of scales where none is asked for."""
    return value_format(format).scale


def _safe_divide(xp, a, scales):
    s = scales.astype(xp.float32)
    return a / xp.where(s == 0, 1, s)


def check_format(format: str, group: int | None, symmetric: bool = True) -> None:
    """Raise QuantizationError for a combination that floats cannot be rounded to."""
    if format not in ROUNDED:
        hint = "; it comes from checkpoints only" if format in FORMATS else ""
        raise QuantizationError(f"format {format!r} is not one of {ROUNDED}{hint}")
    if VALUE_FORMATS[format].nibbles and group is None:
        raise QuantizationError(f"{format} needs a group: {'32' if format == 'mxfp4' else '32, 64 or 128'}")
    if group is not None and (group < 2 or group % 2):
        raise QuantizationError(f"group {group} must be even and positive")
    if format == "mxfp4" and group != MX_GROUP:
        raise QuantizationError(f"mxfp4 has groups of {MX_GROUP}, not {group}")
    if format != "int4" and not symmetric:
        raise QuantizationError(f"{format} is symmetric; asymmetric weights exist for int4 only")


def divisors(n: int) -> list[int]:
    """Group sizes that divide n inputs."""
    return [g for g in (16, 32, 64, 128, 256) if n % g == 0] or [d for d in range(2, n + 1, 2) if n % d == 0][:8]


def levels(q: QTensor):
    """Stored values [..., O, I] of a canonical QTensor, before scale and zero: nibbles as uint8 0..15."""
    return unpack_int4(q.values, q.group) if q.kind.nibbles else q.values


def dequantize(q: QTensor, dtype=np.float32):
    """The weight [..., O, I] as floats: exact in float32, but for mxfp4 weights under 2^-126, which XLA may make zero."""
    q = repack(q, "canonical")
    xp, kind = _namespace(q.values), q.kind
    n = levels(q)
    n = n.astype(xp.float32) if kind.table is None else xp.asarray(kind.table)[n]
    scales = _exponential(q.scales) if q.format == "mxfp4" else q.scales.astype(xp.float32)
    zeros = None if q.zeros is None else q.zeros.astype(xp.float32)
    if q.order is None:
        n = n.reshape(*n.shape[:-1], scales.shape[-1], -1)
        spread = lambda a: a[..., None]
    else:
        order = xp.maximum(q.order, 0)
        scales = xp.where(q.order < 0, 0, xp.take_along_axis(scales, order, -1))
        zeros = None if zeros is None else xp.take_along_axis(zeros, order, -1)
        spread = lambda a: a
    if zeros is None:
        w = (n - kind.offset) * spread(scales)
    elif q.zeros is not None and np.issubdtype(q.zeros.dtype, np.integer):
        w = (n - spread(zeros)) * spread(scales)
    else:
        w = n * spread(scales) + spread(zeros)
    return w.reshape(q.shape).astype(dtype)


def repack(q: QTensor, layout: str) -> QTensor:
    """The same weight in another memory layout; lossless.

    canonical: [O, I']. gpu: [I', O], outputs innermost, so that neighbouring threads read neighbouring outputs.
    cpu32: [O/32, I'/4, 32, 4], and scales [O/32, groups * 32]: the words of 32 bits of 32 outputs side by side, as dot-product
    instructions take them, so that a core reads one stream and no sum crosses lanes. Needs rows of whole words; where O is no multiple
    of 32 the last block is filled with zeros. An axis for the groups, which may be one, would be an axis that XLA places as it likes,
    and copies the scales for.
    """
    if layout not in LAYOUTS:
        raise QuantizationError(f"layout {layout!r} is not one of {LAYOUTS}")
    if layout == q.layout:
        return q
    if q.order is not None:
        raise QuantizationError(f"{q.format} has the canonical layout only, because its groups are no runs of inputs")
    if q.layout != "canonical" and layout != "canonical":
        return repack(repack(q, "canonical"), layout)
    if layout == "gpu" or q.layout == "gpu":
        turned = lambda a: a.swapaxes(-1, -2)
        return _map_parts(q, turned, turned, layout)
    if layout == "cpu32":
        if reason := blocks_refusal(q, q.shape[-1]):
            raise QuantizationError(reason)
        rows = q.values.shape[-2]
        return _map_parts(
            q,
            lambda v: _in_blocks(v, CPU_WORD // v.dtype.itemsize),
            lambda s: _in_blocks(s, 1).reshape(*s.shape[:-2], -(-rows // CPU_BLOCK), -1),
            layout,
        ).replace(outputs=rows if rows % CPU_BLOCK else None)
    rows = q.shape[-2]
    untile = lambda a: a.swapaxes(-3, -2).reshape(*a.shape[:-4], a.shape[-4] * CPU_BLOCK, -1)[..., :rows, :]
    return _map_parts(q, untile, lambda s: untile(_by_group(s)[..., None]), layout).replace(outputs=None)


def _by_group(scales):
    """Scales of cpu32 [..., O/32, groups * 32] -> [..., O/32, groups, 32]."""
    return scales.reshape(*scales.shape[:-1], -1, CPU_BLOCK)


def blocks_refusal(q: QTensor, inputs: int) -> str | None:
    """Why weights of so many inputs in the form of a QTensor have no cpu32 layout, or None."""
    per_word = CPU_WORD * (2 if q.kind.nibbles else 1) // q.kind.dtype.itemsize
    if inputs % per_word:
        return f"cpu32 needs rows of whole words of {CPU_WORD} bytes, which hold {per_word} inputs; there are {inputs}"
    return None


def _in_blocks(a, per_word: int):
    """[..., O, n] -> [..., O/32, n / per_word, 32, per_word], the last block filled with zeros."""
    xp, (rows, n) = _namespace(a), a.shape[-2:]
    if missing := -rows % CPU_BLOCK:
        a = xp.concatenate([a, xp.zeros((*a.shape[:-2], missing, n), a.dtype)], -2)
    words = a.reshape(*a.shape[:-2], -1, CPU_BLOCK, n // per_word, per_word)
    if xp is np and per_word > 1:  # a word at a time: four times as fast as its bytes
        packed = np.ascontiguousarray(np.ascontiguousarray(words).view(np.uint32).swapaxes(-3, -2))
        return packed.view(a.dtype)
    return xp.ascontiguousarray(words.swapaxes(-3, -2)) if xp is np else words.swapaxes(-3, -2)


def cpu32_rows(q: QTensor, index) -> QTensor:
    """Rows [..., I] of a cpu32 QTensor [O, I], as a canonical one: the outputs `index`, integers of any shape."""
    block, row = index // CPU_BLOCK, index % CPU_BLOCK
    rows = _map_parts(q, lambda v: v[block, :, row], lambda s: _by_group(s)[block, :, row], "canonical").replace(outputs=None)
    return rows.replace(values=rows.values.reshape(*index.shape, -1))


def _map_parts(q, on_values, on_scales, layout):
    zeros = None if q.zeros is None else on_scales(q.zeros)
    return q.replace(values=on_values(q.values), scales=on_scales(q.scales), zeros=zeros, layout=layout)


def regroup(q: QTensor, group: int) -> QTensor:
    """The same canonical weight with smaller groups: scales are repeated, nothing is rounded again."""
    if q.group is None or q.group == group:
        return q
    if q.group % group or group % 2:
        raise QuantizationError(f"groups of {q.group} cannot be cut into groups of {group}")
    xp, times = _namespace(q.values), q.group // group
    values = q.values
    if q.kind.nibbles and packing_block(group) != packing_block(q.group):
        values = pack_int4(unpack_int4(values, q.group), group)
    if q.order is not None:  # says itself which scale an input has
        return q.replace(values=values, group=group)
    spread = lambda s: None if s is None else xp.repeat(s, times, -1)
    return q.replace(values=values, scales=spread(q.scales), zeros=spread(q.zeros), group=group)


def concatenate(parts, axis: int = -2) -> QTensor:
    """Join canonical QTensors of one format along their outputs. Raises QuantizationError for parts that differ in more than numbers."""
    first = parts[0]
    if any(
        (p.format, p.group, p.layout, p.activation) != (first.format, first.group, "canonical", first.activation) for p in parts
    ):
        raise QuantizationError("only weights of one format, group, layout and activation can be joined")
    xp, order = _namespace(first.values), first.order
    if first.input_scale is not None:
        raise QuantizationError("weights with static input scales are not joined: each has a scale of its own")
    if order is not None:
        if any(isinstance(p.order, jax.core.Tracer) or not np.array_equal(p.order, order) for p in parts):
            raise QuantizationError(f"{first.format} weights are joined where their inputs have the same groups only")
        parts = [p.replace(order=None) for p in parts]
    return jax.tree.map(lambda *a: xp.concatenate(a, axis), *parts).replace(order=order)


def take(q: QTensor, *, axis: int, unit: int, indices) -> QTensor:
    """A shard of a canonical QTensor [..., O, I]: whole units of `unit` elements along axis -2 (O) or -1 (I); -1 is a zero unit.

    Units smaller than a group repeat the group's scale (see `regroup`), so any unit that shares an even divisor with the group works.
    """
    indices = np.asarray(indices)
    if axis == -2:  # the order of the inputs and their scale are the same for all outputs
        cut = lambda a: None if a is None else _take_padded(a, _spread(indices, unit), -2)
        return q.replace(values=cut(q.values), scales=cut(q.scales), zeros=cut(q.zeros))
    if axis != -1:
        raise ShapeError(f"axis {axis}: a QTensor is cut along -2 (outputs) or -1 (inputs)")
    if q.group is None and q.zeros is not None and (indices < 0).any():
        raise QuantizationError(f"{q.format} with a zero point per channel has no value for inputs of zeros; it needs groups")
    if q.group is None:
        return q.replace(values=_take_padded(q.values, _spread(indices, unit), -1))
    group = math.gcd(q.group, unit)
    if group % 2:
        raise QuantizationError(f"units of {unit} inputs share no even divisor with groups of {q.group}")
    q = regroup(q, group)
    per_group = group // 2 if q.kind.nibbles else group
    if q.order is not None:
        elements = _spread(indices, unit)
        order = _take_padded(q.order + 1, elements, -1) - 1  # -1 where there is no input
        return q.replace(values=_take_padded(q.values, _spread(indices, unit // group * per_group), -1), order=order)
    # a zero unit has scale 0 (and minimum 0), so its levels do not matter; mxfp4, whose scales are never 0, has the level 0
    return _map_parts(
        q,
        lambda v: _take_padded(v, _spread(indices, unit // group * per_group), -1),
        lambda s: _take_padded(s, _spread(indices, unit // group), -1),
        "canonical",
    )


def _spread(indices, size: int):
    """Element of every position of units of `size` elements; -1 for those of unit -1."""
    return np.where(indices[:, None] < 0, -1, indices[:, None] * size + np.arange(size)).reshape(-1)


def _take_padded(a, index, axis):
    xp = _namespace(a)
    out = xp.take(a, np.maximum(index, 0), axis=axis)
    keep = (index >= 0).reshape(-1, *([1] * (-axis - 1)))
    return xp.where(keep, out, xp.zeros((), a.dtype))
