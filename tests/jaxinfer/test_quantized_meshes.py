"""Quantised models on meshes: every shard holds its part of the same levels and scales, and the text is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from agreement import LEVELS, assert_same_texts, with_runner_up
from tiny_llama import GREEDY, PROMPTS, TinyModel

import jaxinfer
from jaxinfer import EngineConfig, QuantizationConfig
from jaxinfer.engine import Engine
from jaxinfer.loading import module_of, open_source
from jaxinfer.memory import weight_bytes
from jaxinfer.models.decoder import parameters
from jaxinfer.placement import Placed, module_tensors, placed_shapes
from jaxinfer.quantization.methods import Method
from jaxinfer.quantization.policy import kept
from jaxinfer.quantization.quantizer import Quantizer
from pallas_kernels.cpu import library
from pallas_kernels.qtensor import QTensor, repack
from sharding.mesh import make_mesh

LAYERS, HEAD_DIM = 2, 64  # groups of 64 hold whole heads, so that no mesh cuts one
FORMS = ("int8", "w8a16-g64", "w4a16-g64", "w4a16-g32-asym", "w4a8-g32", "fp8", "fp8-g64", "nf4", "mxfp4", "w8a16-attn8")
MADE = (("gptq", "w4a16-g64"), ("awq", "w4a16-g32-asym"), ("smoothquant", "w8a8"), ("awq+gptq", "w4a16-g32"), ("gptq", "fp8"))
SIZES = ((2, 1), (4, 1), (1, 2))  # tensor shards, pipeline stages


@pytest.fixture(scope="module")
def dividing(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    """Every part of a matrix on 4 shards holds whole groups of 64."""
    return tiny_model(
        num_hidden_layers=LAYERS,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=HEAD_DIM,
        vocab_size=96,
    )


def by_method(model: TinyModel, work, name: str, form: str) -> jaxinfer.Decoder:
    opened, quantization = open_source(model.folder), QuantizationConfig.parse(form)
    how = kept(parameters(opened.config), dtype=None, quantization=quantization, head_dim=HEAD_DIM)
    tokens = np.random.default_rng(3).integers(0, 96, (4, 32)).astype(np.int32)
    quantizer = Quantizer(opened.tensors, opened.config, how, Method(name=name), tokens=tokens, work=work)
    quantizer.run()
    return module_of(opened.config, {path: tensor.read() for path, tensor in quantizer.results().items()})


def rows(weights: tuple) -> list[bytes]:
    """Levels, scales and zeros of every output of joined matrices, whatever the order of the shards."""
    found = []
    for w in weights:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(w)]
        found += [b"".join(leaf[i].tobytes() for leaf in leaves) for i in range(leaves[0].shape[0])]
    return sorted(found)


def packed(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def canonical(weights: Any) -> Any:
    """In one order: shards of whole blocks of outputs are kept in blocks, others are not."""
    return jax.tree.map(lambda leaf: repack(leaf, "canonical") if packed(leaf) else leaf, weights, is_leaf=packed)


def layers(placed: Placed) -> Iterator[Any]:
    for stage, count in enumerate(placed.plan.counts):
        for slot in range(count):
            yield canonical(jax.tree.map(lambda a, stage=stage: np.asarray(a)[stage], placed.weights.layers[slot]))


def check(model: jaxinfer.Decoder) -> None:
    alone = jaxinfer.place(model, make_mesh())
    for tp, pp in SIZES:
        spread = jaxinfer.place(model, make_mesh(tensor=tp, stage=pp))
        for expected, found in zip(layers(alone), layers(spread), strict=True):
            assert rows(found.attention.qkv) == rows(expected.attention.qkv)
            assert rows(found.mlp.up) == rows(expected.mlp.up)
            for part in ("attention.out", "mlp.down"):
                half, name = part.split(".")
                get = lambda layer, half=half, name=name: getattr(getattr(layer, half), name)
                jax.tree.map(np.testing.assert_array_equal, get(found), get(expected))
        jax.tree.map(np.testing.assert_array_equal, canonical(spread.weights.embedding), canonical(alone.weights.embedding))


@pytest.mark.skipif(library.refusal("cpu") is not None, reason="without native kernels weights stay as they are")
@pytest.mark.parametrize(
    ("tp", "pp"), [*SIZES[:1], *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(1, 1), *SIZES[1:]])]
)
def test_native_kernels_get_weights_in_their_order(dividing: TinyModel, tp: int, pp: int) -> None:
    """Blocks of 32 outputs where every shard has whole ones, and a vocabulary that one device has whole; the plan knows it before."""
    mesh = make_mesh(tensor=tp, stage=pp)
    for form, layout in (("w4a8-g32", "cpu32"), ("w8a8", "cpu32"), ("fp8", "canonical")):
        model = jaxinfer.load_model(dividing.folder, quantization=form)
        placed = jaxinfer.place(model, mesh)
        found = {leaf.layout for leaf in jax.tree.leaves(placed.weights.layers, is_leaf=packed) if packed(leaf)}
        assert found == {layout}
        assert placed.weights.embedding.layout == (
            "cpu32" if 96 // (tp * pp) % 32 == 0 else "canonical"
        )  # of int8 in each form
        plain = jaxinfer.place(model, mesh, kernels="xla").weights
        jax.tree.map(np.testing.assert_array_equal, canonical(placed.weights), plain)
        described = lambda weights: jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding.spec), weights)
        assert described(placed_shapes(module_tensors(model), mesh, config=model.config).weights) == described(placed.weights)
        assert weight_bytes(module_tensors(model), mesh, placed.plan) * mesh.size == placed.nbytes


@pytest.mark.parametrize("form", FORMS)
def test_shards_hold_the_same_bytes(dividing: TinyModel, form: str) -> None:
    check(jaxinfer.load_model(dividing.folder, quantization=form))


@pytest.mark.full
@pytest.mark.parametrize(("name", "form"), MADE)
def test_methods_give_shards_the_same_bytes_and_text(dividing: TinyModel, tmp_path, name: str, form: str) -> None:
    model = by_method(dividing, tmp_path, name, form)
    check(model)
    same_text(model, SIZES[1:])


@pytest.mark.full
@pytest.mark.parametrize(
    "form", ["fp8-a16", "nf4", "mxfp4", "w4a8-g32"]
)  # a level of fp8 inputs turns with the last bit of a sum
def test_the_same_text(dividing: TinyModel, form: str) -> None:
    same_text(jaxinfer.load_model(dividing.folder, quantization=form), SIZES[1:])


def same_text(model: jaxinfer.Decoder, sizes) -> None:
    """Greedy ids of prompts in a batch."""
    config = EngineConfig(inference_max_tokens=48, micro_batch_size=2)
    prompts = [[token % 96 for token in PROMPTS[i]] for i in (1, 2, 5)]
    expected = Engine(jaxinfer.place(model, make_mesh()), config).generate(prompts, with_runner_up(GREEDY))
    for tp, pp in sizes:
        engine = Engine(jaxinfer.place(model, make_mesh(tensor=tp, stage=pp)), config)
        assert_same_texts(engine.generate(prompts, GREEDY), expected, LEVELS)
