"""Logical axis names -> mesh axes: the one table, and the partition specs made from it.

A parameter names its axes once ("vocab", "embed", "heads", ...); what they mean on a mesh is decided here and nowhere else.
"""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

from sharding.errors import AxisRuleError

DATA, STAGE, EXPERT, TENSOR_HOSTS, TENSOR = "data", "stage", "expert", "tensor_hosts", "tensor"
MESH_AXES = (DATA, STAGE, EXPERT, TENSOR_HOSTS, TENSOR)
TENSOR_AXES = (TENSOR_HOSTS, TENSOR)
# Sequences are spread over these. Shards of the expert axis have rows of their own, and a part of the experts, which serve the rows of all.
ROW_AXES = (DATA, EXPERT)

# The vocabulary is split over the stages too, so that the first and the last stage cost no more than the others.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ROW_AXES,
    "stage": (STAGE,),
    "vocab": (STAGE, *TENSOR_AXES),
    "heads": TENSOR_AXES,
    "kv_heads": TENSOR_AXES,
    "mlp": TENSOR_AXES,
    "experts": (EXPERT,),
    "expert_mlp": TENSOR_AXES,
    "embed": (),
    "head_dim": (),
}


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Partition spec of an array whose axes have these logical names (None: not split).

    Raises AxisRuleError for a name without a rule, and where two axes of one array would be split over the same mesh axis.
    """
    used: dict[str, str] = {}
    entries = []
    for name in axes:
        if name is not None and name not in RULES:
            raise AxisRuleError(f"no rule for the logical axis {name!r}; known are {sorted(RULES)}")
        mesh_axes = RULES[name] if name else ()
        for axis in mesh_axes:
            if axis in used:
                raise AxisRuleError(
                    f"axes {used[axis]!r} and {name!r} of {tuple(axes)} would both be split over mesh axis {axis!r}"
                )
            used[axis] = str(name)
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)
