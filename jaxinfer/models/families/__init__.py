"""Families of models by the name of their architecture in config.json. A family is one short file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from convert.readers.base import LazyTensor
from convert.rules import Rule
from jaxinfer.errors import UnknownArchitectureError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families import gemma2, gpt2, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """config(config.json as a dict, tensors) -> ModelConfig. rules(config): tensor names -> module paths. ignored(config): patterns of
    tensors that hold nothing of their own."""

    config: Callable[[Mapping[str, Any], Mapping[str, LazyTensor]], ModelConfig]
    rules: Callable[[ModelConfig], list[Rule]]
    ignored: Callable[[ModelConfig], tuple[str, ...]]


FAMILIES: dict[str, Family] = {
    name: Family(config=module.config, rules=module.rules, ignored=module.ignored)
    for name, module in {
        "LlamaForCausalLM": llama,
        "MistralForCausalLM": mistral,
        "Qwen2ForCausalLM": qwen2,
        "Qwen3ForCausalLM": qwen3,
        "GPT2LMHeadModel": gpt2,
        "Phi3ForCausalLM": phi3,
        "Gemma2ForCausalLM": gemma2,
        "MixtralForCausalLM": mixtral,
        "Qwen3MoeForCausalLM": qwen3_moe,
    }.items()
}


def find_family(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UnknownArchitectureError."""
    names = hf.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UnknownArchitectureError(
        f"architecture {', '.join(names) or hf.get('model_type')!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
    )
