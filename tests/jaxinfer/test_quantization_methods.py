"""Grids, GPTQ, AWQ and SmoothQuant: each against what it is to minimise, and whole layers against the functions that they have to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import TinyModel, check

import jaxinfer
from convert.load import QuantSpec, materialize
from jaxinfer import QuantizationConfig, errors
from jaxinfer.loading import module_of, open_source
from jaxinfer.models.decoder import parameters
from jaxinfer.placement import module_tensors
from jaxinfer.quantization import gptq as gptq_module
from jaxinfer.quantization.calibration import HALVES, INPUT_CLIPS, Layers, calibration_tokens
from jaxinfer.quantization.gptq import gptq
from jaxinfer.quantization.grids import decoded, nearest, packed, rounded_to_range, search_grid
from jaxinfer.quantization.methods import METHODS, Method, quantize_half
from jaxinfer.quantization.policy import kept
from jaxinfer.quantization.quantizer import Quantizer, key, layer_weights, read_layer
from jaxinfer.quantization.scaling import LARGEST, awq_factors, output_error, scaled, sites, smoothing_factors
from pallas_kernels import qtensor
from pallas_kernels.value_formats import FP8

INT4 = QuantSpec(format="int4", group=32)
SPECS = [
    INT4,
    QuantSpec(format="int4", group=32, symmetric=False),
    QuantSpec(format="int8"),
    QuantSpec(format="fp8"),
    QuantSpec(format="int8", group=16, scale_dtype="float16"),
]


def uneven(outputs: int, inputs: int, tokens: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight with outliers, and inputs [tokens, I] that are correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(outputs, inputs)) * np.exp(rng.normal(size=(1, inputs)) * 0.5)
    x = rng.normal(size=(tokens, inputs // 2)) @ rng.normal(size=(inputs // 2, inputs)) + 0.3 * rng.normal(
        size=(tokens, inputs)
    )
    return w.astype(np.float32), (x * np.exp(rng.normal(size=inputs))).astype(np.float32)


def loss(w: np.ndarray, rounded: np.ndarray, x: np.ndarray) -> float:
    return float((((rounded - w).astype(np.float64) @ x.T.astype(np.float64)) ** 2).mean())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_grids(spec: QuantSpec) -> None:
    """A searched grid is packed without a further error, and its weighted error is below that of the range's grid."""
    w, x = uneven(24, 64)
    importance = (x**2).mean(0)
    grid = search_grid(jnp.asarray(w), jnp.asarray(importance), spec)
    levels = nearest(jnp.asarray(w), grid)
    q = packed(levels, grid, spec)
    np.testing.assert_allclose(qtensor.dequantize(q), decoded(levels, grid), rtol=1e-6, atol=1e-7)
    plain = qtensor.round_to_nearest(
        w, format=spec.format, group=spec.group, symmetric=spec.symmetric, scale_dtype=spec.scale_dtype
    )
    assert (q.format, q.group, q.values.shape, q.scales.dtype) == (
        plain.format,
        plain.group,
        plain.values.shape,
        plain.scales.dtype,
    )
    weighted = lambda v: float((importance * (np.asarray(v) - w) ** 2).sum())
    assert weighted(qtensor.dequantize(q)) < 0.95 * weighted(qtensor.dequantize(plain))
    ranged = rounded_to_range(jnp.asarray(w), spec)
    np.testing.assert_allclose(ranged, qtensor.dequantize(plain), atol=1e-5)


def test_grids_of_zeros_and_unused_inputs() -> None:
    w = np.zeros((3, 64), np.float32)
    w[1:, :32] = np.linspace(-1, 1, 32)
    for spec in SPECS:
        grid = search_grid(jnp.asarray(w), jnp.zeros(64), spec)
        out = decoded(nearest(jnp.asarray(w), grid), grid)
        assert np.isfinite(out).all() and np.abs(out - w).max() < 0.12 and not np.asarray(out)[0].any()


