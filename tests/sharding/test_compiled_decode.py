"""Compiled programs: exactly the collectives that are expected, in the loop and outside of it, and no copy of a weight or of the cache."""

import collections as collections_module
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hlo import collectives, copies, gathered, placed_collectives
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer import programs
from jaxinfer.layout import make_plan
from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from jaxinfer.placement import Placed, module_tensors, place, placed_shapes
from jaxinfer.programs import STATE, Programs
from jaxinfer.sampling import SamplingArrays
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
WIDE = dataclasses.replace(  # 16 shards of two heads and one kv head
    CONFIG, attention=dataclasses.replace(CONFIG.attention, heads=32, kv_heads=16), mlp=MLPConfig(width=512, activation="silu")
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


def check(placed: Placed, text: str, state=None, program: str = "decode", chunked: bool = False) -> None:
    ragged = placed.mesh.devices.flat[0].platform == "gpu"
    more = {"ragged": ragged, "kinds": placed.plan.kinds, "sequence": placed.plan.context.split_tokens, "chunked": chunked}
    due = expected(placed.plan.config, placed.mesh, program=program, **more)
    assert placed_collectives(text) == (due.loop.by_name(), due.outside.by_name())
    kept = () if state is None else (state.caches, state.history, state.sampling.edits)
    large = large_shapes(placed.weights, *kept)
    assert copies(text, large) == []
    assert gathered(text, {shape for shape in large if len(shape) > 1}) == []  # sums in layers are vectors


def lowered_prefill(placed: Placed, rows: int, tokens: int = 16, chunk: int | None = None):
    """The prefill program lowered for `rows` prompts."""
    programs = Programs(placed, cache_dtype=jnp.float32, prefill_chunk=chunk)
    sampling = jax.eval_shape(lambda: SamplingArrays.zeros((rows,)))
    ids, lengths = jax.ShapeDtypeStruct((rows, tokens), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    program = programs.prefill(0)
    return program.lower(*program.abstract(placed.weights, ids, lengths, sampling))


@pytest.mark.slow
def test_an_int4_cache_on_cpu_devices():
    """Levels are made anew for a group at a time, in place."""
    placed = place(decoder(False), make_mesh(tensor=2))
    program, state = lowered(placed, 3, cache_dtype=jnp.int4)
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(
    ("stage", "tensor", "quantized"),
    [
        (2, 4, False),
        (1, 1, True),
        *(pytest.param(*s, marks=pytest.mark.slow) for s in [(1, 1, False), (1, 8, False), (2, 1, False), (2, 4, True)]),
    ],
)
def test_on_cpu_devices(stage, tensor, quantized):
    placed = place(decoder(quantized), make_mesh(stage=stage, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "tensor"), [(1, 2), (2, 2)])
def test_reading_prompts_in_chunks(stage, tensor):
    """All layers once in the text, in a loop over chunks."""
    placed = place(decoder(False), make_mesh(stage=stage, tensor=tensor))
    check(placed, lowered_prefill(placed, rows=2, tokens=18, chunk=5).compile().as_text(), program="prefill", chunked=True)


@pytest.mark.slow
def test_slots_that_a_stage_jumps_over():
    """A conditional around a layer and its cache: no collective more, and no copy of either."""
    mesh = make_mesh(stage=2, tensor=2)
    model = decoder(False)
    placed = place(model, mesh, plan=make_plan(model.config, mesh, speeds=(0.4, 1.0)))
    assert placed.plan.counts == (1, 2) and placed.plan.jumped == (False, True)
    program, state = lowered(placed, batch=2)
    text = program.compile().as_text()
    check(placed, text, state)
    check(placed, lowered_prefill(placed, rows=4).compile().as_text(), program="prefill")


@pytest.mark.parametrize(("stage", "hosts", "tensor"), [(1, 2, 4), pytest.param(2, 2, 2, marks=pytest.mark.slow)])
def test_with_tensor_shards_on_two_hosts(stage, hosts, tensor):
    placed = place(decoder(False), make_mesh(stage=stage, tensor_hosts=hosts, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "stage", "tensor"), [(2, 2, 2)])
def test_with_data_shards(data, stage, tensor):
    placed = place(decoder(False), make_mesh(data=data, stage=stage, tensor=tensor))
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.parametrize(
    ("config", "stage", "expert", "hosts", "tensor"),
    [
        (CONFIG, 2, 1, 1, 4),
        pytest.param(CONFIG, 1, 1, 2, 4, marks=pytest.mark.slow),
        pytest.param(MIXED, 2, 2, 1, 2, marks=pytest.mark.slow),
    ],
    ids=["2 stages of 4", "2 hosts of 4", "2 stages of 2 expert shards of 2"],
)
def test_reading_prompts(config, stage, expert, hosts, tensor):
    """Layers in the loop over micro-batches, embedding and token outside of it."""
    placed = place(decoder(False, config), make_mesh(stage=stage, expert=expert, tensor_hosts=hosts, tensor=tensor))
    check(placed, lowered_prefill(placed, rows=4).compile().as_text(), program="prefill")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "stage", "hosts", "tensor"),
    [
        (CONFIG, 1, 1, 4),
        (CONFIG, 2, 1, 4),
        (CAPPED, 1, 2, 4),
        (MIXED, 2, 1, 2),
    ],
    ids=["4", "2 stages of 4", "2 hosts of 4, norms behind half layers", "experts on 2 stages of 2"],
)
def test_tokens_split_between_half_layers(config, stage, hosts, tensor):
    """A reduce-scatter and an all-gather for each sum of a prompt; decoding has the sums."""
    placed = place(decoder(False, config), make_mesh(stage=stage, tensor_hosts=hosts, tensor=tensor)).with_split_tokens()
    check(placed, lowered_prefill(placed, rows=4, tokens=18).compile().as_text(), program="prefill")
    program, state = lowered(placed, batch=2)
    check(placed, program.compile().as_text(), state)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "hosts", "tensor"), [(1, 1, 8), (2, 2, 4)])
