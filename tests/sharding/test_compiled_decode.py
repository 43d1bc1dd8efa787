"""The compiled decode program: exactly the collectives that are expected, and no copy of a weight or of the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hlo import collectives, copies
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from jaxinfer.placement import Placed, place
from jaxinfer.programs import STATE, Programs
from pallas_kernels.deviceless import topology_mesh
from pallas_kernels.qtensor import round_to_nearest
from pallas_kernels.uncached import without_compilation_cache
from sharding.collectives import expected
from sharding.mesh import make_mesh
from sharding.rules import MESH_AXES

CONFIG = ModelConfig(
    family="llama",
    vocab=104,
    embed=64,
    layers=3,
    attention=AttentionConfig(heads=8, kv_heads=4, head_dim=16, scale=0.25, rope=RopeConfig(dim=16)),
    mlp=MLPConfig(width=256, activation="silu"),
    norm_eps=1e-5,
    tied=True,
    max_positions=64,
)
TOKENS = 40  # of the cache, unlike any other size
CAPPED = dataclasses.replace(
    CONFIG,
    attention=dataclasses.replace(CONFIG.attention, qk_norm=True, soft_cap=2.0),
    norm="rms_offset",
    post_norms=True,
    windows=(4, None, 6),
    embed_scale=8.0,
    soft_cap=3.0,
)
MIXED = dataclasses.replace(CONFIG, moe=MoEConfig(experts=5, used=2, width=96, normalise=True, layers=(1, 2)))
LEARNED = dataclasses.replace(
    CONFIG,
    attention=dataclasses.replace(CONFIG.attention, rope=None, bias=True, output_bias=True),
    mlp=dataclasses.replace(CONFIG.mlp, gated=False, bias=True),
    norm="layer",
    learned_positions=True,
)


def decoder(quantized: bool, config: ModelConfig = CONFIG) -> Decoder:
    model = Decoder(config)
    if quantized:
        for _, p in nnx.iter_graph(model):
            if isinstance(p, nnx.Param) and p.get_value().ndim > 1 and p.get_metadata("axes")[0]:
                p.set_value(round_to_nearest(p.get_value(), format="int8"))
    return model


def lowered(placed: Placed, batch: int, processors=(), cache_dtype=jnp.float32):
    """The decode program lowered for the shapes that the placed model has, on its mesh or another one of the same shape."""
    programs = Programs(placed, cache_dtype=cache_dtype)
    state = jax.eval_shape(programs.state(batch, TOKENS))
    on_mesh = lambda spec, tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(placed.mesh, spec)), tree
    )
    fields = [f.name for f in dataclasses.fields(STATE)]
    state = dataclasses.replace(state, **{name: on_mesh(getattr(STATE, name), getattr(state, name)) for name in fields})
    steps = on_mesh(PartitionSpec(), jax.ShapeDtypeStruct((), jnp.int32))
    return programs.decode(0, processors).lower(placed.weights, state, steps), state


def large_shapes(*trees) -> set[tuple[int, ...]]:
    """Shapes of one device's part of every weight and cache, with and without the stage axis that is taken off."""
    local = {a.sharding.shard_shape(a.shape) for a in jax.tree.leaves(trees) if len(a.shape) > 2 or a.size > 4096}
    return local | {shape[1:] for shape in local}


def check(placed: Placed, text: str, state) -> None:
    ragged = placed.mesh.devices.flat[0].platform == "gpu"
    assert collectives(text) == expected(placed.plan.config, placed.mesh, ragged=ragged, kinds=placed.plan.kinds).by_name()
    assert copies(text, large_shapes(placed.weights, state.caches, state.history, state.sampling.edits)) == []


