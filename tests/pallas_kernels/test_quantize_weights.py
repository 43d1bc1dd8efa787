"""Rounding weights on the device: the GPU's kernel against round_to_nearest, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import compiled, kernels

from pallas_kernels.errors import QuantizationError, ShapeError
from pallas_kernels.qtensor import levels, round_to_nearest
from pallas_kernels.quantize import quantize_weights

FORMS = {
    "int8": {"format": "int8"},
    "int8-64": {"format": "int8", "group": 64},
    "int4-32": {"format": "int4", "group": 32},
    "int4-128": {"format": "int4", "group": 128},
    "int4-64-minimum": {"format": "int4", "group": 64, "symmetric": False},
    "fp8": {"format": "fp8"},
}


@pytest.mark.parametrize("form", FORMS)
def test_levels_scales_and_zeros(rng, form):
    w = rng.standard_normal((2, 5, 384)).astype(np.float32)
    w[0, 1] = 0
    with kernels():
        found = quantize_weights(jnp.asarray(w), **FORMS[form], implementation="pallas")
    wanted = round_to_nearest(w, **FORMS[form])
    assert found.shape == wanted.shape and found.values.dtype == wanted.values.dtype
    np.testing.assert_allclose(found.scales, wanted.scales, rtol=1e-3 if wanted.scales.dtype == np.float16 else 2e-7)
    if wanted.zeros is not None:
        np.testing.assert_array_equal(found.zeros, wanted.zeros)
    # a division that differs in its last bit may tip a value half way between two levels
    a, b = (np.asarray(levels(q), np.float64) for q in (found, wanted))
    assert np.mean(a != b) < 0.01
    assert np.abs(a - b).max() <= (32 if form == "fp8" else 1)


def test_wrong_arguments_are_refused():
    for w, arguments, error, reason in (
        (jnp.ones(64), {"format": "int8"}, ShapeError, "O, I"),
        (jnp.ones((2, 64)), {"format": "int4"}, QuantizationError, "needs a group"),
        (jnp.ones((2, 64)), {"format": "int8", "group": 48}, QuantizationError, "does not divide"),
    ):
        with pytest.raises(error, match=reason):
            quantize_weights(w, **arguments)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("form", "gpu"),
    [("int4-128", "h100"), ("int4-64-minimum", "a100"), ("int8", "b200")],
)
def test_compiles_for_gpus(form, gpu):
    w = jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16)
    compiled(gpu, lambda w: quantize_weights(w, **FORMS[form]), w, launches=("quantize_weights",))
