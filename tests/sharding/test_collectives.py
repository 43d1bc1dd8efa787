"""Sums in layers over hosts: their values, their gradients, what is compiled of them, and what they send."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.deviceless import topology_mesh
from pallas_kernels.uncached import without_compilation_cache
from sharding.collectives import (
    BLOCK,
    all_gather_bytes,
    all_reduce_bytes,
    collect,
    dispatch,
    dispatch_bytes,
    expected_decode,
    expected_prefill,
    leave,
    leave_hosts,
    leave_hosts_bytes,
    permute_bytes,
    scatter_tokens_bytes,
)
from sharding.context import ParallelContext
from sharding.mesh import hosts_spanned, make_mesh
from sharding.partition import split_experts
from sharding.rules import MESH_AXES, TENSOR_AXES


def summed(mesh, int8: bool = False, direct: bool | None = None):
    """[shards, ...] -> for each device the sum over shards, [shards, ...]."""
    ctx = dataclasses.replace(ParallelContext.from_mesh(mesh), int8_hosts=int8)
    if direct is not None:
        ctx = dataclasses.replace(ctx, direct=direct)
    return jax.jit(
        jax.shard_map(
            lambda x: ctx.leave(x[0])[None], mesh=mesh, in_specs=P(TENSOR_AXES), out_specs=P(TENSOR_AXES), check_vma=False
        )
    )


@pytest.mark.parametrize("shape", [(8, 512), (3, 7), (1,)], ids=str)
def test_the_sum_in_layers_is_the_sum(shape):
    x = np.random.default_rng(1).standard_normal((8, *shape)).astype(np.float32)
    found = np.asarray(summed(make_mesh(tensor_hosts=2, tensor=4))(x))
    assert (found == found[0]).all()  # the same bits everywhere
    np.testing.assert_allclose(found[0], x.astype(np.float64).sum(0), atol=2e-6)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("hosts", "local"), [(2, 4), (2, 3), (4, 2)])
@pytest.mark.parametrize("shape", [(8, 512), (3, 7)], ids=str)
def test_int8_across_hosts_stays_within_its_bound(shape, hosts, local, direct):
    """Rounded once by half of the scale of its block at most, on more than two hosts again; blocks are those of a device's part of the
    flat sum."""
    x = np.random.default_rng(2).standard_normal((hosts * local, *shape)).astype(np.float32)
    x[:, 0] *= 100
    found = np.asarray(summed(make_mesh(tensor_hosts=hosts, tensor=local), int8=True, direct=direct)(x))
    assert (found == found[0]).all()
    flat = x.reshape(hosts, local, -1).sum(1, dtype=np.float64)  # of each host
    part = -(-flat.shape[1] // local)
    parts = np.pad(flat, ((0, 0), (0, local * part - flat.shape[1]))).reshape(hosts, local, part)
    blocks = np.pad(parts, ((0, 0), (0, 0), (0, -part % (hosts * BLOCK)))).reshape(hosts, local, -1, BLOCK)
    largest = np.abs(blocks).max(-1).sum(0)
    if hosts > 2:
        largest += np.abs(blocks.sum(0)).max(-1) * (1 + hosts / 254)
    error = np.abs(np.pad(found[0].reshape(-1) - flat.sum(0), (0, local * part - flat.shape[1]))).reshape(local, part)
    error = np.pad(error, ((0, 0), (0, -part % (hosts * BLOCK)))).reshape(local, -1, BLOCK).max(-1)
    assert (error <= largest / 254 + 1e-4).all() and error.max() > 1e-3


def test_the_gradient_is_the_identity():
    mesh = make_mesh(tensor_hosts=2, tensor=2)

    def loss(x, sum_):
        return jnp.sum(jnp.sin(sum_(x)))

    def gradient(sum_):
        run = lambda x: jax.grad(lambda x: loss(x, sum_))(x)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P(TENSOR_AXES), out_specs=P(TENSOR_AXES), check_vma=False))

    x = np.random.default_rng(3).standard_normal((4, 6)).astype(np.float32)
    layered = gradient(lambda x: leave_hosts(x, *TENSOR_AXES, False, True))(x)
    np.testing.assert_allclose(layered, gradient(lambda x: leave(x, TENSOR_AXES))(x), atol=1e-6)
    np.testing.assert_allclose(layered, np.broadcast_to(np.cos(x.sum(0)), x.shape), atol=1e-5)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("hosts", "tokens"), [(1, 8), (1, 7), (2, 5), (2, 1)])
def test_shares_of_tokens(hosts, tokens, direct):
    """Each shard has its tokens of the sum, and all of them make it up; zeros fill what does not divide."""
    mesh = make_mesh(tensor_hosts=hosts, tensor=4 // hosts)
    ctx = dataclasses.replace(ParallelContext.from_mesh(mesh), direct=direct)
    x = np.random.default_rng(3).standard_normal((4, 2, tokens, 3)).astype(np.float32)

    def run(x):
        part = ctx.scatter_tokens(x[0])
        whole = ctx.leave(x[0])
        return (
            part[None],
            ctx.own_tokens(whole)[None],
            ctx.gather_tokens(part, tokens)[None],
            ctx.join_tokens(part, tokens)[None],
        )

    part, own, *joined = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=P(TENSOR_AXES), out_specs=P(TENSOR_AXES), check_vma=False)
    )(x)
    assert part.shape == (4, 2, -(-tokens // 4), 3)
    np.testing.assert_allclose(part, own, atol=1e-6)
    for whole in joined:
        np.testing.assert_allclose(whole, np.broadcast_to(x.sum(0), x.shape), atol=1e-6)


HOSTS, LOCAL = (["tensor_hosts"], ["tensor"])
STEPS = {  # groups of each kind, in their order, by: on CPUs, INT8, more than two hosts
    (False, False, False): {"reduce-scatter": LOCAL, "all-reduce": HOSTS, "all-gather": LOCAL},
    (False, True, False): {"reduce-scatter": LOCAL, "all-gather": HOSTS + LOCAL},
    (False, True, True): {"reduce-scatter": LOCAL, "all-to-all": HOSTS, "all-gather": HOSTS + LOCAL},
    (True, False, False): {"all-to-all": LOCAL, "all-reduce": HOSTS, "all-gather": LOCAL},
    (True, True, False): {"all-to-all": LOCAL, "all-gather": LOCAL},
    (True, True, True): {"all-to-all": LOCAL + HOSTS, "all-gather": HOSTS + LOCAL},
}


@pytest.mark.parametrize(
    ("cpu", "hosts", "local", "int8"),
    [
        (True, 2, 4, False),
        (True, 2, 4, True),
        (True, 4, 2, True),
        (False, 2, 8, False),
        (False, 2, 8, True),
        pytest.param(False, 4, 4, True, marks=pytest.mark.slow),
    ],
)
def test_what_is_compiled(cpu, hosts, local, int8):
    """The steps in their order; the groups inside are the devices of a host, those across have one device of each. On two hosts of CPUs
    INT8 is sent in two permutes, each of one device a place."""
    sizes = (1, 1, 1, hosts, local)
    mesh = make_mesh(tensor_hosts=hosts, tensor=local) if cpu else topology_mesh("h100", sizes, MESH_AXES, hosts=hosts)
    shape = jax.ShapeDtypeStruct((hosts * local, 16, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, P(TENSOR_AXES)))
    with without_compilation_cache():
        text = summed(mesh, int8).lower(shape).compile().as_text()
    due = STEPS[cpu, int8, hosts > 2]
    permutes = re.findall(r" collective-permute\(.*source_target_pairs=\{\{(.*?)\}\}", text)
    assert collectives(text) == {kind: len(groups) for kind, groups in due.items()} | (
        {"collective-permute": len(permutes)} if permutes else {}
    )
    assert permutes == (["0,4},{5,1},{2,6},{7,3", "4,0},{1,5},{6,2},{3,7"] if cpu and int8 and hosts == 2 else [])
    groups = {kind: re.findall(rf" {kind}(?:-start)?\(.*replica_groups=[^{{]*\{{'(\w+)'\}}", text) for kind in due}
    assert {kind: sorted(found) for kind, found in groups.items()} == {kind: sorted(axes) for kind, axes in due.items()}


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("uneven", [False, True], ids=["spread", "all to the last shard"])
def test_rows_reach_their_experts_and_come_back(shards, uneven):
    """Three experts a shard: rows of each arrive where it is, none is lost, and what is made of them returns to where each one was."""
    E, N, D = 3, 10, 2
    rng = np.random.default_rng(5)
    chosen = np.sort(rng.integers((shards - 1) * E if uneven else 0, shards * E, (shards, N)), 1)
    sizes = np.stack([np.bincount(row, minlength=shards * E).reshape(shards, E) for row in chosen]).astype(np.int32)
    x = rng.standard_normal((shards, N, D)).astype(np.float32)

    def run(x, sizes):
        arrived = dispatch(x[0], sizes[0], "expert", capacity=N, ragged=False)
        back = lambda rows: collect(rows, arrived, "expert", rows=N, ragged=False)
        factor = (1.0 + lax.axis_index("expert") * E + arrived.experts)[:, None]
        gradient = jax.grad(lambda x: jnp.sum(_through(x, sizes[0], N, factor) ** 2))(x[0])
        return arrived.rows[None], arrived.experts[None], back(arrived.rows * factor)[None], gradient[None]

    mesh = make_mesh(expert=shards)
    rows, experts, back, gradient = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    )(x, sizes)
    for shard in range(shards):
        real = np.asarray(experts[shard]) < E
        mine = chosen // E == shard
        np.testing.assert_array_equal(np.asarray(rows[shard])[real], x[mine])
        np.testing.assert_array_equal(np.asarray(experts[shard])[real], chosen[mine] % E)
        assert not np.asarray(rows[shard])[~real].any()
    np.testing.assert_allclose(back, x * (1 + chosen)[..., None], rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * x * (1 + chosen)[..., None] ** 2, rtol=1e-5)


def _through(x, sizes, rows, factor):
    arrived = dispatch(x, sizes, "expert", capacity=rows, ragged=False)
    return collect(arrived.rows * factor, arrived, "expert", rows=rows, ragged=False)


def test_ragged_rows_are_compiled_for_gpus():
    """Only the rows that there are: what is sent beside them is a few counts."""
    mesh = topology_mesh("h100", (1, 1, 4, 1, 1), MESH_AXES)
    struct = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("expert")))

    def run(x, sizes):
        arrived = dispatch(x, sizes, "expert", capacity=16, ragged=True)
        return collect(arrived.rows * 2, arrived, "expert", rows=16, ragged=True)

    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))
    with without_compilation_cache():
        text = program.lower(struct(64, 8, dtype=jnp.bfloat16), struct(16, 2, dtype=jnp.int32)).compile().as_text()
    assert collectives(text) == {"all-to-all": 1, "ragged-all-to-all": 2}


def test_experts_over_shards():
    assert split_experts(8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert split_experts(5, 4) == ((0, 1), (2, -1), (3, -1), (4, -1))
    assert split_experts(2, 4) == ((0,), (1,), (-1,), (-1,))


def test_bytes():
    """2 x 8 devices with 64 Ki numbers in bfloat16: what the compiled programs send, counted by hand."""
    nbytes = 2 * 65536
    assert all_reduce_bytes(nbytes, hosts=2, local=8).across == 245760
    assert leave_hosts_bytes(nbytes, hosts=2, local=8, item=2).across == 131072
    assert leave_hosts_bytes(nbytes, hosts=2, local=8, item=2, int8=True).across == 66560
    assert leave_hosts_bytes(nbytes, hosts=2, local=8, item=2).inside == 2 * 7 / 8 * nbytes
    assert leave_hosts_bytes(nbytes, hosts=2, local=8, item=2, int8=True).inside == 7 / 8 * (nbytes + 2 * 66560)
    four = leave_hosts_bytes(nbytes, hosts=4, local=8, item=2, int8=True)
    assert (four.inside, four.across) == (7 / 8 * (nbytes + 66560), 1.5 * 66560)
    assert all_reduce_bytes(nbytes, hosts=1, local=8).across == 0 and all_reduce_bytes(nbytes, hosts=8, local=1).inside == 0
    assert all_gather_bytes(800, shards=8) == 700 and permute_bytes(5) == 5
    shares = scatter_tokens_bytes(nbytes, hosts=2, local=8)  # with as many gathered, what the sum in layers sends
    both = leave_hosts_bytes(nbytes, hosts=2, local=8, item=2)
    assert (2 * shares.inside, 2 * shares.across) == (both.inside, both.across)
    assert 2 * scatter_tokens_bytes(nbytes, hosts=1, local=8).inside == all_reduce_bytes(nbytes, hosts=1, local=8).inside
    # 16 tokens of 100 bytes, 3 experts of each, over 4 shards of 2: at most 2 of a token's are on one shard
    assert dispatch_bytes(16, used=3, row=100, shards=4, experts=2) == 3 * 16 * 2 * 100 + 3 * 12
    assert dispatch_bytes(16, used=3, row=100, shards=4, experts=2, ragged=True) == 3 / 4 * 48 * 100 + 3 * 12


def test_expected():
    """Decoding has all in its loop; reading prompts has its layers in one where there are stages, and no loop where there are none."""
    layered = expected_decode(slots=3, stages=2, tensor=4, tensor_hosts=2)
    assert layered.loop.by_name() == {"all-reduce": 12, "all-gather": 7, "collective-permute": 1, "reduce-scatter": 6}
    flat = expected_decode(slots=3, stages=1, tensor=1, tensor_hosts=2)
    assert flat.loop.by_name() == {"all-reduce": 11, "all-gather": 1} and flat.outside.by_name() == {}
    quantised = expected_decode(slots=1, stages=1, tensor=2, tensor_hosts=2, int8=True).loop
    assert quantised.by_name() == {"all-reduce": 5, "all-gather": 5, "reduce-scatter": 2}
    four = {"slots": 1, "stages": 1, "tensor": 2, "tensor_hosts": 4, "int8": True}
    assert expected_decode(**four).loop.by_name() == {"all-reduce": 5, "all-gather": 5, "reduce-scatter": 2, "all-to-all": 2}
    assert expected_decode(**four, direct=True).loop.by_name() == {"all-reduce": 5, "all-gather": 5, "all-to-all": 4}
    sent = expected_decode(**(four | {"tensor_hosts": 2}), direct=True).loop
    assert sent.by_name() == {"all-reduce": 5, "all-gather": 3, "all-to-all": 2, "collective-permute": 4}
    experts = {"slots": 3, "stages": 1, "tensor": 1, "expert": 4, "moe_slots": 2}
    assert expected_decode(**experts).loop.by_name() == {"all-reduce": 1, "all-to-all": 6}
    ragged = expected_decode(**experts, ragged=True).loop
    assert ragged.by_name() == {"all-reduce": 1, "all-to-all": 2, "ragged-all-to-all": 4}
    assert expected_prefill(**experts).outside.by_name() == {"all-to-all": 6}
    staged = expected_prefill(slots=3, stages=2, tensor=4)
    assert staged.loop.by_name() == {"all-reduce": 6, "collective-permute": 1}
    assert staged.outside.by_name() == {"all-reduce": 6, "all-gather": 1}
    split = expected_prefill(slots=3, stages=2, tensor=4, sequence=True)
    assert split.loop.by_name() == {"reduce-scatter": 6, "all-gather": 6, "collective-permute": 1}
    assert split.outside.by_name() == {"all-reduce": 6, "all-gather": 2}
    direct = expected_prefill(slots=3, stages=2, tensor=4, tensor_hosts=2, sequence=True, direct=True)
    assert direct.loop.by_name() == {"all-to-all": 12, "all-gather": 12, "collective-permute": 1}


def test_a_mesh_from_the_hosts():
    assert hosts_spanned([0] * 8 + [1] * 8, 16) == 2
    assert hosts_spanned([0] * 8 + [1] * 8, 8) == 1
    assert hosts_spanned([0, 0, 1, 1, 2, 2, 3, 3], 4) == 2
    assert hosts_spanned([0, 0, 1, 1, 1, 1, 1, 1], 4) == 1  # two and two, then four of one
    assert hosts_spanned([0, 1, 0, 1], 4) == 1  # not one host after the other
    assert make_mesh(tensor=8).shape == {"data": 1, "stage": 1, "expert": 1, "tensor_hosts": 1, "tensor": 8}


@pytest.mark.parametrize(
    ("hosts", "sizes", "used", "across"),
    [
        ([0] * 3 + [1] * 5, {"data": 3, "tensor": 2}, [0, 1, 3, 4, 5, 6], 1),  # the third device is left over
        ([0] * 3 + [1] * 5, {"data": 4, "tensor": 2}, [*range(8)], 1),  # all are needed: one run lies on both
        ([0] * 4 + [1] * 4, {"tensor": 8}, [*range(8)], 2),
        ([0] * 4 + [1] * 4, {"data": 2, "tensor": 4}, [*range(8)], 1),
        ([0] * 5 + [1] * 3, {"tensor": 8}, [*range(8)], 1),  # unequal parts have no layers
    ],
)
def test_runs_of_tensor_shards_stay_on_a_host(monkeypatch, hosts, sizes, used, across):
    monkeypatch.setattr("sharding.mesh.hosts_of", lambda processes: hosts)
    mesh = make_mesh(**sizes)
    assert [device.id for device in mesh.devices.flat] == used and mesh.shape["tensor_hosts"] == across
