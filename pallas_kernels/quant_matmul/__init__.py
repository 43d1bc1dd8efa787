"""Matmul of activations with a float or quantised weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.cpu import operations as native
from pallas_kernels.errors import ShapeError
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quant_matmul import reference, xla
from pallas_kernels.registry import choose, register, register_file

register("quant_matmul", "reference", reference.quant_matmul)
register("quant_matmul", "xla", xla.quant_matmul, supports=xla.supports, priority=10)
register("quant_matmul", "native", native.quant_matmul, supports=native.supports_quant_matmul, priority=native.PRIORITY)
register_file("quant_matmul", "pallas", "pallas_kernels.quant_matmul.pallas")
# behind the others until it was measured beside them; by name it runs on Hopper
register_file("quant_matmul", "mosaic", "pallas_kernels.quant_matmul.mosaic", priority=5)
_TRITON = "pallas_kernels.quant_matmul.jax_triton"
register_file("quant_matmul", "jax_triton", _TRITON, priority=20, needs="jax_triton")


def quant_matmul(
    x,
    w,
    *,
    bias=None,
    max_over_shards: Callable[[jax.Array], jax.Array] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """A linear layer with float32 accumulation.

        y = Q(x) @ dequantised(w).T + bias            Q rounds the inputs as w.activation says, or is the identity

    x: float [..., I]. w: float array [O, I], or a QTensor of that logical shape in any layout. bias: float [O] or None.
    max_over_shards: see `quantize_activations`; needed where I is split over shards and w.activation has one scale a token.
    Returns float32 [..., O]. Differentiable in x, and in w where it is an array; rounded inputs pass the gradient straight
    through. Raises ShapeError. Source: ZeroQuant, Yao et al. 2022, arXiv:2206.01861; straight through: Bengio et al. 2013,
    arXiv:1308.3432.
    """
    if not isinstance(w, QTensor) and not jnp.issubdtype(w.dtype, jnp.floating):
        raise ShapeError(f"quant_matmul: w must be a float array [O, I] or a QTensor, got {w.dtype}{list(w.shape)}")
    if len(w.shape) != 2 or x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[-1] != w.shape[1]:
        raise ShapeError(
            f"quant_matmul: x must be float [..., I] and w [O, I] with the same I, "
            f"got {x.dtype}{list(x.shape)} and {list(w.shape)}"
        )
    if bias is not None and bias.shape != (w.shape[0],):
        raise ShapeError(f"quant_matmul: bias must be [{w.shape[0]}], one per output of w, got {list(bias.shape)}")
    quantized = isinstance(w, QTensor)
    run = choose(
        "quant_matmul",
        implementation,
        rows=x.size // x.shape[-1] if x.shape[-1] else 0,
        outputs=w.shape[0],
        inputs=w.shape[1],
        format=w.format if quantized else str(w.dtype),
        group=w.group if quantized else None,
        layout=w.layout if quantized else "canonical",
        activation=w.activation if quantized else None,
        scales=str(w.scales.dtype) if quantized else None,
        zeros=str(w.zeros.dtype) if quantized and w.zeros is not None else None,
        over_shards=max_over_shards is not None,
    )
    return run.function(x, w, bias=bias, max_over_shards=max_over_shards)


# its operation, fused_matmul, stands on the one above
from pallas_kernels.quant_matmul import fused as fused  # noqa: E402
