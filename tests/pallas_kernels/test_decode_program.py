"""The engine's programs made of GPU kernels: their tokens, and, compiled for a GPU that is not here, what they launch and copy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hlo import copies
from jax.sharding import NamedSharding, PartitionSpec
from kernel_checks import kernels

import jaxinfer
from jaxinfer.api import open_model
from jaxinfer.config import EngineConfig
from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, RopeConfig
from jaxinfer.models.config import MoEConfig
from jaxinfer.placement import place
from jaxinfer.programs import STATE, Programs
from jaxinfer.sampling import SamplingArrays
from jaxinfer.tuning import FORMS, shapes_of_llama
from pallas_kernels import tuner
from pallas_kernels.deviceless import entries, inspect, topology_mesh
from pallas_kernels.qtensor import round_to_nearest
from sharding.mesh import make_mesh
from sharding.rules import MESH_AXES

CONFIG = ModelConfig(
    family="llama",
    vocab=512,
    embed=256,
    layers=2,
    attention=AttentionConfig(heads=8, kv_heads=2, head_dim=64, scale=0.125, rope=RopeConfig(dim=64)),
    mlp=MLPConfig(width=512, activation="silu"),
    norm_eps=1e-5,
    tied=False,
    max_positions=1024,
)
TOKENS = 1000  # of the cache, unlike any other size


def stored_as(model: Decoder, weights: str, *, group: int) -> None:
    for _, p in nnx.iter_graph(model):
        if isinstance(p, nnx.Param) and p.get_value().ndim > 1 and p.get_value().shape[1] % group == 0:
            value = p.get_value()
            p.set_value(
                value.astype(weights) if weights == "bfloat16" else round_to_nearest(value, format=weights, group=group)
            )


def lowered(weights: str, cache, gpu: str, precision: str | None = None, config: ModelConfig = CONFIG):
    """A step of one sequence lowered for `gpu`, and the shapes of cache and weights."""
    model = Decoder(config)
    stored_as(model, weights, group=64)
    here = place(model, make_mesh(stage=1, tensor=1), kernels="xla")  # in the order that GPUs read
    mesh = topology_mesh(gpu, (1,) * len(MESH_AXES), MESH_AXES)
    there = lambda spec, tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, a.sharding.spec if spec is None else spec)
        ),
        tree,
    )
    placed = dataclasses.replace(here, mesh=mesh, weights=there(None, here.weights))
    programs = Programs(placed, cache_dtype=cache, matmul_precision=precision)
    state = jax.eval_shape(programs.state(1, TOKENS))
    fields = [f.name for f in dataclasses.fields(STATE)]
    state = dataclasses.replace(state, **{name: there(getattr(STATE, name), getattr(state, name)) for name in fields})
    steps = there(PartitionSpec(), jax.ShapeDtypeStruct((), jnp.int32))
    shapes = {a.shape for a in jax.tree.leaves((placed.weights, state.caches)) if a.size > 4096}
    return programs.decode(0, ()).lower(placed.weights, state, steps), shapes | {shape[1:] for shape in shapes}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("weights", "cache", "gpu"),
    [
        ("bfloat16", jnp.bfloat16, "h100"),
        pytest.param("int8", jnp.int8, "a100", marks=pytest.mark.slow),
        pytest.param("int4", jnp.bfloat16, "b200", marks=pytest.mark.slow),
        pytest.param("int4", jnp.float8_e4m3fn, "h100", marks=pytest.mark.slow),
    ],
)
def test_launches_of_a_layer(weights, cache, gpu):
    step, shapes = lowered(weights, cache, gpu)
    found = inspect(step)
    matmuls = [i for i, name in enumerate(found.launches) if name.startswith("quant_matmul")]
    layers = found.launches[matmuls[0] : matmuls[-1]]  # the last one is the head, with the norm before it
    assert len(layers) <= 8 * CONFIG.layers, layers
    assert [layers.count(name) for name in ("rope_cache", "decode_attention", "decode_reduce")] == [CONFIG.layers] * 3
    assert copies(found.text, shapes) == []
    assert all(kernel.spilled == 0 for kernel in found.kernels)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int4"])
def test_launches_of_a_layer_with_experts(weights):
    """Norm, router, choice, two matmuls and their sum, where a layer without experts has two launches after its attention."""
    moe = MoEConfig(experts=16, used=4, width=128, normalise=True, layers=(0, 1))
    step, shapes = lowered(weights, jnp.bfloat16, "h100", config=dataclasses.replace(CONFIG, moe=moe))
    found = inspect(step)
    first, second = (i for i, name in enumerate(found.launches) if name == "decode_attention")
    assert second - first <= 11, found.launches
    assert found.launches.count("route") == CONFIG.layers
    assert copies(found.text, shapes) == []
    assert all(kernel.spilled == 0 for kernel in found.kernels)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "instruction"), [("float32", ""), ("tf32_x3", "tf32"), ("tf32", "tf32"), ("bfloat16", "bf16")]
)
def test_the_precision_of_float32_reaches_the_kernels(precision, instruction):
    """In attention over a float32 cache, as the instruction that multiplies; in a matmul, as the bfloat16 that an input becomes."""
    found: list = []
    tasks = tuner.record(lambda: found.append(lowered("int8", jnp.float32, "a100", precision)))
    used = {kernel.name: kernel.tensor_cores for kernel in entries(found[0][0])}
    assert instruction in used["decode_attention"] and bool(used["decode_attention"]) == bool(instruction)
    terms = {task.key["terms"] for task in tasks if task.op == "quant_matmul" and task.key["format"] == "int8"}
    assert terms == {1 if precision == "bfloat16" else 2}


def of_llama(form: dict, tensor: int, name: str):
    """What an H100 runs for one sequence with two layers of Llama-3.1-8B on `tensor` of them, and the shapes of cache and weights there."""
    config = {"inference_max_tokens": TOKENS, "micro_batch_size": 1, "kv_cache": {"dtype": "bfloat16"}}
    config = dataclasses.replace(EngineConfig.load(config | {"tensor_parallel": {"tp_size": tensor}}), **form)
    with shapes_of_llama(layers=2) as folder:
        engine = open_model(folder, config, devices=list(topology_mesh("h100", (tensor,), ("x",)).devices)).engine()
    programs = engine.programs
    state = jax.eval_shape(programs.state(1, TOKENS))
    if name == "decode":
        program, more = programs.decode(0, ()), (state, jax.ShapeDtypeStruct((), jnp.int32))
    else:
        struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
        program, more = programs.prefill(0), (struct(1, 512), struct(1), jax.eval_shape(lambda: SamplingArrays.zeros((1,))))
    found = inspect(program.lower(*program.abstract(programs.shapes, *more)))
    arrays = [a for a in jax.tree.leaves((programs.shapes, state.caches)) if a.size > 1 << 20]
    shapes = {a.sharding.shard_shape(a.shape) if isinstance(a.sharding, NamedSharding) else a.shape for a in arrays}
    return found, shapes | {shape[1:] for shape in shapes}


COLLECTIVE = ("kNccl", "kAllReduce", "kCollective")  # thunks; a sum over shards after each half of a layer


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize("tensor", [1, 8])
@pytest.mark.parametrize("form", FORMS, ids=["bfloat16", "int8", "int4"])
def test_launches_of_a_layer_of_llama_3_1_8b(form, tensor, name):
    found, shapes = of_llama(form, tensor, name)
    first, second = (i for i, launch in enumerate(found.launches) if launch == f"{name}_attention")
    layer = found.launches[first:second]
    kernels = [launch for launch in layer if not launch.startswith(COLLECTIVE)]
    assert len(kernels) <= {"decode": 8, "prefill": 13}[name], kernels
    assert ("all-reduce" in found.text) == (tensor > 1)
    assert copies(found.text, shapes) == []
    assert all(kernel.spilled == 0 for kernel in found.kernels)


SMALL = dataclasses.replace(
    CONFIG,
    vocab=60,
    embed=32,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8, scale=0.35, rope=RopeConfig(dim=8)),
    mlp=MLPConfig(width=48, activation="silu"),
)
OTHER = dataclasses.replace(
    SMALL,
    attention=dataclasses.replace(SMALL.attention, qk_norm=True, soft_cap=2.0),
    norm="rms_offset",
    windows=(4, None),
    soft_cap=3.0,
)

# as in GPT-2: a kv head for each query head, biases, layer norms, positions that are learned
LEARNED = dataclasses.replace(
    SMALL,
    attention=dataclasses.replace(SMALL.attention, kv_heads=4, rope=None, bias=True, output_bias=True),
    mlp=MLPConfig(width=48, activation="gelu_tanh", gated=False, bias=True),
    norm="layer",
    learned_positions=True,
)
# one kv head for all, of an odd size, a part of which is rotated; experts in the second layer
ONE = dataclasses.replace(
    SMALL,
    attention=AttentionConfig(heads=4, kv_heads=1, head_dim=10, scale=0.3, rope=RopeConfig(dim=4)),
    moe=MoEConfig(experts=4, used=2, width=24, normalise=True, layers=(1,)),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "weights"),
    [
        pytest.param(SMALL, "float32", id="plain"),
        pytest.param(OTHER, "float32", id="windows, caps and norms of heads"),
        pytest.param(LEARNED, "float32", id="own kv heads and learned positions"),
        pytest.param(ONE, "float32", id="one kv head, partial rotation, experts"),
        pytest.param(SMALL, "int8", id="int8 weights"),
        pytest.param(OTHER, "int4", id="int4 weights"),
    ],
)
def test_greedy_tokens_of_the_kernels_are_those_of_the_reference(config, weights):
    model = Decoder(config)
    if weights != "float32":
        stored_as(model, weights, group=16 if weights == "int8" else 32)
    ids = jnp.asarray([[5, 17, 3, 41, 2, 9], [7, 1, 0, 0, 0, 0]], jnp.int32)
    run = lambda: jax.jit(lambda ids: jaxinfer.generate(model, ids, lengths=jnp.array([6, 2]), max_new_tokens=12).tokens)(ids)
    with kernels():
        found = run()
    np.testing.assert_array_equal(found, run())
