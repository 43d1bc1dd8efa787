"""Random numbers that depend on (seed, step, token id) alone: Threefry-2x32 with 20 rounds.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry(key, counter):
    """A pair of uint32 arrays under a pair of uint32 keys, broadcast together -> a pair of random uint32 arrays."""
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(turn)) | (b >> np.uint32(32 - turn)))
        a = a + keys[(block + 1) % 3]
        b = b + keys[(block + 2) % 3] + np.uint32(block + 1)
    return a, b


def gumbel(seeds, steps, ids):
    """Standard Gumbel noise: seeds uint32 [B], steps int32 [B], ids int32 [V] -> float32 [B, V], finite."""
    key = (seeds[:, None], steps.astype(jnp.uint32)[:, None])
    counter = ids.astype(jnp.uint32)[None]
    bits, _ = threefry(key, (counter, jnp.zeros_like(counter)))
    # 31 bits, since int32 -> float32 is one instruction everywhere. The large values come from small u, where floats are dense.
    u = ((bits >> np.uint32(1)).astype(jnp.int32).astype(jnp.float32) + 0.5) * np.float32(2**-31)
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, np.float32(1 - 2**-24))))
