"""Log-probabilities of given tokens in plain jnp, float32 inside: the meaning of the operation."""

import jax.numpy as jnp

from pallas_kernels.cross_entropy.parts import Parts


def vocabulary_parts(logits, targets, first):
    z = logits.astype(jnp.float32)
    largest = jnp.max(z, -1)
    # a row of -inf has no largest value to subtract
    total = jnp.sum(jnp.exp(z - jnp.where(jnp.isfinite(largest), largest, 0)[..., None]), -1)
    place = targets - first
    inside = (place >= 0) & (place < z.shape[-1])
    at = jnp.clip(place, 0, z.shape[-1] - 1)
    target = jnp.where(inside, jnp.take_along_axis(z, at[..., None], -1)[..., 0], 0.0)
    return Parts(largest=largest, total=total, target=target)
