"""Rules from logical axes to mesh axes, and meshes."""

import jax
import pytest
from jax.sharding import Mesh, PartitionSpec

from sharding.context import ParallelContext
from sharding.errors import AxisRuleError, MeshError
from sharding.mesh import check_mesh, make_mesh
from sharding.rules import spec


def test_spec_of_logical_axes():
    tensor = ("tensor_hosts", "tensor")
    assert spec(("heads", "embed")) == PartitionSpec(tensor, None)
    assert spec(("stage", "embed", "mlp")) == PartitionSpec("stage", None, tensor)
    assert spec(("vocab", "embed")) == PartitionSpec(("stage", *tensor), None)
    assert spec((None, "batch")) == PartitionSpec(None, ("data", "expert"))
    assert spec(("experts", "expert_mlp", "embed")) == PartitionSpec(("expert",), tensor, None)


def test_collisions_and_unknown_axes_are_refused():
    with pytest.raises(AxisRuleError, match=r"'heads' and 'mlp'.*mesh axis 'tensor_hosts'"):
        spec(("heads", "mlp"))
    with pytest.raises(AxisRuleError, match="no rule for the logical axis 'hedas'"):
        spec(("hedas",))


def test_context_names_the_axes_that_are_larger_than_one():
    context = ParallelContext.from_mesh(make_mesh(stage=2, tensor=4))
    assert (context.tensor, context.stage, context.stages, context.rows) == (("tensor",), "stage", 2, ())
    assert context.vocab == ("stage", "tensor")
    context = ParallelContext.from_mesh(make_mesh(data=2, expert=2))
    assert (context.rows, context.expert, context.tensor) == (("data", "expert"), "expert", ())
    alone = ParallelContext.from_mesh(make_mesh())
    assert alone == ParallelContext()


def test_meshes_that_cannot_be_are_refused():
    with pytest.raises(MeshError, match="tensor 4096 needs 4096 devices, there are"):
        make_mesh(tensor=4096)
    with pytest.raises(MeshError, match="mesh axis stage is 0"):
        make_mesh(stage=0)
    with pytest.raises(MeshError, match="has axes"):
        check_mesh(Mesh(jax.devices()[:1], ("tensor",)))
