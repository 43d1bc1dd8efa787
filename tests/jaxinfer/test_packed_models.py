"""Packed checkpoints as models: the engine says what the float model of their dequantised weights says, on one device and on two."""

from __future__ import annotations

import functools
from typing import Any

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import packed_writers
import pytest
from flax import nnx
from packed_writers import FORMATS
from tiny_llama import tensor_shapes

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.loading import open_source
from jaxinfer.memory import weight_bytes
from jaxinfer.placement import place, placed_shapes
from pallas_kernels.qtensor import QTensor
from sharding.mesh import make_mesh

# 96 inputs of the mlp in blocks of 32 do not divide by two devices, so that zeros are added to them
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
PROMPTS = [[5, 9, 2], [17, 3, 88, 41, 2, 60, 33]]
NEW = 8
MARKS = {("awq", 2): (), ("gptq_act_order", 2): pytest.mark.slow}  # the others are the full product
cases = pytest.mark.parametrize(
    ("name", "tp"),
    [
        pytest.param(name, tp, marks=MARKS.get((name, tp), pytest.mark.full), id=f"{name}-tp{tp}")
        for name in FORMATS
        for tp in (1, 2)
    ],
)


@pytest.mark.parametrize("name", ["gptq_act_order", "awq", "fp8_blocks", "nf4"])
def test_bytes_and_shapes_are_known_before_a_weight_is_read(tmp_path, name):
    packed_writers.write_folder(tmp_path, CONFIG, golden_weights.make_tensors(tensor_shapes(CONFIG), seed=7), name)
    source, mesh = open_source(tmp_path), make_mesh(tensor=2, stage=2)
    tensors = source.stored_as(dtype=None, quantization=None)
    placed, planned = place(tensors, mesh, config=source.config), placed_shapes(tensors, mesh, config=source.config)
    described = lambda weights: jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding.spec), weights)
    assert described(planned.weights) == described(placed.weights)
    assert weight_bytes(tensors, mesh, placed.plan) * mesh.size == placed.nbytes


def test_scales_of_inputs_end_where_heads_do(tmp_path):
    packed_writers.write_folder(tmp_path, CONFIG, golden_weights.make_tensors(tensor_shapes(CONFIG), seed=7), "fp8_blocks")
    kept = open_source(tmp_path).stored_as(dtype=None, quantization=None)
    groups = {path: kept[f"blocks.0.{path}"].packed.activation.group for path in ("attention.q", "attention.o", "mlp.down")}
    assert groups == {"attention.q": 32, "attention.o": 8, "mlp.down": 32}


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, ids, length):
    return nnx.merge(graph, state)(ids, lengths=length)


def greedy(model: jaxinfer.Decoder, prompt: list[int]) -> list[int]:
    """The module's own greedy tokens, each from a forward pass over all before it."""
    graph, state = nnx.split(model)
    ids = np.zeros((1, 16), np.int32)
    ids[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + NEW):
        ids[0, n] = np.asarray(_logits(graph, state, jnp.asarray(ids), jnp.array([n], jnp.int32)))[0, n - 1].argmax()
    return ids[0, len(prompt) : len(prompt) + NEW].tolist()


@cases
def test_the_same_greedy_tokens_as_the_floats(tmp_path, name, tp):
    tensors = golden_weights.make_tensors(tensor_shapes(CONFIG), seed=7)
    truth = packed_writers.write_folder(tmp_path / "packed", CONFIG, tensors, name)
    kept = open_source(tmp_path / "packed").tensors
    assert kept["blocks.1.mlp.down"].packed and kept["blocks.0.attention.q"].packed and not kept["embedding"].packed
    if FORMATS[name].exact:
        model = jaxinfer.load_model(golden_weights.write_folder(tmp_path / "float", CONFIG, truth))
    else:  # inputs are rounded too
        model = jaxinfer.load_model(tmp_path / "packed")
        assert isinstance(model.blocks[0].mlp.up.get_value(), QTensor)
    engine = jaxinfer.init_inference(
        tmp_path / "packed",
        {"inference_max_tokens": 64, "micro_batch_size": 2, "engine": {"tensor_parallel_size": tp}},
    )
    results = engine.generate(PROMPTS, SamplingParams(max_tokens=NEW))
    assert [r.token_ids for r in results] == [greedy(model, prompt) for prompt in PROMPTS]
