"""Native calls that choose tokens, what a handler says of wrong arguments, and how calls are made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from native_calls import in_each_way

from pallas_kernels.cpu import library, operands, operations
from pallas_kernels.errors import BackendError
from pallas_kernels.registry import choose
from pallas_kernels.sampling import VocabShards, argmax, sample


@pytest.fixture(autouse=True)
def needs_native(native): ...


def test_argmax(rng, native):
    logits = rng.standard_normal((5, 1003)).astype(np.float32)
    logits[1, [17, 900]] = 9
    logits[2, 1002] = 9
    logits[3] = -np.inf
    for got in in_each_way(native, lambda x: argmax(x, implementation="native"), logits).values():
        np.testing.assert_array_equal(got, logits.argmax(-1))


def test_argmax_over_shards(rng):
    logits = np.round(rng.standard_normal((4, 64)), 1).astype(np.float32)  # with ties
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("v",))
    over = lambda f: lambda x: f(x, "v")

    def local(x):
        shards = VocabShards(
            offset=jax.lax.axis_index("v") * 32,
            max=over(jax.lax.pmax),
            sum=over(jax.lax.psum),
            min=over(jax.lax.pmin),
            gather=lambda x: x,
        )
        return argmax(x, shards, implementation="native")

    run = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(None, "v"), out_specs=PartitionSpec(), check_vma=False)
    np.testing.assert_array_equal(jax.jit(run)(logits), logits.argmax(-1))


# --- sample


@pytest.mark.parametrize("kind", ["smooth", "ties", "forbidden"])
def test_sample(rng, native, kind):
    """The same draws as the reference's, every row with its own knobs."""
    for vocab in (1, 17, 64, 5003):
        logits = rng.standard_normal((8, vocab)).astype(np.float32) * 3
        if kind == "ties":
            logits = np.round(logits)
        if kind == "forbidden":
            logits[rng.random(logits.shape) < 0.5] = -np.inf
        knobs = {
            "temperature": np.asarray([0, 0.5, 1, 1.7, 1, 1, 0.8, 2], np.float32),
            "top_k": np.asarray([3, 0, 1, 3, 10**6, 50, 0, 7], np.int32),
            "top_p": np.asarray([1, 0.95, 1, 0.5, 0, 0.01, 1, 0.9], np.float32),
            "min_p": np.asarray([0, 0, 0.5, 0.05, 0, 0, 1, 0.02], np.float32),
            "seeds": rng.integers(0, 2**32, 8, dtype=np.uint32),
            "steps": rng.integers(0, 1000, 8, dtype=np.int32),
        }
        want = np.asarray(sample(jnp.asarray(logits), **knobs, implementation="reference"))
        for name, got in in_each_way(native, lambda x, k: sample(x, **k, implementation="native"), logits, knobs).items():
            np.testing.assert_array_equal(got, want, err_msg=f"{name}, {vocab} tokens")


def test_a_split_vocabulary_is_drawn_from_by_xla(rng):
    facts = {"shape": (1, 4), "dtype": jnp.float32}
    assert choose("sample", None, **facts, split=False).name == "native"
    assert choose("sample", None, **facts, split=True).name == "reference"


# --- as part of JAX programs


def test_the_handler_checks_its_arguments():
    result, kind = jax.ShapeDtypeStruct((1, 3), jnp.float32), operations.NORMS[None]
    run = functools.partial(operands.call, "jaxinfer_quant_matmul", result, numbers=(0,))
    plain, floats = (0, 1, kind, 0, -1, 3), jnp.zeros((3, 4))
    for given, integers, words in (
        ([jnp.zeros((1, 5)), None, None, None, floats, None, None, None], plain, r"x must be float32 \[rows, inputs\]"),
        ([jnp.zeros((1, 4)), None, None, None, floats, None, None, jnp.zeros(4)], plain, "bias has the wrong dtype or shape"),
        ([jnp.zeros((1, 4)), None, jnp.zeros(3), None, floats, None, None, None], plain, "norm has the wrong dtype or shape"),
        ([jnp.zeros((1, 4)), jnp.zeros((1, 4)), None, None, floats, None, None, None], plain, "residual has the wrong dtype"),
        (
            [jnp.zeros((1, 64)), None, None, None, jnp.zeros((3, 64), jnp.int8), jnp.ones((3, 4))],
            (0, 1, kind, 16, -1, 3),
            "weight groups",
        ),
        ([None, None, None, None, floats], plain, "x must be float32"),
        ([jnp.zeros((1, 4)), None, None, None, None], plain, "a weight must be"),
        ([jnp.zeros((1, 4)), None, None, None, floats], (*plain, 1), "of different versions"),
        ([jnp.zeros((1, 4)), None, None, None, floats, None, None, None, jnp.zeros(4)], plain, "of different versions"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            run(given, integers=integers)

    blocks = jnp.zeros((2, 16, 32, 4), jnp.int8)
    for shape, scales, outputs, words in (
        ((2, 16, 32, 4), (2, 32), 32, "as many blocks as its outputs fill"),
        ((2, 16, 16, 8), (2, 32), 64, r"\[blocks, words, 32, 4\]"),
        ((2, 16, 32, 4), (64, 1), 64, "scales has the wrong dtype or shape"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            run(
                [jnp.zeros((1, 64)), *(None,) * 3, blocks.reshape(shape), jnp.ones(scales)],
                integers=(0, 1, kind, 0, -1, outputs),
            )


def test_options(native, monkeypatch):
    with pytest.raises(BackendError, match="not one of this CPU's"), library.options(instruction_set="mmx"):
        pass
    with pytest.raises(BackendError, match="at least 1"), library.options(threads=0):
        pass
    with library.options(threads=3, instruction_set=native.instruction_sets[-1]):
        assert library.call_integers() == (len(native.instruction_sets) - 1, 3)
    assert library.call_integers() == (0, max(1, library.cores() // len(jax.devices())))
    monkeypatch.setattr(library, "_NAMED", "plain")
    assert library.instruction_set() == "plain" and library.refusal("cpu") is None
    monkeypatch.setattr(library, "_NAMED", "mmx")
    with pytest.raises(BackendError, match="'mmx' is not one of this CPU's"):
        library.call_integers()
    assert library.read_bandwidth(size=1 << 22, rounds=1) > 1e8
