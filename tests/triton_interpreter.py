"""Run by tests in a process of its own: kernels in the Triton language on numpy arrays, by Triton's interpreter and without torch.

Triton either interprets or compiles, whichever the environment said when it was first imported.
"""

import functools
import itertools
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.jax_triton import register_triton, triton_call
from pallas_kernels.norm import ACTIVATIONS, fused_norm, layer_norm, rms_norm
from pallas_kernels.qtensor import dequantize, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.registry import choose, register
from pallas_kernels.target import interpreting


def int4_weights(rng: np.random.Generator) -> None:
    for group, symmetric, point, rows, outputs in (
        (32, True, False, 1, 40),
        (64, False, False, 3, 33),
        (128, True, True, 8, 16),
    ):
        w = round_to_nearest(
            rng.standard_normal((outputs, 256)).astype(np.float32), format="int4", group=group, symmetric=symmetric
        )
        if point:
            w = w.replace(zeros=rng.integers(0, 16, w.scales.shape).astype(np.uint8))
        x = rng.standard_normal((rows, 256)).astype(np.float32)
        with interpreting():
            y = quant_matmul(jnp.asarray(x), jax.tree.map(jnp.asarray, w), implementation="jax_triton")
        wanted = x.astype(np.float64) @ dequantize(w).astype(np.float64).T
        error = np.abs(y - wanted).max() / np.abs(wanted).max()
        assert error < 1e-5, (group, symmetric, point, error)


def norms(rng: np.random.Generator) -> None:
    """Of every kind, with each activation in turn, with and without what is added; odd widths; the gradient."""
    options = itertools.product(("rms", "rms_offset", "layer"), (False, True), ((1, 1), (3, 42), (2, 2, 130)))
    for number, (kind, added, shape) in enumerate(options):
        activation = (None, *ACTIVATIONS)[number % (1 + len(ACTIVATIONS))]
        x, residual = (jnp.asarray(rng.normal(0.5, 2, shape), jnp.float32) for _ in range(2))
        scale, bias = (jnp.asarray(rng.normal(0.5, 1, shape[-1]), jnp.float32) for _ in range(2))
        given = {"kind": kind, "eps": 1e-5, "activation": activation, "residual": residual if added else None}
        run = functools.partial(fused_norm, x, scale, bias if kind == "layer" else None, **given)
        with interpreting():
            found = jax.jit(functools.partial(run, implementation="jax_triton"))()
        wanted = run(implementation="reference")
        for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(f, w, rtol=0, atol=1e-6 * float(jnp.abs(w).max()), err_msg=str((kind, activation)))
    x, scale = jnp.asarray(rng.normal(3, 1, (5, 33)), jnp.float32), jnp.asarray(rng.normal(size=33), jnp.float32)
    half = x.astype(jnp.float16)
    loss = lambda name: jax.grad(lambda x, s: (rms_norm(x, s, eps=1e-5, implementation=name) ** 3).sum(), (0, 1))(x, scale)
    with interpreting():
        plain = layer_norm(x, None, None, eps=1e-5, implementation="jax_triton")
        gradient = loss("jax_triton")
        narrow = rms_norm(half, scale, eps=1e-5, implementation="jax_triton")
    np.testing.assert_allclose(plain, layer_norm(x, None, None, eps=1e-5, implementation="reference"), atol=1e-5)
    for f, w in zip(gradient, loss("reference"), strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=1e-5 * float(jnp.abs(w).max()))
    assert narrow.dtype == jnp.float16
    np.testing.assert_allclose(narrow, rms_norm(half, scale, eps=1e-5, implementation="reference"), atol=4e-3)


@triton.jit
def add_row(x_ptr, row_ptr, y_ptr, largest_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < N
    y = tl.load(x_ptr + row * N + at, mask=inside, other=0.0) + tl.load(row_ptr + at, mask=inside, other=0.0)
    tl.store(y_ptr + row * N + at, y, mask=inside)
    tl.store(largest_ptr + row, tl.max(tl.where(inside, y, float("-inf")), 0))


def an_operation_of_a_user(rng: np.random.Generator) -> None:
    def reference(x, row):
        y = x + row
        return y, jnp.max(y, -1)

    def add(x, row):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
        constants = {"N": x.shape[1], "BLOCK": triton.next_power_of_2(x.shape[1])}
        return triton_call(add_row, x, row, out=out, grid=x.shape[:1], constants=constants, aliases={0: 0})

    register("add_row", "reference", reference)
    supports = lambda target, facts: facts["columns"] <= 64 or f"{facts['columns']} columns are too many"
    register_triton("add_row", "triton", add, kernels=(add_row,), supports=supports)
    x, row = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 42), (42,)))
    assert choose("add_row", columns=42).name == "reference"
    with interpreting():
        assert choose("add_row", columns=65).name == "reference"
        chosen = choose("add_row", columns=42)
        assert chosen.name == "triton"
        found = jax.jit(chosen.function)(x, row)
    for f, w in zip(found, reference(x, row), strict=True):
        np.testing.assert_array_equal(f, w)


def main() -> None:
    rng = np.random.default_rng(int(sys.argv[1]))
    int4_weights(rng)
    norms(rng)
    an_operation_of_a_user(rng)


main()
