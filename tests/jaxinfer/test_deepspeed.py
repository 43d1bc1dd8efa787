"""DeepSpeed's configuration: every key at its default, at values that mean something here, and at those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import check

import jaxinfer
from jaxinfer import EngineConfig, ParallelConfig, QuantizationConfig, errors
from jaxinfer.deepspeed import KEYS

# Of the fields of DeepSpeedInferenceConfig and the models in it, as deepspeed/inference/config.py has them: {key: its aliases}.
TOP = {
    "replace_with_kernel_inject": ["kernel_inject"],
    "dtype": [],
    "tensor_parallel": ["tp"],
    "enable_cuda_graph": [],
    "use_triton": [],
    "triton_autotune": [],
    "zero": [],
    "triangular_masking": ["tm"],
    "moe": [],
    "keep_module_on_host": [],
    "quant": [],
    "checkpoint": [],
    "base_dir": [],
    "set_empty_params": [],
    "save_mp_checkpoint_path": [],
    "checkpoint_config": ["ckpt_config"],
    "return_tuple": [],
    "training_mp_size": [],
    "replace_method": [],
    "injection_policy": ["injection_dict"],
    "injection_policy_tuple": [],
    "config": ["args"],
    "max_out_tokens": ["max_tokens"],
    "min_out_tokens": ["min_tokens"],
    "transposed_mode": [],
    "mp_size": [],
    "mpu": [],
    "ep_size": [],
    "ep_group": ["expert_group"],
    "ep_mp_group": ["expert_mp_group"],
    "moe_experts": [],
    "moe_type": [],
}
NESTED = {
    "tensor_parallel": {"enabled": [], "tp_size": [], "tp_grain_size": [], "mpu": [], "tp_group": []},
    "moe": {
        "enabled": [],
        "ep_size": [],
        "moe_experts": ["num_experts"],
        "type": [],
        "ep_mp_group": [],
        "ep_group": ["expert_group"],
    },
    "quant": {"enabled": [], "activation": [], "weight": [], "qkv": []},
    "quant.activation": {"enabled": [], "num_bits": [], "q_type": [], "q_groups": []},
    "quant.weight": {
        "enabled": [],
        "num_bits": [],
        "q_type": [],
        "q_groups": [],
        "quantized_initialization": [],
        "post_init_quant": [],
    },
    "quant.weight.quantized_initialization": {"num_bits": [], "group_size": [], "group_dim": [], "symmetric": []},
    "quant.qkv": {"enabled": []},
    "checkpoint_config": {"checkpoint_dir": [], "save_mp_checkpoint_path": [], "base_dir": []},
}
BESIDES = {"fp16": [], "bf16": []}  # of DeepSpeed's training configuration


def nested(name: str, value: Any) -> dict[str, Any]:
    """A configuration with one key, a dotted one within its sections."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def test_every_key_and_alias_is_known() -> None:
    wanted = {name: aliases for name, aliases in (TOP | BESIDES).items()}
    wanted |= {f"{section}.{name}": aliases for section, names in NESTED.items() for name, aliases in names.items()}
    assert {key.name: list(key.aliases) for key in KEYS} == wanted
    for key in KEYS:
        assert len(key.here) > 5 and (key.target or key.same or key.section or key.at_most or key.default is None), key.name


def test_every_default_of_deepspeed_is_accepted() -> None:
    """But for its dtype and for quant, whose defaults would change something."""
    for key in KEYS:
        if key.default is not None and key.name != "dtype" and not key.name.startswith("quant."):
            assert EngineConfig.load(nested(key.name, key.default)) == EngineConfig(), key.name
        assert EngineConfig.load(nested(key.name, None)) in (EngineConfig(), EngineConfig(quantization=QuantizationConfig()))


