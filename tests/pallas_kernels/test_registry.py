"""Implementations by name: the choice, the refusals, the target of a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import registry
from pallas_kernels.errors import BackendError
from pallas_kernels.norm import rms_norm
from pallas_kernels.target import Target, current_target

CPU = Target(platform="cpu", device_kind="cpu")
GPU = Target(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


@pytest.fixture
def op():
    """An operation `twice` of a user's own, with a reference, a GPU kernel and one that is picky about sizes."""
    only_gpu = lambda target, facts: target.platform == "gpu"
    picky = lambda target, facts: (
        True if facts.get("width", 0) % 64 == 0 else f"width {facts.get('width')} is not a multiple of 64"
    )
    registry.register("twice", "reference", lambda x: x + x)
    registry.register("twice", "kernel", lambda x: 2 * x, supports=only_gpu, priority=20)
    registry.register("twice", "wide", lambda x: x * 2, supports=picky, priority=10)
    yield "twice"
    for i in registry.implementations("twice"):
        registry.unregister("twice", i.name)
    assert "twice" not in registry.operations()


def test_the_most_preferred_that_can_run_is_chosen(op):
    assert registry.choose(op, target=GPU, width=64).name == "kernel"
    assert registry.choose(op, target=CPU, width=64).name == "wide"
    assert registry.choose(op, target=CPU, width=65).name == "reference"
    assert [i.name for i in registry.implementations(op)] == ["kernel", "wide", "reference"]


def test_a_named_one_runs_or_says_why_not(op):
    assert registry.choose(op, "reference", GPU).name == "reference"
    with pytest.raises(BackendError, match="width 65 is not a multiple of 64"):
        registry.choose(op, "wide", CPU, width=65)
    with pytest.raises(BackendError, match=r"does not support cpu \(cpu\) with width=64"):
        registry.choose(op, "kernel", CPU, width=64)
    with pytest.raises(BackendError, match="no implementation 'mine'; there are kernel, wide, reference"):
        registry.choose(op, "mine", CPU)


def test_nothing_that_can_run_lists_every_reason(op):
    registry.unregister(op, "reference")
    with pytest.raises(BackendError, match=r"kernel: it does not support.*wide: width 3 is not"):
        registry.choose(op, target=CPU, width=3)


def test_names_are_not_taken_twice(op):
    with pytest.raises(BackendError, match="already"):
        registry.register(op, "reference", lambda x: x)
    assert registry.register(op, "reference", lambda x: -x, replace=True).function(1) == -1


def test_unknown_operation():
    with pytest.raises(BackendError, match=r"no operation 'nothing'; known are .*rms_norm"):
        registry.choose("nothing")


def test_users_add_to_an_existing_operation():
    x, scale = jnp.ones((2, 4)), jnp.ones(4)
    registry.register("rms_norm", "mine", lambda x, scale, **_: x * 0 + 7, priority=99)
    try:
        assert (rms_norm(x, scale, eps=1e-5) == 7).all()
        assert (rms_norm(x, scale, eps=1e-5, implementation="reference") < 2).all()
    finally:
        registry.unregister("rms_norm", "mine")


def test_target_without_a_mesh():
    assert current_target() == Target(platform=jax.default_backend(), device_kind=jax.devices()[0].device_kind)


def test_target_inside_shard_map_is_the_meshs():
    seen = []

    def body(x):
        seen.append(current_target())
        return x

    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    spec = PartitionSpec("tensor")
    jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.ones(4))
    assert seen == [Target(platform=jax.devices()[0].platform, device_kind=jax.devices()[0].device_kind)]


def test_target_of_a_deviceless_mesh():
    seen = []

    def body(x):
        seen.append(current_target())
        return x

    device = jax.sharding.AbstractDevice(device_kind=GPU.device_kind, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    spec = PartitionSpec("tensor")
    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec), jax.ShapeDtypeStruct((8,), jnp.float32))
    assert seen == [GPU]


def test_using(op):
    choice = lambda: registry.choose(op, target=CPU, width=64).name
    with registry.using({op: "reference"}):
        assert choice() == "reference"
        with registry.using(without=["wide"]):
            assert choice() == "reference"
        with registry.using({op: "wide"}):
            assert choice() == "wide"
        assert registry.choose(op, "wide", CPU, width=64).name == "wide"  # the call's own word is the last
    with registry.using(without=["wide"]):
        assert choice() == "reference"
    assert choice() == "wide"
    with registry.using({op: "kernel"}), pytest.raises(BackendError, match="kernel"):
        choice()
    with pytest.raises(BackendError, match="no implementation 'narrow'"), registry.using({op: "narrow"}):
        pass


def test_using_is_seen_through_caches(op):
    """A function that was traced is traced again under another wish."""
    registry.register(op, "other", lambda x: x * 0 - 1)

    @jax.jit
    def twice(x):
        return registry.choose(op, target=CPU, width=64).function(x)

    assert twice(3.0) == 6
    with registry.using({op: "other"}):
        assert twice(3.0) == -1
    assert twice(3.0) == 6
