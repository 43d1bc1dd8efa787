"""What a model's attention has beside scores and a causal mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.errors import ShapeError


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("lengths", "sinks", "slopes", "relative"), meta_fields=("causal",)
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionTerms:
    """causal: a query sees no later keys. lengths: int32 [B], keys that a sequence has, instead of padding; None is all of them.
    sinks: float [N], a score per head that takes its part of the softmax and has no value (gpt-oss). slopes: float [N], ALiBi: a score
    loses slope |position - key| (Press et al. 2022, arXiv:2108.12409). relative: float [N, 2R + 1], what is added to the score of a key
    by its distance from the query, key - position clipped to -R .. R (T5's buckets written out, arXiv:1910.10683)."""

    causal: bool = True
    lengths: jax.Array | None = None
    sinks: jax.Array | None = None
    slopes: jax.Array | None = None
    relative: jax.Array | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the arrays that are there."""
        return tuple(n for n in ("lengths", "sinks", "slopes", "relative") if getattr(self, n) is not None)

    @property
    def reach(self) -> int:
        """R of `relative`, the distance from which on it is the same."""
        return 0 if self.relative is None else self.relative.shape[1] // 2


PLAIN = AttentionTerms()


def check_terms(terms: AttentionTerms, batch: int, heads: int) -> None:
    """Raises ShapeError for arrays that do not fit."""
    wanted = {"lengths": (batch,), "sinks": (heads,), "slopes": (heads,)}
    for name, shape in wanted.items():
        a = getattr(terms, name)
        if a is not None and a.shape != shape:
            raise ShapeError(f"attention: {name} must be {list(shape)}, got {list(a.shape)}")
    relative = terms.relative
    if relative is not None and (relative.ndim != 2 or relative.shape[0] != heads or relative.shape[1] % 2 != 1):
        raise ShapeError(f"attention: relative must be [{heads}, 2R + 1], got {list(relative.shape)}")


def positions_of(positions, q) -> jax.Array:
    """Positions of queries [B, T, ...], int32 [B, T]: as given, or their numbers."""
    if positions is None:
        return jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return positions.astype(jnp.int32)


def last_keys(terms: AttentionTerms, at, tokens: int) -> jax.Array:
    """The last key that queries at positions int32 [B, T] see, -1 where there is none; of a cache of so many tokens."""
    lengths = jnp.full(at.shape[:1], tokens, jnp.int32) if terms.lengths is None else terms.lengths.astype(jnp.int32)
    end = jnp.broadcast_to(jnp.minimum(lengths, tokens)[:, None] - 1, at.shape)
    return jnp.minimum(at, end) if terms.causal else end