@pytest.mark.parametrize("key", [k for k in KEYS if not (k.target or k.section or k.at_most)], ids=lambda k: k.name)
def test_what_means_something_else_is_refused(key) -> None:
    """Under its name and under each alias."""
    section, _, name = key.name.rpartition(".")
    others = [value for value in (True, False, 2, "other", {"stage": 3}, [4]) if value not in key.same]
    for written in (name, *key.aliases):
        way = f"{section}.{written}" if section else written
        for value in key.same:
            EngineConfig.load(nested(way, value))
        for value in others:
            with pytest.raises(errors.ConfigError) as error:
                EngineConfig.load(nested(way, value))
            check(error, f"{way} is {value!r}", key.here)


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"mp_size": 2}, {"engine": ParallelConfig(tensor_parallel_size=2)}),
        ({"tensor_parallel": {"tp_size": 2}}, {"engine": ParallelConfig(tensor_parallel_size=2)}),
        ({"tp": {"tp_size": 2, "enabled": True}, "mp_size": 2}, {"engine": ParallelConfig(tensor_parallel_size=2)}),
        ({"max_out_tokens": 77, "min_out_tokens": 77}, {"inference_max_tokens": 77}),
        ({"max_tokens": 77, "min_tokens": 1}, {"inference_max_tokens": 77}),
        ({"min_out_tokens": 1024}, {}),
        ({"dtype": "torch.half"}, {"dtype": "float16"}),
        ({"fp16": {"enabled": True}}, {"dtype": "float16"}),
        ({"fp16": True, "dtype": "fp16"}, {"dtype": "float16"}),
        ({"bf16": True, "fp16": {"enabled": False}}, {"dtype": "bfloat16"}),
        ({"dtype": "torch.int8"}, {"quantization": QuantizationConfig()}),
        ({"dtype": "int8", "quantization": {"head_bits": 16}}, {"quantization": QuantizationConfig(head_bits=16)}),
        ({"quant": {"enabled": False, "weight": {"num_bits": 4}}}, {}),
        ({"quant": {"enabled": True}}, {"quantization": QuantizationConfig()}),
        ({"quant": {"weight": {"num_bits": 4}}}, {"quantization": QuantizationConfig(weight_bits=4)}),
        (
            {"dtype": "int8", "quant": {"activation": {"enabled": False, "num_bits": 8}}},
            {"quantization": QuantizationConfig(activation_bits=16)},
        ),
        ({"quant": {"activation": {"enabled": True, "num_bits": 8}}}, {"quantization": QuantizationConfig(activation_bits=8)}),
        ({"quant": {"activation": {"num_bits": 16}}}, {"quantization": QuantizationConfig(activation_bits=16)}),
        (
            {"quant": {"weight": {"num_bits": 4, "q_type": "asymmetric", "q_groups": 1}, "qkv": {"enabled": True}}},
            {"quantization": QuantizationConfig(weight_bits=4, symmetric=False)},
        ),
        (
            {
                "quant": {
                    "weight": {
                        "quantized_initialization": {"num_bits": 4, "group_size": 32, "group_dim": 1, "symmetric": False}
                    }
                }
            },
            {"quantization": QuantizationConfig(weight_bits=4, group_size=32, symmetric=False)},
        ),
        ({"quant": {"weight": {"enabled": False, "num_bits": 4}}}, {}),
        ({"checkpoint": "folder/model"}, {"checkpoint": "folder/model"}),
        ({"checkpoint": Path("model"), "base_dir": "folder"}, {"checkpoint": "folder/model"}),
        ({"ckpt_config": {"checkpoint_dir": "model", "base_dir": "folder"}}, {"checkpoint": "folder/model"}),
        ({"moe": True}, {}),
        ({"moe": {"enabled": False, "ep_size": 4}}, {}),
    ],
    ids=str,
)
def test_mapped(values: dict[str, Any], fields: dict[str, Any]) -> None:
    assert EngineConfig.load(values) == EngineConfig.load(None, values) == EngineConfig(**fields)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mp_size": 2, "tp": {"tp_size": 4}}, ["mp_size and tp.tp_size both set", "2 and 4", "leave one"]),
        ({"engine": {"tensor_parallel_size": 2}, "mp_size": 4}, ["engine.tensor_parallel_size and mp_size both set"]),
        ({"inference_max_tokens": 99, "max_out_tokens": 77}, ["inference_max_tokens and max_out_tokens", "99 and 77"]),
        ({"max_tokens": 99, "max_out_tokens": 77}, ["max_tokens and max_out_tokens", "99 and 77"]),
        ({"fp16": True, "dtype": "bf16"}, ["fp16 and dtype both set dtype", "'float16' and 'bfloat16'"]),
        ({"dtype": "int8", "quantization": "w4a16"}, ["quantization.weight_bits", "8 and 4"]),
        ({"quantization": {"weight_bits": 8}, "quant": {"enabled": False}}, ["quantization.enabled", "True and False"]),
        ({"quant": {"enabled": True, "weight": {"enabled": False}}}, ["quant.enabled and quant.weight.enabled"]),
        ({"quantization": 8, "quant": {"enabled": True}}, ["quantization is 8, and quant.enabled sets a part", "give a dict"]),
        (
            {"max_out_tokens": 64, "min_out_tokens": 65},
            ["min_out_tokens is 65, inference_max_tokens is 64", "raise inference_max_tokens"],
        ),
        ({"min_tokens": 0}, ["min_tokens is 0", "at least 1"]),
        ({"quant": {"weight": {"q_type": "asym"}}}, ["symmetric is False", "weight_bits 4"]),
        ({"quant": {"weight": {"q_type": "even"}}}, ["quant.weight.q_type", "'even'", "symmetric or asymmetric"]),
        ({"quant": {"weight": {"num_bits": 3}}}, ["weight_bits is 3", "8, 4, 16, 32"]),
        ({"quant": {"activation": {"enabled": 1}}}, ["quant.activation.enabled", "1", "True or False"]),
        ({"quant": (True, 8)}, ["quant is (True, 8)", "give a dict of enabled, activation, weight, qkv"]),
        ({"tp": 2}, ["tp is 2", "give a dict of enabled, tp_size"]),
        ({"tp": {"tpsize": 2}}, ["tp has no key 'tpsize'", "did you mean 'tp_size'"]),
        ({"quant": {"weight": {"bits": 2}}}, ["quant.weight has no key 'bits'", "'num_bits'"]),
        ({"tensor_paralel": {}}, ["no key 'tensor_paralel'", "did you mean 'tensor_parallel'"]),
        ({"max_out_token": 5}, ["no key 'max_out_token'", "did you mean 'max_out_tokens'"]),
        ({"fp16": {"enabled": True, "loss_scale": 0}}, ["fp16", "loss_scale", "for training"]),
        ({"base_dir": "folder"}, ["base_dir is 'folder'", "give checkpoint too"]),
        ({"base_dir": 5, "checkpoint": "a"}, ["base_dir is 5", "give a folder"]),
        ({"checkpoint": 5}, ["checkpoint is 5", "give a path"]),
        ({"checkpoint": "a", "ckpt_config": {"checkpoint_dir": "b"}}, ["checkpoint and ckpt_config.checkpoint_dir both set"]),
        ({"checkpoint": {"type": "Megatron", "checkpoints": ["a.pt"]}}, ["lists a.pt", "only safetensors"]),
        ({"checkpoint": {"type": "ds_model"}}, ["checkpoints None", "give the folder"]),
        ({"checkpoint": {"checkpoints": {"tp": ["tp_00.pt"]}}}, ["checkpoints {'tp'", "give the folder"]),
        ({"checkpoint": "missing.json"}, ["load policy missing.json cannot be read"]),
    ],
    ids=str,
)
def test_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(errors.ConfigError) as error:
        EngineConfig.load(values)
    check(error, *words)


