"""Every collective by name, each with its gradient rule, and how many a compiled program must have.

Gradients are taken inside shard_map, where the transpose of a plain psum is wrong without replication tracking. So a tensor-parallel
region is opened by `enter` and closed by `leave`: identity forward and sum backward, and the reverse
(Shoeybi et al. 2019, Megatron-LM, section 3).
"""

import dataclasses
import functools

import jax
from jax import lax

Axes = tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def leave(x, axes: Axes):
    """Sum of the partial results of a region over `axes`; its gradient is the identity. One all-reduce."""
    return lax.psum(x, axes)


leave.defvjp(lambda x, axes: (lax.psum(x, axes), None), lambda axes, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter(x, axes: Axes):
    """Identity into a region over `axes`; its gradient is the sum. No collective forward."""
    return x


enter.defvjp(lambda x, axes: (x, None), lambda axes, _, g: (lax.psum(g, axes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_shards(x, axes: Axes, axis: int):
    """Join the shards of `x` along `axis`; its gradient is the own slice of the gradient. One all-gather."""
    return lax.all_gather(x, axes, axis=axis, tiled=True)


def _gather_fwd(x, axes, axis):
    return gather_shards(x, axes, axis), x.shape[axis]


def _gather_bwd(axes, axis, size, g):
    return (lax.dynamic_slice_in_dim(g, lax.axis_index(axes) * size, size, axis),)


gather_shards.defvjp(_gather_fwd, _gather_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def next_stage(x, axis: str):
    """Hand `x` to the following stage, the last one's to the first; its gradient goes the other way. One permute."""
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def _previous_stage(axis, _, g):
    n = lax.axis_size(axis)
    return (lax.ppermute(g, axis, [((i + 1) % n, i) for i in range(n)]),)


next_stage.defvjp(lambda x, axis: (next_stage(x, axis), None), _previous_stage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """Collectives in the text of a compiled program, where a loop's body counts once and both branches of a conditional count."""

    all_reduce: int = 0
    all_gather: int = 0
    collective_permute: int = 0

    def by_name(self) -> dict[str, int]:
        """Counts under their HLO names, zeros left out."""
        named = {"all-reduce": self.all_reduce, "all-gather": self.all_gather, "collective-permute": self.collective_permute}
        return {name: n for name, n in named.items() if n}


def expected_decode(*, slots: int, stages: int, tensor: int, data: int = 1) -> Expected:
    """What a decode program must have, and no more.

    slots: layers of the longest stage. stages, tensor, data: sizes of the mesh's axes. Per tick: two all-reduces a layer under tensor
    parallelism; where the vocabulary is split one for the embedding, two for the greedy token (largest logit, lowest id), two for
    log-probabilities if asked for, and one all-gather of the logits if any token is drawn; with a pipeline one all-reduce of the
    last stage's output and one permute; under a data axis one of a scalar, whether any shard goes on.
    """
    split_vocab, split_layers, pipeline = stages * tensor > 1, tensor > 1, stages > 1
    return Expected(
        all_reduce=5 * split_vocab + 2 * slots * split_layers + pipeline + (data > 1),
        all_gather=int(split_vocab),
        collective_permute=int(pipeline),
    )
