"""Attention by cuDNN's fused kernel, through jax.nn.dot_product_attention: only where it is named.

It wants tokens before heads, so that a cache is transposed first; a model that trains without one has that transposition for free.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.errors import BackendError
from pallas_kernels.launch import gpu_refusal
from pallas_kernels.target import interpreted

HOPPER = (9, 0)


def supports_attention(target, facts) -> bool | str:
    if reason := gpu_refusal(target):
        return reason
    if interpreted():
        return "it is cuDNN's compiled code; there is nothing to interpret"
    if 0 in facts["shape"]:
        return "there is nothing to attend"
    if facts["cache_dtype"] not in ("bfloat16", "float16"):
        return f"it takes keys and values in bfloat16 or float16, not in {facts['cache_dtype']}"
    size, widest = facts["shape"][-1], 256 if (target.capability or (0, 0)) >= HOPPER else 128
    if size > widest or size % 8:
        return f"it takes heads of at most {widest} elements and a multiple of 8, not of {size}"
    refused = {
        "a soft cap": facts["soft_cap"] is not None,
        "a window that is an array": facts["windowed"],
        "block tables": facts["paged"],
        "positions of causal queries; it numbers them from 0 (positions=None)": facts["causal"] and not facts["numbered"],
    } | {name: name in facts["terms"] for name in ("sinks", "slopes", "relative")}
    if found := [what for what, there in refused.items() if there]:
        return f"it does not take {', '.join(found)}"
    return True


def attention(q, cache, *, rows, positions, scale, soft_cap, window, terms, out_dtype):
    del positions, soft_cap, window  # there are none
    own = cache.take(rows)
    k, v = jnp.swapaxes(own.k, 1, 2), jnp.swapaxes(own.v, 1, 2)
    # a sequence without keys is given one, since what becomes of none is not said
    lengths = None if terms.lengths is None else jnp.clip(terms.lengths.astype(jnp.int32), 1, own.tokens)
    try:
        out = jax.nn.dot_product_attention(
            q.astype(k.dtype),
            k,
            v,
            scale=scale,
            is_causal=terms.causal,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        ).astype(out_dtype)
    except RuntimeError as error:  # jax looks for the library when it traces
        raise BackendError(f"attention: 'cudnn' cannot run here: {error} Install cuDNN, or name another") from error
    return out if lengths is None else jnp.where((terms.lengths > 0)[:, None, None, None], out, 0)
