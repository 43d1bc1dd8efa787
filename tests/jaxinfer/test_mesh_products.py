"""Greedy ids of small random Llama, GPT-2, Gemma 2 and Mixtral models on every mesh of up to eight devices, against one device.

Five layers, which no number of stages but one divides; three kv heads and seven experts, which few shards do. Other tests have some of
these meshes; here they are all, a few of them slow and the rest full.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from flax import nnx

import jaxinfer
from jaxinfer import EngineConfig, SamplingParams
from jaxinfer.engine import Engine
from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from sharding.mesh import make_mesh

ATTENTION = AttentionConfig(heads=6, kv_heads=3, head_dim=8, scale=8**-0.5, rope=RopeConfig(dim=8))
LLAMA = ModelConfig(
    family="llama",
    vocab=97,
    embed=32,
    layers=5,
    attention=ATTENTION,
    mlp=MLPConfig(width=40, activation="silu"),
    norm_eps=1e-5,
    tied=False,
    max_positions=64,
)
FAMILIES = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(
        LLAMA,
        family="gpt2",
        attention=dataclasses.replace(ATTENTION, rope=None, bias=True, output_bias=True, kv_heads=6),
        mlp=MLPConfig(width=40, activation="gelu_tanh", gated=False, bias=True),
        norm="layer",
        learned_positions=True,
        tied=True,
    ),
    "gemma2": dataclasses.replace(
        LLAMA,
        family="gemma2",
        attention=dataclasses.replace(ATTENTION, soft_cap=2.0),
        mlp=MLPConfig(width=40, activation="gelu_tanh"),
        norm="rms_offset",
        post_norms=True,
        windows=(4, None, 4, None, 4),
        embed_scale=32**0.5,
        soft_cap=3.0,
        tied=True,
    ),
    "mixtral": dataclasses.replace(
        LLAMA, family="mixtral", moe=MoEConfig(experts=7, used=2, width=24, normalise=True, layers=(0, 1, 2, 3, 4))
    ),
}
SIZES = [s for s in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2)) if 1 < s[0] * s[1] * s[2] <= 8]
# Sizes that test_meshes.py has not, one for each family but Llama, which that file has.
SLOW = {("gemma2", 1, 3, 2), ("gpt2", 3, 1, 2), ("mixtral", 2, 2, 2)}
PROMPTS = [np.random.default_rng(7).integers(0, 97, n).tolist() for n in (5, 1, 11)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def texts(config: ModelConfig, **sizes: int) -> list[list[int]]:
    model = Decoder(config, nnx.Rngs(11))
    engine = Engine(jaxinfer.place(model, make_mesh(**sizes)), EngineConfig(inference_max_tokens=32, micro_batch_size=1))
    return [result.token_ids for result in engine.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def alone() -> Callable[[str], list[list[int]]]:
    known: dict[str, list[list[int]]] = {}
    return lambda family: known.setdefault(family, known.get(family) or texts(FAMILIES[family]))


@pytest.mark.parametrize(
    ("family", "tensor", "stage", "data"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SLOW else pytest.mark.full)
        for case in ((family, *sizes) for family in FAMILIES for sizes in SIZES)
    ],
)
def test_greedy_ids_are_those_of_one_device(alone, family: str, tensor: int, stage: int, data: int) -> None:
    assert texts(FAMILIES[family], tensor=tensor, stage=stage, data=data) == alone(family)
