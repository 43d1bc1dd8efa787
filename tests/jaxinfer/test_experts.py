"""Mixtures of experts: one answer however experts and tokens are spread, quantised ones, and what is refused."""

from __future__ import annotations

import dataclasses

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import LEVELS, assert_same_texts, with_runner_up
from flax import nnx
from tiny_llama import tokens_of

import jaxinfer
from convert.native import save_native
from convert.readers.base import LazyTensor
from convert.rules import bind
from jaxinfer import EngineConfig, QuantizationConfig, SamplingParams, errors
from jaxinfer.engine import Engine
from jaxinfer.layout import make_plan
from jaxinfer.loading import open_source
from jaxinfer.memory import weight_bytes
from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from jaxinfer.models.families import mixtral
from jaxinfer.placement import InMemory, module_tensors, placed_shapes
from jaxinfer.quantization.methods import Method
from jaxinfer.quantizing import quantize_checkpoint
from pallas_kernels.qtensor import ActivationQuant, QTensor, dequantize, round_to_nearest
from sharding.mesh import make_mesh
from sharding.partition import Units

pytestmark = pytest.mark.usefixtures("rough_programs")

# Five experts, which no mesh divides; the first layer has none.
CONFIG = ModelConfig(
    family="mixtral",
    vocab=97,
    embed=32,
    layers=2,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, scale=8**-0.5, rope=RopeConfig(dim=8)),
    mlp=MLPConfig(width=48, activation="silu"),
    norm_eps=1e-5,
    tied=False,
    max_positions=64,
    moe=MoEConfig(experts=5, used=2, width=64, normalise=True, layers=(1,)),
)
PROMPTS = [np.random.default_rng(0).integers(0, 97, n).tolist() for n in (3, 9, 5, 12, 1, 7)]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
SLOW = pytest.mark.slow


def decoder(quantisation: dict | None = None) -> Decoder:
    model = Decoder(CONFIG, nnx.Rngs(3))
    if quantisation:
        for _, p in nnx.iter_graph(model):
            if isinstance(p, nnx.Param) and p.get_metadata("axes")[0] in ("experts", "heads", "kv_heads"):
                p.set_value(jax.tree.map(jnp.asarray, round_to_nearest(np.asarray(p.get_value()), **quantisation)))
    return model


def engine_of(model: Decoder, **sizes: int) -> Engine:
    return Engine(jaxinfer.place(model, make_mesh(**sizes)), EngineConfig(inference_max_tokens=64, micro_batch_size=2))


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """On one device, each prompt by itself."""
    engine = engine_of(decoder())
    return [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]


MESHES = [
    {"expert": 2, "tensor": 2},
    *(
        pytest.param(sizes, marks=SLOW, id=" ".join(f"{name} {size}" for name, size in sizes.items()))
        for sizes in (
            {"expert": 2},
            {"expert": 4},
            {"expert": 4, "tensor": 2},
            {"expert": 2, "stage": 2, "data": 2},
            {"expert": 8},  # more shards than experts
        )
    ),
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_greedy_ids_are_those_of_one_device(alone, sizes: dict[str, int]) -> None:
    """More prompts than there are slots, so that some come while others run."""
    assert tokens_of(engine_of(decoder(), **sizes).generate(PROMPTS, GREEDY)) == alone


@pytest.mark.parametrize(
    ("quantisation", "sizes"),
    [
        pytest.param({"format": "int8", "activation": ActivationQuant()}, {"expert": 2, "tensor": 2}, marks=SLOW),
        pytest.param({"format": "int8", "activation": ActivationQuant(group=None)}, {"tensor": 3}, marks=SLOW),
        pytest.param({"format": "int4", "group": 32}, {"expert": 4, "stage": 2}, marks=SLOW),
    ],
)
def test_quantised_experts_on_meshes(quantisation: dict, sizes: dict[str, int]) -> None:
    """The logical stack is quantised, so that every mesh holds the same levels."""
    model = decoder(quantisation)
    expected = engine_of(model).generate(PROMPTS, with_runner_up(GREEDY))
    assert_same_texts(engine_of(model, **sizes).generate(PROMPTS, GREEDY), expected, LEVELS)


@pytest.mark.parametrize("spec", ["w8a16", pytest.param("w4a16-g32", marks=SLOW)])
def test_a_checkpoint_with_quantised_experts(tmp_path, spec: str) -> None:
    """Every expert is rounded by itself, the router never; the model is that of the numbers that the stacks stand for."""
    case = golden_weights.load_case("mixtral")
    folder = golden_weights.write_case_folder(case, tmp_path / "mixtral")
    model = jaxinfer.load_model(folder, quantization=spec)
    block = model.blocks[1].mlp
    up, raw = block.up.get_value(), golden_weights.make_tensors(case["tensors"], case["seed"])
    assert isinstance(up, QTensor) and up.shape == (4, 96, 64) and block.router.get_value().dtype == jnp.float32
    one = raw["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    kept = round_to_nearest(one, format=up.format, group=up.group)
    np.testing.assert_array_equal(up.values[2], kept.values)
    ids, exact = np.array(case["prompts"][-1:], np.int32), case["logits"][-1][None]
    found = np.asarray(jax.jit(model)(ids))
    for _, p in nnx.iter_graph(model):
        if isinstance(p, nnx.Param) and isinstance(p.get_value(), QTensor):
            p.set_value(jnp.asarray(dequantize(p.get_value())))
    distance = lambda a, b: np.abs(a - b).max() / np.abs(b).max()
    assert distance(found, np.asarray(jax.jit(model)(ids))) < 1e-4 < distance(found, exact)


def test_what_cannot_be_done_with_experts_is_said(tmp_path) -> None:
    folder = golden_weights.write_case_folder(golden_weights.load_case("mixtral"), tmp_path / "mixtral")
    int8 = QuantizationConfig.parse("int8")
    with pytest.raises(errors.QuantizationError, match="has experts, whose bits are not chosen"):
        quantize_checkpoint(folder, tmp_path / "out", quantization=int8, budget=10**6)
    with pytest.raises(errors.QuantizationError, match="whose inputs get no static scale"):
        quantize_checkpoint(folder, tmp_path / "out", quantization=int8, method=Method(static_inputs=True))
    assert not (tmp_path / "out").exists()


def test_a_native_checkpoint(tmp_path) -> None:
    """Stacks are stored as such, and read shard by shard."""
    folder = golden_weights.write_case_folder(golden_weights.load_case("qwen3_moe_mixed"), tmp_path / "hf")
    opened = open_source(folder)
    config = QuantizationConfig.parse("int8")
    kept = opened.stored_as(dtype=None, quantization=config)
    save_native(tmp_path / "native", config=opened.config.to_dict(), tensors=kept, assets=opened.assets)
    again = open_source(tmp_path / "native")
    assert again.config == opened.config and again.tensors.keys() == opened.tensors.keys()
    cut = (Units(1, (5, -1, 2)), Units(8, (1,)), None)
    for path in ("blocks.1.mlp.up", "blocks.1.mlp.down"):
        for whole in (again.tensors[path].read(cut), InMemory(again.tensors[path].read()).read(cut)):
            jax.tree.map(np.testing.assert_array_equal, whole, kept[path].read(cut))


def test_memory_is_planned_as_it_is_placed() -> None:
    mesh = make_mesh(expert=2, tensor=2)
    model = decoder({"format": "int8"})
    placed = jaxinfer.place(model, mesh)
    device = mesh.devices.flat[0]
    held = sum(s.data.nbytes for a in jax.tree.leaves(placed.weights) for s in a.addressable_shards if s.device == device)
    assert weight_bytes(module_tensors(model), mesh, placed.plan) == held
    shapes = placed_shapes(module_tensors(model), mesh, config=CONFIG).weights
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.sharding), placed.weights
    )


