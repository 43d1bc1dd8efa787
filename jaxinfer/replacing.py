"""Other weights in the place of those that an engine has: no second copy of all of them is there at any time."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from jaxinfer.errors import TensorShapeError
from jaxinfer.layout import Plan
from jaxinfer.models.decoder import DecoderWeights, LayerWeights
from jaxinfer.placement import Form, Placer, Readable, form_of, placed_shapes


def check_alike(tensors: Mapping[str, Readable], mesh: Mesh, plan: Plan, old: DecoderWeights) -> None:
    """Raise TensorShapeError where the tensors would be placed in other dtypes or formats than the old weights. Reads nothing."""
    shapes = lambda weights: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
    if placed_shapes(tensors, mesh, config=plan.config, plan=plan, **form_of(old)).weights != shapes(old):
        raise TensorShapeError(["the new weights have other dtypes, or are quantised otherwise, than those of the engine"])


def replaced(
    tensors: Mapping[str, Readable], mesh: Mesh, plan: Plan, layers: list[LayerWeights | None], form: Form
) -> DecoderWeights:
    """What `place` gives for the same form, layer slot by layer slot. layers: the old ones, which nobody else holds: each entry
    becomes None before the next new one is made."""
    return _Replacer(tensors, mesh, plan, form, layers).run().weights


class _Replacer(Placer):
    def __init__(self, source, mesh, plan, form: Form, old: list[LayerWeights | None]):
        super().__init__(source, mesh, plan, None, **form)
        self.old = old

    def slot(self, slot: int) -> LayerWeights:
        new = jax.block_until_ready(super().slot(slot))
        self.old[slot] = None
        return new