@pytest.mark.parametrize(("spec", "act_order"), [*((spec, True) for spec in SPECS[:4]), (INT4, False)], ids=str)
def test_gptq_against_its_definition(spec: QuantSpec, act_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The levels are those of the algorithm written down input by input in float64, and the outputs' error falls."""
    monkeypatch.setattr(gptq_module, "BLOCK", 32)  # several blocks
    w, x = uneven(16, 96, seed=2)
    hessian = x.T @ x / len(x)
    grid = search_grid(jnp.asarray(w), jnp.diag(jnp.asarray(hessian)), spec)
    levels = np.asarray(gptq(jnp.asarray(w), jnp.asarray(hessian), grid, damping=0.02, act_order=act_order))
    wide = grid.spread(96)
    scales = np.asarray(wide.scales, np.float64)
    minima = 0 if wide.minima is None else np.asarray(wide.minima, np.float64)
    h = hessian.astype(np.float64) + 0.02 * np.diag(hessian).mean() * np.eye(96)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(96)
    rest, expected = w.astype(np.float64), np.zeros(w.shape)
    minima = np.broadcast_to(minima, w.shape)
    for n, i in enumerate(order):
        inverse = np.linalg.inv(h[np.ix_(order[n:], order[n:])])
        level = np.clip((rest[:, i] - minima[:, i]) / scales[:, i], grid.low, grid.high)
        expected[:, i] = level.astype(FP8).astype(np.float64) if spec.format == "fp8" else np.rint(level)
        error = (rest[:, i] - expected[:, i] * scales[:, i] - minima[:, i]) / inverse[0, 0]
        rest[:, order[n:]] -= error[:, None] * inverse[0]
    assert (levels != expected).mean() < 0.02  # float32 turns ties, and what follows a tie
    out = np.asarray(decoded(jnp.asarray(levels), grid))
    assert loss(w, out, x) < 0.7 * loss(w, np.asarray(decoded(nearest(jnp.asarray(w), grid), grid)), x)


def test_gptq_with_inputs_that_never_occur() -> None:
    w, x = uneven(8, 64)
    x[:, 10:20] = 0
    hessian = jnp.asarray(x.T @ x / len(x))
    grid = search_grid(jnp.asarray(w), jnp.diag(hessian), INT4)
    out = decoded(gptq(jnp.asarray(w), hessian, grid), grid)
    np.testing.assert_array_equal(out[:, 10:20], decoded(nearest(jnp.asarray(w), grid), grid)[:, 10:20])
    with pytest.raises(errors.QuantizationError, match=r"here: the calibration inputs hold NaN"):
        gptq(jnp.asarray(w), hessian.at[3, 3].set(jnp.nan), grid, name="here")
    with pytest.raises(errors.QuantizationError, match=r"here: X\^T X is not positive definite"):
        gptq(jnp.asarray(w), hessian.at[3, 4].set(1e9), grid, name="here")


# --- layers of a tiny model


def tokens_for(tiny: TinyModel, sequences: int = 8, length: int = 32) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, tiny.config["vocab_size"], sequences * length)
    return calibration_tokens(ids.tolist(), sequences=sequences, length=length, vocab=tiny.config["vocab_size"])


@pytest.fixture(scope="module")
def layer(tiny: TinyModel) -> tuple:
    """(Source, values of a layer, hidden states before it, Layers)."""
    opened = open_source(tiny.folder)
    layers = Layers(opened.config, 32)
    x = np.random.default_rng(1).normal(size=(8, 32, opened.config.embed)).astype(np.float32)
    x *= np.exp(np.random.default_rng(2).normal(size=opened.config.embed)).astype(np.float32)
    return opened, read_layer(opened.tensors, 0), x, layers


def part_of(values: dict, half: str) -> dict:
    return {name.removeprefix(f"{half}."): v for name, v in values.items() if name.startswith(half)}


