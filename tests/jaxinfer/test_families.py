"""How families read config.json, what they refuse, what a ModelConfig keeps, and limits that only some families have."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxinfer
from convert.native import save_native
from jaxinfer import errors
from jaxinfer.layout import make_plan
from jaxinfer.loading import open_source
from jaxinfer.models import ModelConfig
from jaxinfer.models.families import FAMILIES, find_family
from jaxinfer.models.families.common import layer_windows
from pallas_kernels.qtensor import QTensor, dequantize
from sharding.mesh import make_mesh

CASES = ("odd_shape", "mistral_window", "qwen2_window", "qwen3_window", "gpt2", "phi3_partial_longrope", "gemma2")
CASES += ("mixtral", "qwen3_moe_mixed")


def config_of(case: str, **changes: Any) -> ModelConfig:
    """The ModelConfig of a golden case's config.json with changes; ... as a value leaves the key out."""
    hf = json.loads((golden_weights.GOLDEN / f"{case}.json").read_text())["config"] | changes
    hf = {key: value for key, value in hf.items() if value is not ...}
    return find_family(hf).config(hf, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def write(case: str) -> Path:
        path = root / case
        return path if path.exists() else golden_weights.write_case_folder(golden_weights.load_case(case), path)

    return write


def test_every_family_has_a_case() -> None:
    architectures = {json.loads((golden_weights.GOLDEN / f"{c}.json").read_text())["config"]["architectures"][0] for c in CASES}
    assert architectures == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_unknown_keys_are_refused(case: str) -> None:
    for key, value in (("residual_multiplier", 0.22), ("attn_temperature_tuning", True)):
        with pytest.raises(errors.UnknownConfigKeyError, match=f"{key}={value}"):
            config_of(case, **{key: value})
    assert config_of(case, _name_or_path="somewhere", transformers_version="4.30.0") == config_of(case)


REFUSED = [
    ("mistral_window", "layer_types", ["full_attention", "sliding_attention"]),
    ("mistral_window", "attention_bias", True),
    ("qwen2_window", "mlp_bias", True),
    ("qwen2_window", "layer_types", ["full_attention"]),
    ("qwen2_window", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    ("qwen2_window_off", "layer_types", ["full_attention", "sliding_attention"]),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "rope_theta", 10000.0),
    ("phi3", "lm_head_bias", True),
    ("phi3_window", "rope_parameters", {"rope_type": "longrope", "short_factor": [1.0], "long_mscale": 1.2}),
    ("gemma2", "use_bidirectional_attention", True),
    ("mixtral", "moe_intermediate_size", 24),
    ("qwen3_moe", "shared_expert_intermediate_size", 24),
    ("gemma2", "sliding_window_size", 4096),
]


@pytest.mark.parametrize(("case", "key", "value"), REFUSED)
def test_what_would_change_the_arithmetic_is_refused(case: str, key: str, value: Any) -> None:
    with pytest.raises(errors.UnknownConfigKeyError, match=key if key != "rope_parameters" else "long_mscale"):
        config_of(case, **{key: value})


def test_unknown_activations_are_refused() -> None:
    for case, key in (("gemma2", "hidden_activation"), ("gpt2", "activation_function"), ("mistral_window", "hidden_act")):
        with pytest.raises(errors.UnknownConfigKeyError, match="activation 'geglu' is not supported"):
            config_of(case, **{key: "geglu"})


def test_windows() -> None:
    assert config_of("mistral_window").windows == (8, 8)
    assert config_of("mistral_window", sliding_window=...).windows == (4096, 4096)
    assert config_of("mistral_window", sliding_window=None).windows == ()
    assert config_of("qwen2_window").windows == (None, 6, 6)
    assert config_of("qwen2_window", use_sliding_window=...).windows == ()
    assert config_of("qwen2_window", max_window_layers=3).windows == ()
    assert config_of("gemma2").windows == (6, None, 6)
    assert config_of("phi3").windows == config_of("gpt2").windows == config_of("odd_shape").windows == ()
    assert layer_windows({"sliding_window": None}, 2, None, lambda layer: True) == ()


def test_what_absent_keys_stand_for() -> None:
    gemma = config_of("gemma2_absent")
    assert (gemma.attention.soft_cap, gemma.soft_cap, gemma.attention.head_dim, gemma.attention.kv_heads) == (50, 30, 256, 4)
    assert (gemma.attention.scale, gemma.mlp.activation, gemma.windows[0]) == (1 / 16, "gelu_tanh", 4096)
    assert config_of("gemma2", tie_word_embeddings=...).tied and not config_of("qwen2_biases").tied
    gpt2 = config_of("gpt2_activation")
    assert (gpt2.mlp.activation, gpt2.mlp.width, gpt2.tied, gpt2.norm_eps) == ("gelu_tanh", 256, True, 1e-5)
    assert config_of("mistral_absent").attention.kv_heads == 8
    assert config_of("qwen3_absent").attention.head_dim == 128
    phi3 = config_of("phi3_partial_longrope")
    assert phi3.attention.rope is not None
    assert (phi3.attention.rope.dim, phi3.attention.rope.kind, phi3.attention.rope.original_positions) == (8, "longrope", 32)


@pytest.mark.parametrize("case", [*CASES, "gemma2_absent", "longrope"])
def test_a_config_survives_json(case: str) -> None:
    config = config_of(case)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))) == hash(config)


