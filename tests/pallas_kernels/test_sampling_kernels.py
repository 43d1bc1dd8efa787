"""The GPU kernel of the choice of a token: interpreted against the reference, over a split vocabulary too, and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from kernel_checks import GPU_NAMES, compiled, kernels

from pallas_kernels.sampling import VocabShards, argmax, sample
from pallas_kernels.sampling.specs import SPECS
from pallas_kernels.tuning import tiles

S = jax.ShapeDtypeStruct


def logits_of(rng, rows, vocab, padding=0):
    logits = rng.normal(size=(rows, vocab)).astype(np.float32)
    logits[:, vocab - padding :] = -np.inf
    return logits


@pytest.mark.parametrize("name", ["odd.257", "odd.1"])
@pytest.mark.parametrize("tokens", [16, 256])
def test_argmax(rng, name, tokens):
    spec = SPECS[name]
    logits = logits_of(rng, 3, spec.size, spec.padding)
    logits[0, ::7] = logits[0].max()  # ties: the lowest id
    with kernels(), tiles({"argmax": {"tokens": tokens}}):
        found = argmax(jnp.asarray(logits), implementation="pallas")
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_a_row_of_nan_gives_an_id_of_the_vocabulary():
    with kernels():
        found = argmax(jnp.full((1, 20), jnp.nan), implementation="pallas")
    assert 0 <= int(found[0]) < 20


@pytest.mark.parametrize("cut", [False, True])
def test_draws_are_those_of_the_reference(rng, cut):
    B = 6
    logits = jnp.asarray(logits_of(rng, B, 257, 3))
    knobs = {
        "temperature": jnp.asarray([1, 0.7, 0, 1.5, 2, 0], jnp.float32),
        "top_k": jnp.asarray([0, 5, 5, 0, 40, 0], jnp.int32) * cut,
        "top_p": jnp.asarray([1, 1, 1, 0.6, 0.9, 1], jnp.float32) if cut else jnp.ones(B),
        "min_p": jnp.asarray([0.1, 0, 0, 0, 0, 0], jnp.float32) * cut,
        "seeds": jnp.asarray(rng.integers(0, 2**32, B), jnp.uint32),
        "steps": jnp.arange(B, dtype=jnp.int32),
    }
    with kernels(), tiles({"argmax": {"tokens": 64}}):
        found = jax.jit(functools.partial(sample, implementation="pallas"))(logits, **knobs)
    np.testing.assert_array_equal(found, sample(logits, **knobs, implementation="reference"))


def test_a_split_vocabulary(rng):
    shards, width = 4, 30
    logits = logits_of(rng, 2, shards * width)
    logits[1, 17] = logits[1, 95] = 9  # a tie between shards

    def local(part):
        place = VocabShards(
            offset=jax.lax.axis_index("v") * width,
            max=functools.partial(jax.lax.pmax, axis_name="v"),
            min=functools.partial(jax.lax.pmin, axis_name="v"),
        )
        return argmax(part, place, implementation="pallas")

    mesh = Mesh(np.array(jax.devices()[:shards]), ("v",))
    split = PartitionSpec(None, "v")
    with kernels():
        run = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)
        np.testing.assert_array_equal(jax.jit(run)(jnp.asarray(logits)), logits.argmax(-1))


@pytest.mark.aot
@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_argmax_compiles(gpu):
    logits = S((1, SPECS["llama_3_1_8b"].size), jnp.float32)
    found = compiled(gpu, argmax, logits, launches=("choose", "choose_of_blocks", "loop_select_fusion"))
    assert next(kernel for kernel in found.kernels if kernel.name == "choose").widest_load == 16


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPU_NAMES)
def test_a_draw_compiles(gpu):
    row = lambda dtype: S((4,), dtype)

    def run(logits, temperature, seeds, steps):
        off = jnp.zeros_like(steps)
        knobs = {"top_k": off, "top_p": jnp.ones_like(temperature), "min_p": jnp.zeros_like(temperature)}
        return sample(logits, temperature=temperature, seeds=seeds, steps=steps, **knobs)

    logits = S((4, SPECS["llama_3_1_8b"].size), jnp.float32)
    launches = ("loop_broadcast_fusion", "choose", "choose_of_blocks", "loop_select_fusion")
    compiled(gpu, run, logits, row(jnp.float32), row(jnp.uint32), row(jnp.int32), launches=launches)