def test_an_int4_cache_on_cpu_devices():
    """Levels are made anew for a group at a time, in place."""
    placed = place(decoder(False), make_mesh(tensor=2))
    program, state = lowered(placed, 3, cache_dtype=jnp.int4)
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(
    ("stage", "tensor", "quantized"),
    [(1, 1, False), (1, 8, False), (2, 1, False), (2, 4, False), (1, 1, True), (2, 4, True)],
)
def test_on_cpu_devices(stage, tensor, quantized):
    placed = place(decoder(quantized), make_mesh(stage=stage, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(("stage", "hosts", "tensor"), [(1, 2, 4), (2, 2, 2)])
def test_with_tensor_shards_on_two_hosts(stage, hosts, tensor):
    placed = place(decoder(False), make_mesh(stage=stage, tensor_hosts=hosts, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(("data", "stage", "tensor"), [(2, 2, 2)])
def test_with_data_shards(data, stage, tensor):
    placed = place(decoder(False), make_mesh(data=data, stage=stage, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(
    ("stage", "expert", "tensor", "quantized"),
    [
        (1, 2, 2, False),
        pytest.param(2, 2, 2, False, marks=pytest.mark.slow),
        pytest.param(1, 4, 1, True, marks=pytest.mark.slow),
    ],
)
def test_with_experts_on_several_devices(stage, expert, tensor, quantized):
    """Three all-to-alls in a layer that has experts, none in one that has not."""
    placed = place(decoder(quantized, MIXED), make_mesh(stage=stage, expert=expert, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


def test_with_a_logits_processor():
    """A user's function sees the gathered logits of a draw: no collective is added for it."""
    placed = place(decoder(False), make_mesh(stage=2, tensor=2))
    program, state = lowered(placed, batch=2, processors=((1, lambda logits, tokens, length: logits.at[tokens].add(length)),))
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(
    ("config", "stage", "tensor"),
    [
        pytest.param(CAPPED, 1, 1, id="capped"),
        pytest.param(LEARNED, 1, 1, id="learned"),
        pytest.param(CAPPED, 2, 2, id="capped on 2 stages of 2", marks=pytest.mark.slow),
        pytest.param(LEARNED, 2, 2, id="learned on 2 stages of 2", marks=pytest.mark.slow),
    ],
)
def test_what_other_families_have_costs_no_collective_and_no_copy(config, stage, tensor):
    placed = place(decoder(False, config), make_mesh(stage=stage, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(
    ("config", "stage", "expert", "hosts", "tensor"),
    [
        pytest.param(CONFIG, 1, 1, 1, 1, id="one"),
        pytest.param(CONFIG, 1, 1, 1, 8, id="8 shards"),
        pytest.param(CONFIG, 2, 1, 1, 4, id="2 stages of 4"),
        pytest.param(MIXED, 1, 4, 1, 2, id="4 expert shards of 2", marks=pytest.mark.slow),
        pytest.param(CONFIG, 1, 1, 2, 4, id="2 hosts of 4", marks=pytest.mark.slow),
    ],
)
def test_for_h100s_without_one(config, stage, expert, hosts, tensor):
    here = place(decoder(False, config), make_mesh(stage=stage, expert=expert, tensor_hosts=hosts, tensor=tensor))
    mesh = topology_mesh("h100", (1, stage, expert, hosts, tensor), MESH_AXES, hosts=hosts)
    there = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, a.sharding.spec)), here.weights
    )
    placed = dataclasses.replace(here, mesh=mesh, weights=there)
    program, state = lowered(placed, batch=2)
    with without_compilation_cache():
        text = program.compile().as_text()
    check(placed, text, state)


def test_copies_are_seen():
    """The check can fail: a cache that is used after it was written to is copied."""

    @jax.jit
    def twice(cache, x):
        return cache.at[0, 0].set(x), cache.sum()

    text = twice.lower(jnp.zeros((7, 5, 3)), jnp.ones(3)).compile().as_text()
    assert copies(text, {(7, 5, 3)})
    assert copies(text, {(7, 5, 4)}) == []
    assert collectives(text) == {}
