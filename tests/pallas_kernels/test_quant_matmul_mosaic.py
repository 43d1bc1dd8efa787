"""Hopper's matmul kernel: interpreted with a watch for races against float64, and compiled for an H100 that is not here."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import ON_GPU, kernels

from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import GPUS
from pallas_kernels.qtensor import ActivationQuant, dequantize, round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.quant_matmul.mosaic import heuristic, supports_quant_matmul
from pallas_kernels.quant_matmul.specs import SPECS
from pallas_kernels.registry import choose
from pallas_kernels.target import Target, current_target
from pallas_kernels.tuning import tiles

pytestmark = pytest.mark.skipif(
    ON_GPU and (current_target().capability or (0,))[0] != 9, reason="the GPU here has not Hopper's instructions"
)

FORMS = {
    "bfloat16": None,
    "int8": {"format": "int8"},
    "int8-64": {"format": "int8", "group": 64},
    "int4-64": {"format": "int4", "group": 64},
    "int4-128": {"format": "int4", "group": 128},
}


def stored(w, form: str):
    return w.astype(jnp.bfloat16) if FORMS[form] is None else round_to_nearest(w, **FORMS[form])


def run(x, w):
    return quant_matmul(x, w, bias=jnp.arange(w.shape[0], dtype=jnp.float32), implementation="mosaic")


@pytest.mark.parametrize(
    ("form", "rows", "shape", "tile"),
    [
        ("bfloat16", 64, (128, 192), {}),
        pytest.param("int8", 128, (256, 128), {"stages": 2}, marks=pytest.mark.slow),
        ("int4-128", 192, (128, 256), {}),
        pytest.param("bfloat16", 256, (512, 256), {"rows": 64, "inputs": 128}, marks=pytest.mark.slow),
        pytest.param("int8-64", 64, (256, 256), {}, marks=pytest.mark.slow),
        pytest.param("int4-64", 128, (256, 192), {}, marks=pytest.mark.slow),
    ],
)
def test_products(rng, races, form, rows, shape, tile):
    w = jax.tree.map(jnp.asarray, stored(rng.standard_normal(shape).astype(np.float32), form))
    x = jnp.asarray(rng.standard_normal((rows, shape[1])), jnp.float32)
    with kernels(), tiles({"quant_matmul_mosaic": tile}):
        found = np.asarray(jax.jit(run)(x, w), np.float64) - np.arange(shape[0])
    if not ON_GPU:
        assert not races()
    exact = np.asarray(w if FORMS[form] is None else dequantize(w), np.float64)
    x = np.asarray(x.astype(jnp.bfloat16), np.float64)
    size = np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(exact, axis=1)
    # a group's scale is multiplied into the weights, rounded once; what is left is the order of sums
    assert (np.abs(found - x @ exact.T) / size).max() < (1e-3 if "-" in form else 3e-6)


def test_its_gradient_is_the_reference_s(rng):
    w, x = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((128, 64), (64, 64)))
    with kernels():
        found = jax.grad(lambda x: jnp.sum(run(x, w)))(x)
    wanted = jnp.broadcast_to(jnp.sum(w.astype(jnp.float32), 0), x.shape)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=1e-2)


def test_it_is_offered_on_hopper_only():
    known = {"rows": 128, "outputs": 256, "inputs": 256, "format": "int8", "group": None, "layout": "canonical"}
    known |= {"activation": None, "zeros": None}
    hopper = Target(platform="gpu", device_kind=GPUS["h100"].device_kind)
    assert choose("quant_matmul", "mosaic", hopper, **known).name == "mosaic"
    assert choose("quant_matmul", target=hopper, **known).name == "pallas"  # it is asked for by name
    for name in ("a100", "b200"):
        with pytest.raises(BackendError, match=r"those of Hopper, compute capability 9.0, not of NVIDIA"):
            choose("quant_matmul", "mosaic", Target(platform="gpu", device_kind=GPUS[name].device_kind), **known)
    refused = [
        ({"rows": 65}, "multiples of 64 rows, not 65"),
        ({"outputs": 192}, "multiples of 128 outputs, not 192"),
        ({"format": "int4", "group": 128, "inputs": 192}, "multiples of 128 inputs, not 192"),
        ({"format": "int4", "group": 32}, "groups of 64, 128"),
        ({"format": "fp8"}, "not fp8"),
        ({"format": "int4", "group": 64, "zeros": "uint8"}, "symmetric weights"),
        ({"activation": ActivationQuant()}, "float inputs"),
    ]
    for facts, reason in refused:
        with pytest.raises(BackendError, match=reason):
            choose("quant_matmul", "mosaic", hopper, **(known | facts))
    w, x = jnp.ones((128, 128), jnp.bfloat16), jnp.ones((64, 128))
    for wish, reason in (
        ({"rows": 96}, "does not cut 64 rows"),
        ({"inputs": 96}, "does not cut"),
        ({"stages": 1}, "does not cut"),
    ):
        with kernels(), tiles({"quant_matmul_mosaic": wish}), pytest.raises(BackendError, match=reason):
            run(x, w)


def compiles(form, spec, rows, folder, monkeypatch):
    """For an H100: on its tensor cores, copied by its own unit, and with no register in memory."""
    folder.mkdir()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    w = jax.eval_shape(lambda w: stored(w, form), jax.ShapeDtypeStruct((spec.outputs, spec.inputs), jnp.float32))
    found = compile_for("h100", run, jax.ShapeDtypeStruct((rows, spec.inputs), jnp.bfloat16), w)
    assert found.launches.count("kCustomCall") == 1
    (ptx,), (report,) = (list(folder.glob(f"*.{kind}")) for kind in ("ptx", "ptxas"))
    text = ptx.read_text()
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n(64|128)k16\.f32\.bf16\.bf16", text)
    assert "cp.async.bulk.tensor" in text and "ld.local" not in text
    assert "0 bytes spill stores, 0 bytes spill loads" in report.read_text()


@pytest.mark.aot
def test_compiles_for_hopper(tmp_path, monkeypatch):
    compiles("int4-128", SPECS["llama_3_1_8b.down"], 512, tmp_path / "one", monkeypatch)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_size_compiles_for_hopper(form, tmp_path, monkeypatch):
    """All that it takes of the sizes of real models; those that are cut into the same tiles differ in numbers of steps and blocks."""
    kind = FORMS[form] or {"format": form}
    group, bits = kind.get("group"), {"int8": 8, "int4": 4}.get(kind["format"], 16)
    facts = {"format": kind["format"], "group": group, "layout": "canonical", "activation": None, "zeros": None}
    hopper, seen = Target(platform="gpu", device_kind=GPUS["h100"].device_kind), set()
    for spec, rows in itertools.product(SPECS.values(), (64, 192, 512)):
        sizes = {"rows": rows, "outputs": spec.outputs, "inputs": spec.inputs}
        tile = heuristic(rows, spec.outputs, bits, group)
        if supports_quant_matmul(hopper, facts | sizes) is True and tile not in seen:
            seen.add(tile)
            compiles(form, spec, rows, tmp_path / str(len(seen)), monkeypatch)
    assert len(seen) == 2  # by rows; outputs of real models are multiples of 256
