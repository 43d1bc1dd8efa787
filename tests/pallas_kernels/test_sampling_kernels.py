"""The GPU kernel of the choice of a token: interpreted against the reference, over a split vocabulary too, and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from kernel_checks import GPU_NAMES, compiled, kernels

from pallas_kernels.deviceless import compile_for
from pallas_kernels.sampling import VocabShards, argmax, sample
from pallas_kernels.sampling.pallas_threshold import least_kept
from pallas_kernels.sampling.reference import kept_from
from pallas_kernels.sampling.shards import WHOLE_VOCAB
from pallas_kernels.sampling.specs import SPECS
from pallas_kernels.tuning import tiles

S = jax.ShapeDtypeStruct
SMALL = {"tokens": 128, "step": 128}  # less for the interpreter to compile


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
    with kernels(), tiles({"argmax": {"tokens": 64}, "threshold": SMALL}):
        found = jax.jit(functools.partial(sample, implementation="pallas"))(logits, **knobs)
    np.testing.assert_array_equal(found, sample(logits, **knobs, implementation="reference"))


# several parts of a row, at least one of which is not full; more than one step in a part
@pytest.mark.parametrize(("tokens", "vocab"), [(256, 600), pytest.param(1024, 3001, marks=pytest.mark.slow)])
def test_what_is_kept_is_what_the_reference_keeps(rng, tokens, vocab):
    rows = [  # temperature, top_k, top_p, min_p
        (1.0, 0, 0.9, 0.0),
        (0.7, 5, 1.0, 0.0),
        (2.0, 50, 0.5, 0.0),
        (0.3, 1, 1.0, 0.0),
        (1.0, 2 * vocab, 0.99, 0.05),
        (1.0, 7, 0.3, 0.0),
        (5.0, 0, 1.0, 0.1),
        (1.0, 4, 0.999, 1.0),
        (1e-3, 0, 1e-9, 0.0),
    ]
    temperature, top_k, top_p, min_p = (jnp.asarray(column) for column in zip(*rows, strict=True))
    logits = jnp.asarray(logits_of(rng, len(rows), vocab, 3)).at[:, 5:40].set(-jnp.inf)
    logits = logits.at[5].set(jnp.where(jnp.arange(vocab) % 60 == 7, 4.0, logits[5]))  # more equal ones than are wanted
    knobs = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "shards": WHOLE_VOCAB}
    with kernels(), tiles({"threshold": {"tokens": tokens, "step": 128}}):
        least = jax.jit(functools.partial(least_kept, temperature=temperature, **knobs))(logits)
    z = logits / temperature[:, None]
    wanted = kept_from(z, z.max(-1), top_k, top_p, min_p, WHOLE_VOCAB)
    kept = np.asarray(logits >= least[:, None])
    np.testing.assert_array_equal(kept, z >= wanted[:, None])
    assert kept[3].sum() == 1 and kept[8].sum() == 1 and kept[1].sum() == 5


@pytest.mark.slow
def test_what_is_kept_of_a_split_vocabulary(rng):
    logits = jnp.asarray(logits_of(rng, 3, 4 * 90, 3))
    knobs = {"top_k": jnp.asarray([7, 0, 40]), "top_p": jnp.asarray([1.0, 0.8, 0.6]), "min_p": jnp.asarray([0.0, 0.0, 0.01])}

    def local(part):
        along = lambda reduce: functools.partial(reduce, axis_name="v")
        place = VocabShards(offset=0, max=along(jax.lax.pmax), sum=along(jax.lax.psum), min=along(jax.lax.pmin))
        return least_kept(part, temperature=jnp.ones(3), **knobs, shards=place)

    mesh = Mesh(np.array(jax.devices()[:4]), ("v",))
    with kernels(), tiles({"threshold": SMALL}):
        run = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(None, "v"), out_specs=PartitionSpec(), check_vma=False)
        least = jax.jit(run)(logits)
    wanted = kept_from(logits, logits.max(-1), *knobs.values(), WHOLE_VOCAB)
    np.testing.assert_array_equal(logits >= least[:, None], logits >= wanted[:, None])


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
@pytest.mark.parametrize(
    ("gpu", "rows"), [("h100", 1)] + [pytest.param(gpu, rows, marks=pytest.mark.slow) for gpu in GPU_NAMES for rows in (1, 32)]
)
def test_the_search_for_what_is_kept_compiles(gpu, rows):
    """A number of launches that is fixed, where a loop would wait for the host at each of its steps."""
    row = lambda dtype: S((rows,), dtype)

    def run(logits, temperature, top_k, top_p, min_p):
        return least_kept(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, shards=WHOLE_VOCAB)

    args = (
        S((rows, SPECS["llama_3_1_8b"].size), jnp.float32),
        row(jnp.float32),
        row(jnp.int32),
        row(jnp.float32),
        row(jnp.float32),
    )
    found = compile_for(gpu, run, *args)
    own = [name.partition("__")[0] for name in found.launches if name.startswith("threshold")]
    assert own == ["threshold"] * 12 + ["threshold_of_sums"] and len(found.launches) <= 15, found.launches
    for kernel in found.kernels:
        assert kernel.spilled == 0 and kernel.registers * kernel.threads <= 65536, kernel


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
