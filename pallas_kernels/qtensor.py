"""QTensor: a quantised weight as a pytree of packed arrays, and the lossless ways between its forms.

Shapes: [..., O, I] is a weight with O outputs and I inputs (the contracted axis); leading axes (stage, expert) are free.
INT8 stores int8 [..., O, I]. INT4 stores uint8 [..., O, I / 2]: inputs are cut into blocks of gcd(group, 32), byte j of a block
of P holds input j in its low nibble and input j + P/2 in its high nibble, which is GGUF's order, so that its bytes load unchanged.

    zeros is None         w = (q - offset) * scale            offset 0 for int8, 8 for int4
    zeros is a float      w = q * scale + zeros               (a minimum per group, GGUF Q4_1)
    zeros is an integer   w = (q - zeros) * scale             (a zero point per group, AWQ and GPTQ)

Everything works on numpy arrays (while loading) and on jax arrays (under jit) alike.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import QuantizationError, ShapeError

FORMATS = ("int8", "int4")
LAYOUTS = ("canonical", "cpu32", "gpu")
INT4_OFFSET = 8  # a symmetric nibble 0..15 stands for -8..7


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationQuant:
    """Dynamic symmetric INT8 quantisation of the inputs of a matmul.

    group: inputs that share a scale (64 by default: no collective under tensor parallelism), or None for one scale a token.
    """

    bits: int = 8
    group: int | None = 64

    def __post_init__(self):
        if self.bits != 8:
            raise QuantizationError(
                f"activation bits {self.bits}: only 8 is supported; leave activations unquantised otherwise"
            )
        if self.group is not None and self.group < 1:
            raise QuantizationError(f"activation group {self.group}: give a positive number of inputs, or None for per token")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "zeros"),
    meta_fields=("format", "group", "layout", "activation"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QTensor:
    """A packed weight [..., O, I].

    values: int8 [..., O, I] or uint8 [..., O, I/2]. scales: float [..., O, I/group], or [..., O, 1] per channel.
    zeros: None, or like scales; see the module for its meaning. group: inputs per scale, None per channel (INT8 only).
    layout: canonical | cpu32 | gpu, see `repack`. activation: how inputs are quantised in matmuls with this weight, or None.
    """

    values: jax.Array | np.ndarray
    scales: jax.Array | np.ndarray
    zeros: jax.Array | np.ndarray | None = None
    format: str
    group: int | None = None
    layout: str = "canonical"
    activation: ActivationQuant | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., O, I] of the weight."""
        v = self.values.shape
        per_value = 2 if self.format == "int4" else 1
        if self.layout == "cpu32":  # [..., O/32, I', 32, c]
            return (*v[:-4], v[-4] * 32, v[-3] * v[-1] * per_value)
        if self.layout == "gpu":  # [..., I', O]
            return (*v[:-2], v[-1], v[-2] * per_value)
        return (*v[:-1], v[-1] * per_value)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed arrays."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    def replace(self, **changes) -> "QTensor":
        return dataclasses.replace(self, **changes)


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

    symmetric: scale = max|w| / 127 (int8) or / 7 (int4), levels -127..127 and -7..7; otherwise scale = (max - min) / 15 and a
    float minimum per group (int4 only). group None is one scale per output channel. scale_dtype: by default float16 for int4
    and float32 for int8, because small weights have int8 scales below float16's normal range; rounding uses the scale as it is
    stored. Raises QuantizationError for a format, group or value that does not fit, NaN and infinity included.
    """
    xp = _namespace(w)
    check_format(format, group, symmetric)
    inputs = w.shape[-1]
    size = group or inputs
    if inputs % size:
        raise QuantizationError(f"group {size} does not divide {inputs} inputs; choose one of {divisors(inputs)}")
    scale_dtype = np.dtype(scale_dtype or default_scale_dtype(format))
    g = w.reshape(*w.shape[:-1], inputs // size, size).astype(xp.float32)
    low, high = g.min(-1, keepdims=True), g.max(-1, keepdims=True)
    if xp is np:  # under jit the caller checks
        largest = float(np.maximum(np.abs(low), np.abs(high)).max()) if g.size else 0.0
        if not np.isfinite(largest):
            raise QuantizationError("the weight holds NaN or infinity; repair the checkpoint before quantising")
        if largest / (1 if not symmetric else 127 if format == "int8" else 7) > float(np.finfo(scale_dtype).max):
            raise QuantizationError(f"values up to {largest:g} do not fit scales of {scale_dtype}; pass scale_dtype=float32")
    zeros = None
    if symmetric:
        top = 127 if format == "int8" else 7
        scales = (xp.maximum(xp.abs(low), xp.abs(high)) / top).astype(scale_dtype)
        q = xp.clip(xp.rint(_safe_divide(xp, g, scales)), -top, top)
    else:
        scales = ((high - low) / 15).astype(scale_dtype)
        zeros = low.astype(scale_dtype)
        q = xp.clip(xp.rint(_safe_divide(xp, g - zeros.astype(xp.float32), scales)), 0, 15)
        zeros = zeros[..., 0]
    q = q.reshape(w.shape)
    if format == "int4":
        q = pack_int4((q + (INT4_OFFSET if symmetric else 0)).astype(xp.uint8), group)
    values = q.astype(xp.uint8 if format == "int4" else xp.int8)
    return QTensor(values=values, scales=scales[..., 0], zeros=zeros, format=format, group=group, activation=activation)


def default_scale_dtype(format: str) -> np.dtype:
    """Dtype of scales where none is asked for."""
    return np.dtype(np.float32 if format == "int8" else np.float16)


def _safe_divide(xp, a, scales):
    s = scales.astype(xp.float32)
    return a / xp.where(s == 0, 1, s)


def check_format(format: str, group: int | None, symmetric: bool = True) -> None:
    """Raise QuantizationError for a combination that does not exist."""
    if format not in FORMATS:
        raise QuantizationError(f"format {format!r} is not one of {FORMATS}")
    if format == "int4" and group is None:
        raise QuantizationError("int4 needs a group: 32, 64 or 128")
    if group is not None and (group < 2 or group % 2):
        raise QuantizationError(f"group {group} must be even and positive")
    if format == "int8" and not symmetric:
        raise QuantizationError("int8 is symmetric; asymmetric weights exist for int4 only")


def divisors(n: int) -> list[int]:
    """Group sizes that divide n inputs."""
    return [g for g in (16, 32, 64, 128, 256) if n % g == 0] or [d for d in range(2, n + 1, 2) if n % d == 0][:8]


def levels(q: QTensor):
    """Integer levels [..., O, I] of a canonical QTensor, before scale and zero: int8, or uint8 0..15 for int4."""
    return q.values if q.format == "int8" else unpack_int4(q.values, q.group)


def dequantize(q: QTensor, dtype=np.float32):
    """The weight [..., O, I] as floats: exact in float32."""
    q = repack(q, "canonical")
    xp = _namespace(q.values)
    n, groups = levels(q).astype(xp.float32), q.scales.shape[-1]
    n = n.reshape(*n.shape[:-1], groups, -1)
    scales = q.scales.astype(xp.float32)[..., None]
    if q.zeros is None:
        w = (n - (INT4_OFFSET if q.format == "int4" else 0)) * scales
    elif np.issubdtype(q.zeros.dtype, np.integer):
        w = (n - q.zeros.astype(xp.float32)[..., None]) * scales
    else:
        w = n * scales + q.zeros.astype(xp.float32)[..., None]
    return w.reshape(q.shape).astype(dtype)


def repack(q: QTensor, layout: str) -> QTensor:
    """The same weight in another memory layout; lossless.

    canonical: [O, I']. gpu: [I', O], outputs innermost, so that neighbouring threads read neighbouring outputs.
    cpu32: [O/32, I'/c, 32, c] with c 4 (int8, one 32-bit lane of a dot-product instruction) or 1 (int4 bytes), and scales
    [O/32, groups, 32]: a core reads the weights of 32 outputs as one stream. Needs O to be a multiple of 32.
    """
    if layout not in LAYOUTS:
        raise QuantizationError(f"layout {layout!r} is not one of {LAYOUTS}")
    if layout == q.layout:
        return q
    if q.layout != "canonical" and layout != "canonical":
        return repack(repack(q, "canonical"), layout)
    per_lane = 4 if q.format == "int8" else 1
    if layout == "gpu" or q.layout == "gpu":
        return jax.tree.map(lambda a: a.swapaxes(-1, -2), q).replace(layout=layout)
    if layout == "cpu32":
        outputs, inputs = q.values.shape[-2:]
        if outputs % 32 or inputs % per_lane:
            raise QuantizationError(
                f"cpu32 needs outputs in multiples of 32 and inputs of {per_lane}, got {outputs} x {inputs}"
            )
        tile = lambda a, c: a.reshape(*a.shape[:-2], -1, 32, a.shape[-1] // c, c).swapaxes(-3, -2)
        return _map_parts(q, lambda v: tile(v, per_lane), lambda s: tile(s, 1)[..., 0], layout)
    untile = lambda a: a.swapaxes(-3, -2).reshape(*a.shape[:-4], a.shape[-4] * 32, -1)
    return _map_parts(q, untile, lambda s: untile(s[..., None]), layout)


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
    if q.format == "int4" and packing_block(group) != packing_block(q.group):
        values = pack_int4(unpack_int4(values, q.group), group)
    spread = lambda s: None if s is None else xp.repeat(s, times, -1)
    return q.replace(values=values, scales=spread(q.scales), zeros=spread(q.zeros), group=group)


def concatenate(parts, axis: int = -2) -> QTensor:
    """Join canonical QTensors of one format along their outputs."""
    first = parts[0]
    if any(
        (p.format, p.group, p.layout, p.activation) != (first.format, first.group, first.layout, first.activation)
        for p in parts
    ):
        raise QuantizationError("only weights of one format, group, layout and activation can be joined")
    xp = _namespace(first.values)
    return jax.tree.map(lambda *a: xp.concatenate(a, axis), *parts)


def take(q: QTensor, *, axis: int, unit: int, indices) -> QTensor:
    """A shard of a canonical QTensor [..., O, I]: whole units of `unit` elements along axis -2 (O) or -1 (I); -1 is a zero unit.

    Units smaller than a group repeat the group's scale (see `regroup`), so any unit that shares an even divisor with the group works.
    """
    indices = np.asarray(indices)
    if axis == -2:
        return jax.tree.map(lambda a: _take_padded(a, _spread(indices, unit), -2), q)
    if axis != -1:
        raise ShapeError(f"axis {axis}: a QTensor is cut along -2 (outputs) or -1 (inputs)")
    if q.group is None:
        return q.replace(values=_take_padded(q.values, _spread(indices, unit), -1))
    group = math.gcd(q.group, unit)
    if group % 2:
        raise QuantizationError(f"units of {unit} inputs share no even divisor with groups of {q.group}")
    q = regroup(q, group)
    per_group = group // 2 if q.format == "int4" else group
    # a zero unit has scale 0 (and minimum 0), so its levels do not matter
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
