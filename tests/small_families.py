"""Small random Llama, GPT-2, Gemma 2 and Mixtral models that divide badly, and their greedy ids on a mesh.

Five layers, which no number of stages but one divides; three kv heads and seven experts, which few shards do.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

import jaxinfer
from jaxinfer import EngineConfig, ParallelConfig, SamplingParams
from jaxinfer.engine import Engine
from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from sharding.mesh import make_mesh

_ATTENTION = AttentionConfig(heads=6, kv_heads=3, head_dim=8, scale=8**-0.5, rope=RopeConfig(dim=8))
_LLAMA = ModelConfig(
    family="llama",
    vocab=97,
    embed=32,
    layers=5,
    attention=_ATTENTION,
    mlp=MLPConfig(width=40, activation="silu"),
    norm_eps=1e-5,
    tied=False,
    max_positions=64,
)
FAMILIES = {
    "llama": _LLAMA,
    "gpt2": dataclasses.replace(
        _LLAMA,
        family="gpt2",
        attention=dataclasses.replace(_ATTENTION, rope=None, bias=True, output_bias=True, kv_heads=6),
        mlp=MLPConfig(width=40, activation="gelu_tanh", gated=False, bias=True),
        norm="layer",
        learned_positions=True,
        tied=True,
    ),
    "gemma2": dataclasses.replace(
        _LLAMA,
        family="gemma2",
        attention=dataclasses.replace(_ATTENTION, soft_cap=2.0),
        mlp=MLPConfig(width=40, activation="gelu_tanh"),
        norm="rms_offset",
        post_norms=True,
        windows=(4, None, 4, None, 4),
        embed_scale=32**0.5,
        soft_cap=3.0,
        tied=True,
    ),
    "mixtral": dataclasses.replace(
        _LLAMA, family="mixtral", moe=MoEConfig(experts=7, used=2, width=24, normalise=True, layers=(0, 1, 2, 3, 4))
    ),
}
PROMPTS = [np.random.default_rng(7).integers(0, 97, n).tolist() for n in (5, 1, 11)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def greedy_ids(family: str, *, split_tokens: bool = False, **sizes: int) -> list[list[int]]:
    """Of every prompt, on a mesh of these sizes. Weights are those of one seed. split_tokens: engine.sequence_parallel."""
    model = Decoder(FAMILIES[family], nnx.Rngs(11))
    parallel = ParallelConfig(sequence_parallel=split_tokens)
    config = EngineConfig(inference_max_tokens=32, micro_batch_size=1, engine=parallel)
    engine = Engine(jaxinfer.place(model, make_mesh(**sizes)), config)
    return [result.token_ids for result in engine.generate(PROMPTS, GREEDY)]