def test_statistics(layer: tuple) -> None:
    """The inputs of q, k and v are the norm's results; their sums are those of numpy, over batches."""
    opened, values, x, _ = layer
    layers = Layers(opened.config, 32)
    layers.batch = 3
    seen = layers.inputs("attention", layer_weights(values), x, 0)
    assert seen["q"] is seen["k"] is seen["v"] and set(seen) == {"q", "k", "v", "o"}
    n = x / np.sqrt((x**2).mean(-1, keepdims=True) + opened.config.norm_eps) * values["attention.norm"]
    rows = n.reshape(-1, n.shape[-1])
    np.testing.assert_allclose(seen["q"].hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(seen["q"].mean, np.abs(rows).mean(0), rtol=1e-4)
    np.testing.assert_allclose(seen["q"].largest, np.abs(rows).max(0), rtol=1e-5)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_static_scales_have_the_least_error(layer: tuple, form: str) -> None:
    """Of all scales that are tried the one is taken whose rounding changes the inputs least, as numpy counts it."""
    opened, values, x, layers = layer
    quant = qtensor.ActivationQuant(group=None, format=form)
    part = {
        name: qtensor.round_to_nearest(v, format=form, activation=quant)
        for name, v in part_of(values, "mlp").items()
        if v.ndim == 2
    }
    changed = values | {f"mlp.{name}": q for name, q in part.items()}
    found = layers.scales("mlp", layer_weights(changed), x, 0)
    assert set(found) == {"gate", "up", "down"} and found["gate"] is found["up"]
    n = x / np.sqrt((x**2).mean(-1, keepdims=True) + opened.config.norm_eps) * values["mlp.norm"]
    top, clips = (448.0, INPUT_CLIPS["fp8"]) if form == "fp8" else (127.0, INPUT_CLIPS["int8"])

    def error(scale: float) -> float:
        levels = np.clip(n / scale, -top, top)
        levels = levels.astype(FP8).astype(np.float32) if form == "fp8" else np.rint(levels)
        return float(((n - levels * scale) ** 2).sum(dtype=np.float64))

    scales = [np.abs(n).max() / top * c for c in clips]
    assert error(found["gate"].item()) <= 1.0001 * min(map(error, scales))


UNGATED = {"attention": {"bias": True, "output_bias": True}, "mlp": {"gated": False, "bias": True}}
WINDOWED = {"post_norms": True, "windows": (4, None, 7), "attention": {"qk_norm": True}}
KINDS = {"plain": {}, "layer norm": {"norm": "layer"} | UNGATED, "offset": {"norm": "rms_offset"} | WINDOWED}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_keeps_the_function(layer: tuple, kind: str, half: str) -> None:
    """For every kind of layer: whatever factors go into norms, v and up, the half layer gives the same."""
    config = layer[0].config
    parts = {name: dataclasses.replace(getattr(config, name), **KINDS[kind].get(name, {})) for name in ("attention", "mlp")}
    config = dataclasses.replace(config, **{k: v for k, v in KINDS[kind].items() if k not in parts}, **parts)
    rng, layers = np.random.default_rng(3), Layers(config, 32)
    values = {path: np.asarray(tensor.value) for path, tensor in module_tensors(jaxinfer.Decoder(config)).items()}
    values = {path.removeprefix("blocks.0."): v for path, v in values.items() if path.startswith("blocks.0.")}
    values = {path: v + 0.3 * rng.normal(size=v.shape).astype(np.float32) * (v.ndim == 1) for path, v in values.items()}
    before = layers.run(half, layer_weights(values), layer[2], 0)
    part = part_of(values, half)
    found = sites(config, half, tuple(part))
    inner = ["v"] if half == "attention" else ["up"] if config.mlp.gated else []
    assert [site.source for site in found] == ["norm", *inner]
    for site in found:
        part = scaled(part, site, np.exp(rng.normal(size=part[site.source].shape[0])).astype(np.float32))
    changed = values | {f"{half}.{name}": v for name, v in part.items()}
    assert not np.allclose(changed[f"{half}.norm"], values[f"{half}.norm"])
    np.testing.assert_allclose(layers.run(half, layer_weights(changed), layer[2], 0), before, rtol=1e-3, atol=1e-3)


def test_awq_and_smoothquant_choose(layer: tuple) -> None:
    """AWQ's factors lower the error of the outputs that plain rounding makes; SmoothQuant's even out the ranges."""
    opened, values, x, layers = layer
    seen = layers.inputs("mlp", layer_weights(values), x, 0)
    part = part_of(values, "mlp")
    site, down = sites(opened.config, "mlp", tuple(part))
    spec = QuantSpec(format="int4", group=24)
    difference = lambda name, f: rounded_to_range(part[name] * f, spec) / f - part[name]
    error = lambda f: sum(float(output_error(difference(name, f), seen[name].hessian)) for name in site.matrices)
    factors = awq_factors(part, seen["up"], site, {"gate": spec, "up": spec})
    assert error(factors) < 0.95 * error(np.ones_like(factors))
    assert (awq_factors(part, seen["up"], site, {"gate": None, "up": None}) == 1).all()
    smooth = smoothing_factors(part, seen["down"], down)
    ranges = np.asarray(seen["down"].largest) / smooth
    before = np.asarray(seen["down"].largest)
    assert ranges.max() / ranges.min() < 0.9 * before.max() / before.min() and smooth.max() <= LARGEST


@pytest.mark.parametrize("name", METHODS)
def test_methods(layer: tuple, name: str) -> None:
    """Each method quantises as the specs say and loses less than rounding to the nearest does."""
    opened, values, x, layers = layer
    spec = QuantSpec(format="int4", group=24)
    lost = {}
    for method in (Method(clip=False), Method(name=name)):
        part = part_of(values, "mlp")
        seen = layers.inputs("mlp", layer_weights(values), x, 0)
        done = quantize_half(part, seen, {"gate": spec, "up": spec, "down": None}, method, config=opened.config, half="mlp")
        assert done.values["gate"].format == "int4" and not isinstance(done.values["down"], qtensor.QTensor)
        assert set(done.errors) == {"gate", "up"}
        changed = values | {f"mlp.{n}": v for n, v in done.values.items()}
        lost[method] = (
            (layers.run("mlp", layer_weights(changed), x, 0) - layers.run("mlp", layer_weights(values), x, 0)) ** 2
        ).mean()
    assert lost[Method(name=name)] < (1.2 if name == "smoothquant" else 0.9) * lost[Method(clip=False)]


def run(tiny: TinyModel, work, method: Method, spec: str = "w4a16-g32", **changes) -> Quantizer:
    opened = open_source(tiny.folder)
    quantization = dataclasses.replace(QuantizationConfig.parse(spec), **changes)
    how = kept(parameters(opened.config), dtype=None, quantization=quantization, head_dim=opened.config.attention.head_dim)
    return Quantizer(opened.tensors, opened.config, how, method, tokens=tokens_for(tiny), work=work)


@pytest.fixture(scope="module")
def grouped(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    """A model whose matrices have inputs in groups of 32."""
    return tiny_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)


ENDS = {"embedding": "w4a16-g32", "head": "w4a16-g32-asym"}


@pytest.mark.slow
def test_an_interrupted_run_goes_on(grouped: TinyModel, tmp_path) -> None:
    whole = run(grouped, tmp_path / "whole", Method(name="awq+gptq"), rules=ENDS)
    whole.run()
    part = run(grouped, tmp_path / "part", Method(name="awq+gptq"), rules=ENDS)

    def stop(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.run(stop)
    seen: list[int] = []
    again = run(grouped, tmp_path / "part", Method(name="awq+gptq"), rules=ENDS)
    reports = again.run(lambda done, total, name: seen.append(done))
    assert seen == [2, 3] and [r.layer for r in reports] == [0, 1, 2]
    assert again.results()["embedding"].packed.format == again.results()["head"].packed.format == "int4"
    for (path, a), (other, b) in zip(materialize(whole.results()).items(), materialize(again.results()).items(), strict=True):
        assert path == other
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_results_are_a_model(grouped: TinyModel, tmp_path) -> None:
    """Skipped matrices are bit for bit the checkpoint's; the others are packed, and the logits are near the float ones."""
    quantizer = run(grouped, tmp_path / "work", Method(name="gptq"), "w8a16-g32", skip=("*.o", "head"))
    quantizer.run()
    values = materialize(quantizer.results())
    opened = open_source(grouped.folder)
    np.testing.assert_array_equal(values["blocks.1.attention.o"], opened.tensors["blocks.1.attention.o"].read())
    assert values["blocks.1.mlp.down"].group == 32 and values["embedding"].format == "int8"
    ids = jnp.asarray(tokens_for(grouped)[:2])
    expected = jaxinfer.load_model(grouped.folder, dtype="float32")(ids)
    difference = module_of(opened.config, values)(ids) - expected
    assert 0 < float(jnp.std(difference)) < 0.05 * float(jnp.std(expected))


def test_what_is_refused(tiny: TinyModel, tmp_path) -> None:
    with pytest.raises(errors.QuantizationError) as error:
        calibration_tokens([1] * 100, sequences=4, length=32, vocab=97)
    check(error, "has 100 tokens", "4 sequences of 32 need 128", "longer text")
    with pytest.raises(errors.QuantizationError, match=r"tokens up to 97, the model 97"):
        calibration_tokens([97] * 100, sequences=1, length=32, vocab=97)
    with pytest.raises(errors.QuantizationError, match=r"method 'magic' is not one of rtn, gptq"):
        Method(name="magic")
    with pytest.raises(errors.QuantizationError, match="damping is 0"):
        Method(damping=0)
    opened = open_source(tiny.folder)
    how = kept(parameters(opened.config), dtype=None, quantization=QuantizationConfig(), head_dim=8)
    with pytest.raises(errors.QuantizationError, match="the method awq needs a calibration text"):
        Quantizer(opened.tensors, opened.config, how, Method(name="awq"), tokens=None, work=tmp_path)
    w = {"up": np.full((4, 64), np.nan, np.float32)}
    with pytest.raises(errors.QuantizationError, match=r"blocks\.0\.mlp\.up holds NaN"):
        quantize_half(w, None, {"up": INT4}, Method(), config=opened.config, half="mlp", where="blocks.0.mlp.")
    w = {"up": np.ones((4, 72), np.float32)}
    with pytest.raises(errors.QuantizationError, match=r"groups of 32 do not divide its 72 inputs; choose one of"):
        quantize_half(w, None, {"up": INT4}, Method(), config=opened.config, half="mlp")
    assert key({"a": 1}, None) != key({"a": 2}, None) and key({"a": 1}, None) != key({"a": 1}, np.zeros(3, np.int32))