def test_tokens_split_between_half_layers_on_h100s(stage, hosts, tensor):
    mesh = topology_mesh("h100", (1, stage, 1, hosts, tensor), MESH_AXES, hosts=hosts)
    plan = make_plan(CONFIG, mesh)
    placed = placed_shapes(module_tensors(decoder(False)), mesh, config=CONFIG, plan=plan).with_split_tokens()
    with without_compilation_cache():
        check(placed, lowered_prefill(placed, rows=4).compile().as_text(), program="prefill")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "expert", "tensor", "quantized"),
    [(1, 2, 2, False), (2, 2, 2, False), (1, 4, 1, True)],
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
        pytest.param(CONFIG, 1, 1, 1, 1, id="one", marks=pytest.mark.slow),
        pytest.param(CONFIG, 1, 1, 1, 8, id="8 shards"),
        pytest.param(CONFIG, 2, 1, 1, 4, id="2 stages of 4", marks=pytest.mark.slow),
        pytest.param(MIXED, 1, 4, 1, 2, id="4 expert shards of 2", marks=pytest.mark.slow),
        pytest.param(WIDE, 1, 1, 2, 8, id="2 hosts of 8", marks=pytest.mark.slow),
        pytest.param(CONFIG, 2, 1, 2, 4, id="2 stages on 2 hosts of 4 each", marks=pytest.mark.slow),
    ],
)
def test_for_h100s_without_one(config, stage, expert, hosts, tensor):
    """Also on more of them than there are CPU devices: shapes are all that is placed."""
    compiled_for_h100s(config, topology_mesh("h100", (1, stage, expert, hosts, tensor), MESH_AXES, hosts=hosts))


def compiled_for_h100s(config, mesh, speeds=None):
    plan = make_plan(config, mesh, speeds=speeds)
    placed = placed_shapes(module_tensors(decoder(False, config)), mesh, config=config, plan=plan)
    program, state = lowered(placed, batch=2)
    with without_compilation_cache():
        text = program.compile().as_text()
    check(placed, text, state)


@pytest.mark.slow
def test_collectives_start_early_on_h100s(monkeypatch):
    """A model's programs have the options of sharding.overlap: more of their collectives run beside something. XLA_FLAGS win."""
    mesh, scheduler = topology_mesh("h100", (1, 2, 1, 1, 4), MESH_AXES), "xla_gpu_enable_latency_hiding_scheduler"
    placed = placed_shapes(module_tensors(decoder(False)), mesh, config=CONFIG, plan=make_plan(CONFIG, mesh))

    def early(**options):
        monkeypatch.setattr(programs, "_shared", collections_module.OrderedDict())
        with without_compilation_cache():
            text = lowered(placed, batch=2)[0].compile(compiler_options=options).as_text()
        return len(re.findall(r" [a-z-]+-start\(", text))

    with_ours = early()
    monkeypatch.setenv("XLA_FLAGS", f"--{scheduler}=false")  # which XLA itself reads once a process
    assert with_ours > early(**{scheduler: False})


@pytest.mark.slow
def test_slots_that_a_stage_jumps_over_on_h100s():
    compiled_for_h100s(CONFIG, topology_mesh("h100", (1, 2, 1, 1, 4), MESH_AXES), speeds=(0.4, 1.0))


def test_copies_are_seen():
    """The check can fail: a cache that is used after it was written to is copied."""

    @jax.jit
    def twice(cache, x):
        return cache.at[0, 0].set(x), cache.sum()

    text = twice.lower(jnp.zeros((7, 5, 3)), jnp.ones(3)).compile().as_text()
    assert copies(text, {(7, 5, 3)})
    assert copies(text, {(7, 5, 4)}) == []
    assert collectives(text) == {}


def test_gathered_weights_are_seen():
    """The check can fail: parts that are joined, and parts that are stacked."""
    mesh, split = make_mesh(tensor=2), PartitionSpec("tensor")
    for tiled in (False, True):
        run = lambda w, tiled=tiled: lax.all_gather(w, "tensor", tiled=tiled)
        text = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False))
        text = text.lower(jnp.ones((6, 5))).compile().as_text()
        assert gathered(text, {(3, 5)}) and gathered(text, {(6, 5), (3, 4)}) == []


def test_collectives_in_a_loop_and_outside_of_it_are_told_apart():
    """The check can fail: what a loop would do at each pass is in its body, or its condition, or in a branch there."""

    def run(x):
        def step(carry):
            i, y = carry
            return i + 1, lax.cond(i > 2, lambda y: lax.all_gather(y, "tensor").sum(0), lambda y: y, lax.psum(y, "tensor"))

        going = lambda carry: lax.pmax(carry[1].sum(), "tensor") < 9.0
        return lax.ppermute(lax.while_loop(going, step, (0, x))[1], "tensor", [(0, 1), (1, 0)])

    mesh, split = make_mesh(tensor=2), PartitionSpec("tensor")
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    text = program.lower(jnp.ones((4, 3))).compile().as_text()
    assert placed_collectives(text) == ({"all-reduce": 2, "all-gather": 1}, {"collective-permute": 1})