def test_load_policy(tiny, tmp_path: Path) -> None:
    files = [path.name for path in tiny.folder.glob("*.safetensors")]
    policy = {"type": "ds_model", "version": 1.0, "checkpoints": files, "base_dir": str(tiny.folder)}
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    for checkpoint in (policy, tmp_path / "policy.json", policy | {"checkpoints": str(tiny.folder), "base_dir": ""}):
        assert EngineConfig.load({"checkpoint": checkpoint}).checkpoint == str(tiny.folder)
    for wrong in ([*files, "more.safetensors"], ["other/model.safetensors"]):
        with pytest.raises(errors.ConfigError, match="not all safetensors of"):
            EngineConfig.load({"checkpoint": policy | {"checkpoints": wrong}})


# --- init_inference with DeepSpeed's keywords


def test_keywords(tiny, compiled) -> None:
    keys = {"tensor_parallel": {"tp_size": 2}, "dtype": "fp16", "replace_with_kernel_inject": True, "max_out_tokens": 48}
    for engine in (
        jaxinfer.init_inference(tiny.folder, **keys),
        jaxinfer.init_inference(model=tiny.folder, config={"dtype": "fp16", "max_out_tokens": 48}, **keys),
        jaxinfer.init_inference(checkpoint=tiny.folder.name, base_dir=tiny.folder.parent, **keys),
    ):
        assert engine.config.dtype == "float16" and engine.config.inference_max_tokens == 48
        assert engine.mesh.shape["tensor"] == 2
    assert not compiled


class Linear:
    """Stands for a torch module."""

    name_or_path = "owner/name"


def test_model_and_checkpoint(tiny, tiny_decoder, compiled) -> None:
    for values, words in (
        ({"model": Linear()}, ["test_deepspeed.Linear", "give its folder", "owner/name"]),
        ({"model": object()}, ["builtins.object", "where it was loaded from"]),
        ({}, ["no model is given", "checkpoint"]),
        ({"model": tiny.folder, "checkpoint": "elsewhere"}, [str(tiny.folder), "checkpoint is 'elsewhere'", "leave one"]),
        ({"model": tiny_decoder, "checkpoint": "elsewhere"}, ["a Decoder", "checkpoint is 'elsewhere'"]),
        (
            {"model": tiny.folder, "config": {"mp_size": 2}, "mp_size": 4},
            ["mp_size is 2 in the configuration", "4 in the keyword"],
        ),
        ({"model": tiny.folder, "max_new_tokens": 4}, ["no key 'max_new_tokens'"]),
    ):
        with pytest.raises(errors.ConfigError) as error:
            jaxinfer.init_inference(**values)
        check(error, *words)
    assert jaxinfer.init_inference(tiny.folder, checkpoint=str(tiny.folder)).config.checkpoint == str(tiny.folder)
    assert not compiled