def test_a_config_stored_before_families_is_read() -> None:
    """The fields that native checkpoints had at first."""
    config = config_of("odd_shape")
    first = ("family", "vocab", "embed", "layers", "attention", "mlp", "norm_eps", "tied", "max_positions")
    stored = {name: value for name, value in config.to_dict().items() if name in first}
    stored["attention"] = {k: v for k, v in stored["attention"].items() if k not in ("qk_norm", "soft_cap")}
    assert ModelConfig.from_dict(stored) == config
    with pytest.raises(TypeError, match="unheard_of"):
        ModelConfig.from_dict(stored | {"unheard_of": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"windows": (4,)}, "1 windows for 3 layers"),
        ({"windows": (4, 0, None)}, "a window of 0 keys"),
        ({"norm": "batch"}, "'batch' is not one of"),
        ({"norm": "layer"}, "post_norms is not supported"),
        ({"soft_cap": 0.0}, "the logits' soft cap is 0.0"),
    ],
)
def test_a_config_that_contradicts_itself(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config_of("gemma2"), **change)


def test_windows_of_the_layers_that_share_a_slot() -> None:
    """Operands, one a stage; a model without windows has none."""
    config = config_of("qwen2_window")
    everything = 2**31 - 1
    one, two = (make_plan(config, make_mesh(stage=n)).layer_spec.windows for n in (1, 2))
    assert one == ((everything,), (6,), (6,))
    assert two == ((everything, 6), (everything, 6))  # the second stage has two layers, an empty slot no window
    assert make_plan(config_of("odd_shape"), make_mesh(stage=2)).layer_spec.windows is None


def test_no_more_tokens_than_learned_positions(folder: Callable[[str], Path], compiled: list[str]) -> None:
    path = folder("gpt2")
    with pytest.raises(errors.ConfigError, match=r"inference_max_tokens is 43.*42 positions"):
        jaxinfer.init_inference(path, {"inference_max_tokens": 43})
    model = jaxinfer.load_model(path)
    with pytest.raises(errors.ConfigError, match="42 positions"):
        jaxinfer.init_inference(model, {"inference_max_tokens": 43})
    with pytest.raises(errors.ShapeError, match=r"43 tokens.*42 positions"):
        jax.jit(model)(jnp.zeros((1, 43), jnp.int32))
    with pytest.raises(errors.ConfigError, match="42 positions"):
        jaxinfer.generate(model, jnp.zeros((1, 40), jnp.int32), max_new_tokens=3)
    assert not [name for name in compiled if "prefill" in name or "decode" in name]


@pytest.mark.parametrize("case", ["gpt2", "gemma2"])
def test_native_checkpoints(case: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    opened = open_source(folder(case))
    save_native(tmp_path / "native", config=opened.config.to_dict(), tensors=opened.tensors, assets=opened.assets)
    again = open_source(tmp_path / "native")
    assert again.config == opened.config and again.tensors.keys() == opened.tensors.keys()
    for path, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor.read(), opened.tensors[path].read())


def test_tables_that_are_read_stay_as_they_are(folder: Callable[[str], Path]) -> None:
    """Quantisation is for matrices that are multiplied: learned positions keep their numbers, on every path."""
    stored = golden_weights.make_tensor("transformer.wpe.weight", (42, 64), golden_weights.load_case("gpt2")["seed"])
    model = jaxinfer.load_model(folder("gpt2"), quantization="w8a8")
    np.testing.assert_array_equal(model.positions.get_value(), stored)
    assert model.blocks[0].attention.q.get_value().format == "int8"


@pytest.mark.parametrize("case", ["gpt2", "gemma2"])
def test_quantised(case: str, folder: Callable[[str], Path]) -> None:
    """A model of packed matrices is the model of the numbers that they stand for."""
    golden = golden_weights.load_case(case)
    model = jaxinfer.load_model(folder(case), quantization="w8a16")
    ids, exact = np.array(golden["prompts"][-1:], np.int32), golden["logits"][-1][None]
    found = np.asarray(jax.jit(model)(ids))
    for _, p in nnx.iter_graph(model):
        if isinstance(p, nnx.Param) and isinstance(p.get_value(), QTensor):
            p.set_value(jnp.asarray(dequantize(p.get_value())))
    rounded = np.asarray(jax.jit(model)(ids))
    distance = lambda a, b: np.abs(a - b).max() / np.abs(b).max()
    assert distance(found, rounded) < 1e-4 < distance(found, exact)
