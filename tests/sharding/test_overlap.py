"""What XLA is told about overlap: which options there are, who decides about them, and what they do to programs for H100s."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.deviceless import topology_mesh
from pallas_kernels.uncached import without_compilation_cache
from sharding.mesh import make_mesh
from sharding.overlap import OVERLAP, overlap_options
from sharding.rules import MESH_AXES

SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


def gpus(count: int):
    return topology_mesh("h100", (1, 1, 1, 1, count), MESH_AXES)


def compiled(function, mesh, options, *args, **specs) -> str:
    sharded = jax.shard_map(function, mesh=mesh, check_vma=False, **specs) if specs else function
    with without_compilation_cache():
        return jax.jit(sharded, compiler_options=options).lower(*args).compile().as_text()


def test_options_are_for_several_gpus():
    assert overlap_options(make_mesh(tensor=2), {}) == {} and overlap_options(gpus(1), {}) == {}
    assert overlap_options(gpus(2), {}) == OVERLAP


def test_the_users_flags_win():
    rest = {name: value for name, value in OVERLAP.items() if name != SCHEDULER}
    assert overlap_options(gpus(2), {"XLA_FLAGS": f"--xla_dump_to=a --{SCHEDULER}=false"}) == rest
    assert overlap_options(gpus(2), {"XLA_FLAGS": f"--{SCHEDULER}_of_another_name=false"}) == OVERLAP
    assert overlap_options(gpus(2), {"XLA_FLAGS": " ".join(f"--{name}" for name in OVERLAP)}) == {}


@pytest.mark.aot
def test_the_compiler_knows_them():
    """It takes every option, and refuses what it does not know."""
    mesh = gpus(2)
    struct = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P()))
    summed = lambda options: compiled(lambda x: lax.psum(x, "tensor"), mesh, options, struct, in_specs=P(), out_specs=P())
    assert "all-reduce" in summed(overlap_options(mesh, {}))
    with pytest.raises(Exception, match="No such compile option"):
        summed({f"{SCHEDULER}_of_another_name": True})


@pytest.mark.aot
@pytest.mark.slow
def test_collective_matmul_is_for_products_that_xla_splits():
    """Why it is not among the options: it makes a loop of permutes of an all-gather that XLA has put in, and leaves ours as it is."""
    mesh = gpus(8)
    struct = lambda spec, *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    args = struct(P(None, "tensor"), 4, 8192, 2048), struct(P("tensor"), 8192, 2048)
    options = {"xla_gpu_threshold_for_windowed_einsum_mib": 0, "xla_gpu_multi_streamed_windowed_einsum": True}

    def ours(x, w):
        return jnp.einsum("btd,fd->btf", lax.all_gather(x, "tensor", axis=1, tiled=True), w)

    def xlas(x, w):
        return lax.with_sharding_constraint(jnp.einsum("btd,fd->btf", x, w), NamedSharding(mesh, P(None, None, "tensor")))

    specs = {"in_specs": (P(None, "tensor"), P("tensor")), "out_specs": P(None, None, "tensor")}
    assert "collective-permute" in compiled(xlas, mesh, options, *args)
    text = compiled(ours, mesh, options, *args, **specs)
    assert "collective-permute" not in text and "all-gather" in text