def test_slots_of_two_kinds() -> None:
    """Dense layers first, which move fewer bytes: slots for those of the first stage, which the other leaves empty."""
    moe = dataclasses.replace(CONFIG.moe, layers=(2, 3, 4, 5))
    plan = make_plan(dataclasses.replace(CONFIG, layers=6, moe=moe), make_mesh(stage=2))
    assert plan.counts == (4, 2) and plan.kinds == ("dense", "dense", "moe", "moe")
    assert plan.used == ((True, True, True, True), (False, False, True, True)) and plan.jumped == ()
    assert [plan.layer(1, slot) for slot in range(4)] == [None, None, 4, 5]
    # where no stage has a layer in every slot, each jumps over those that it has none in
    alternating = dataclasses.replace(CONFIG, layers=4, moe=dataclasses.replace(CONFIG.moe, layers=(1, 3)))
    parts = make_plan(alternating, make_mesh(stage=4))
    assert parts.kinds == ("dense", "moe") and parts.jumped == (True, True)


class _Named(LazyTensor):
    dtype, shape = np.dtype(np.float32), (4, 3)

    def __init__(self, name: str):
        self.name = name

    def read(self, units=None):
        return np.zeros(self.shape, np.float32)


def test_experts_that_are_missing_or_too_many() -> None:
    """All of them are named, with the file's own names."""
    rules, name = mixtral.rules(CONFIG), "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
    tensors = {n: _Named(n) for n in (name.format(e) for e in (0, 1, 3, 5))}
    with pytest.raises(errors.CheckpointMismatchError) as raised:
        bind(rules, tensors, {"blocks.1.mlp.up": (5, 4, 3)})
    assert "the checkpoint has no model.layers.1.block_sparse_moe.experts.2.w3.weight" in str(raised.value)
    assert "experts.5.w3.weight is unknown to the model" in str(raised.value)
    full = {n: _Named(n) for n in (name.format(e) for e in range(5))}
    assert bind(rules, full, {"blocks.1.mlp.up": (5, 4, 3)})["blocks.1.mlp.up"].read().shape == (5, 4, 3)
    with pytest.raises(errors.UnexpectedTensorError, match="set twice"):
        whole = "model.layers.1.block_sparse_moe.experts.w3.weight"
        stack = _Named(whole)
        stack.shape = (5, 4, 3)
        bind(rules, full | {whole: stack}, {"blocks.1.mlp.up": (5, 4, 3)})


def test_what_cannot_be_is_refused() -> None:
    dense = dataclasses.replace(CONFIG, moe=None)
    with pytest.raises(errors.MeshError, match="an expert axis of 2 for a model without experts"):
        make_plan(dense, make_mesh(expert=2))
    with pytest.raises(ValueError, match="9 experts of a token, there are 5"):
        dataclasses.replace(CONFIG.moe, used=9)
    with pytest.raises(ValueError, match="layer 2 has experts, but there are 2 layers"):
        dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, layers=(0, 2)))
    with pytest.raises(ValueError, match="without biases"):
        dataclasses.replace(CONFIG, mlp=dataclasses.replace(CONFIG.mlp, bias=True))
