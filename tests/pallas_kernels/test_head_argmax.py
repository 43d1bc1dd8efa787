"""The most likely token from a sketch of the head: it is always that of all logits, and few rows are read for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from native_calls import in_each_way, jittable

from pallas_kernels import qtensor
from pallas_kernels.cpu import library, operands, operations
from pallas_kernels.errors import BackendError, ShapeError
from pallas_kernels.head_argmax import ROWS, WIDTH, head_argmax, make_sketch, sketch_refusal, sketch_shapes
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.quant_matmul.fused import Norm, fused_matmul
from pallas_kernels.quantize import quantize_weights
from pallas_kernels.sampling import VocabShards


@pytest.fixture(autouse=True)
def needs_native(native): ...


def head(rng, form, rows=700, width=96):
    """A head with few large rows among many small ones, in some form."""
    w = rng.standard_normal((rows, width)).astype(np.float32) * rng.uniform(0.1, 1, (rows, 1)).astype(np.float32)
    if form in ("float32", "bfloat16"):
        return jnp.asarray(w, form)
    group, layout, inputs = form
    q = quantize_weights(w, format="int8", group=group)
    q = q.replace(activation=None if inputs is None else ActivationQuant(group=inputs))
    return jax.tree.map(jnp.asarray, qtensor.repack(jax.tree.map(np.asarray, q), layout))


FORMS = ["float32", "bfloat16", (32, "cpu32", 32), (32, "canonical", None), (None, "cpu32", 64), (None, "canonical", None)]


def floats(w):
    return np.asarray(qtensor.dequantize(w) if isinstance(w, qtensor.QTensor) else w, np.float64)


def rms(width):
    return Norm(kind="rms", eps=1e-5, scale=jnp.ones(width))


def all_logits(x, w, norm):
    return fused_matmul(x, (w,), norm=norm, implementation="native")


def decoded(sketch, rows):
    """The weights that a sketch stands for, up to whole groups of inputs, and the two norms of each row, in float64."""
    blocks, numbers = np.asarray(sketch.blocks), np.asarray(sketch.numbers, np.float64)
    words = blocks[..., :512].reshape(*blocks.shape[:2], 4, 32, 4).astype(int)
    bits = blocks[..., 512:640].reshape(*blocks.shape[:2], 32, 4).astype(int)
    scales, zeros = (blocks[..., at : at + 32].astype(np.float64) for at in (640, 672))
    levels = np.zeros((*blocks.shape[:2], 32, 32), int)  # block, group, row, input
    for k in range(32):
        word, high, byte = k % 16 // 4, k // 16, k % 4
        nibble = words[:, :, word, :, byte] >> 4 * high & 15
        levels[..., k] = nibble + 16 * (bits[..., byte] >> (word + 4 * high) & 1)
    step = numbers[:, 0, :]
    w = step[:, None, :, None] / 8 * scales[..., None] * (8 * levels - zeros[..., None])
    w = w.transpose(0, 2, 1, 3).reshape(-1, w.shape[1] * 32)[:rows]
    return w, *(numbers[:, i].reshape(-1)[:rows] for i in (1, 2))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_sketch_says_how_far_it_is_off(rng, form):
    width = 90 if isinstance(form, str) else 96
    w = head(rng, form, rows=75, width=width)
    sketch = make_sketch(w)
    assert jax.tree.map(jnp.shape, sketch) == jax.tree.map(jnp.shape, sketch_shapes(75, width))
    exact = np.pad(floats(w), ((0, 0), (0, 96 - width)))
    stands, off, size = decoded(sketch, 75)
    norm = lambda a: np.sqrt((a**2).sum(-1))
    assert (norm(exact - stands) <= off).all() and (off <= 1.01 * norm(exact - stands) + 1e-6).all()
    assert (np.maximum(norm(exact), norm(stands)) <= size).all() and (off < 0.08 * size).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [1, ROWS])
def test_the_token_is_that_of_all_logits(rng, native, form, rows):
    width = 90 if isinstance(form, str) else 96
    w, norm = head(rng, form, width=width), rms(width)
    sketch = make_sketch(w)
    x = rng.standard_normal((rows, width)).astype(np.float32)

    def found(x, w, sketch):
        return head_argmax(x, w, norm=norm, sketch=sketch, implementation="native")

    for got in in_each_way(native, found, x, w, sketch).values():
        np.testing.assert_array_equal(got, np.asarray(all_logits(x, w, norm)).argmax(-1))
    np.testing.assert_array_equal(
        head_argmax(x, w, norm=norm, sketch=sketch, implementation="reference"), np.asarray(all_logits(x, w, norm)).argmax(-1)
    )


@pytest.mark.parametrize("form", ["float32", (32, "cpu32", 32)], ids=str)
def test_inputs_that_a_sketch_is_most_wrong_about(rng, form):
    """Along what the sketch leaves out of a row, where the bound is reached; other rows lie just below."""
    w = head(rng, form, rows=300)
    exact, sketch = floats(w), make_sketch(w)
    stands, _, _ = decoded(sketch, 300)
    none = Norm(kind=None, eps=0.0, scale=None)
    run = jittable(lambda x: operations.head_argmax_counted(x, w, norm=none, sketch=sketch, limit=300))
    for row in range(0, 300, 7):
        for sign in (1, -1):
            x = (sign * (exact - stands)[row][None]).astype(np.float32)
            ids, largest, _ = run(x)
            logits = np.asarray(fused_matmul(x, (w,), implementation="native"))
            assert ids[0] == logits.argmax() and largest[0] == logits.max()


def test_few_rows_are_read(rng):
    """One token stands out: one block of 32 rows or a few. None does: all of them."""
    w, norm = head(rng, (32, "cpu32", 32), rows=3200, width=576), rms(576)
    sketch = make_sketch(w)
    exact = floats(w).astype(np.float32)
    count = jittable(lambda x: operations.head_argmax_counted(x, w, norm=norm, sketch=sketch, limit=3200))
    likely = np.sqrt((exact**2).sum(-1)).argmax()
    ids, _, blocks = count(exact[None, likely] + 0.1 * rng.standard_normal((1, 576)).astype(np.float32))
    assert ids[0] == likely and blocks[0] <= 3
    assert count(np.zeros((1, 576), np.float32))[2][0] == 100


@pytest.mark.parametrize("place", ["first", "last", "alone"])
def test_ties_give_the_lowest_id(rng, place):
    w = np.array(head(rng, "float32", rows=200))
    x = rng.standard_normal((1, 96)).astype(np.float32)
    best = np.asarray(all_logits(x, jnp.asarray(w), rms(96))).argmax()
    others = {"first": [3, 130], "last": [150, 199], "alone": []}[place]
    w[others] = w[best]
    w = jnp.asarray(w)
    got = head_argmax(x, w, norm=rms(96), sketch=make_sketch(w), implementation="native")
    assert got[0] == min([best, *others])


def test_numbers_that_are_none(rng):
    """A row with an infinite weight wins or loses as its logit does; NaN inputs give a token all the same."""
    w = np.array(head(rng, "float32", rows=100))
    x = np.abs(rng.standard_normal((1, 96))).astype(np.float32)
    for value, wins in ((np.inf, True), (-np.inf, False), (3e38, True)):
        changed = w.copy()
        changed[70, 5] = value
        changed = jnp.asarray(changed)
        got = head_argmax(x, changed, norm=rms(96), sketch=make_sketch(changed), implementation="native")
        assert got[0] == np.asarray(all_logits(x, changed, rms(96))).argmax() and (got[0] == 70) == wins
    w = jnp.asarray(w)
    got = head_argmax(np.full((1, 96), np.nan, np.float32), w, norm=rms(96), sketch=make_sketch(w), implementation="native")
    assert 0 <= got[0] < 100


def test_over_shards_with_padding(rng):
    """The largest logit is padding on the last shard."""
    w = np.array(head(rng, "float32", rows=128))
    w[100:] *= 10
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("v",))
    over = lambda f: lambda x: f(x, "v")

    halves = [make_sketch(half) for half in (w[:64], w[64:])]
    sketch = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)

    def local(x, w, sketch):
        shards = VocabShards(offset=jax.lax.axis_index("v") * 64, max=over(jax.lax.pmax), min=over(jax.lax.pmin))
        return head_argmax(x, w, norm=rms(96), sketch=sketch, vocab=100, shards=shards, implementation="native")

    specs = PartitionSpec(), PartitionSpec("v"), PartitionSpec("v")
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False))
    for _ in range(5):
        x = rng.standard_normal((2, 96)).astype(np.float32)
        np.testing.assert_array_equal(run(x, w, sketch), np.asarray(all_logits(x, jnp.asarray(w[:100]), rms(96))).argmax(-1))


def test_refusals(rng):
    w = head(rng, "float32")
    x, sketch = np.ones((1, 96), np.float32), make_sketch(w)
    with pytest.raises(ShapeError, match=rf"B from 1 to {ROWS}, got float32\[3, 96\]"):
        head_argmax(np.ones((3, 96), np.float32), w, norm=rms(96), sketch=sketch)
    with pytest.raises(ShapeError, match=r"w must be \[V, 80\]"):
        head_argmax(x[:, :80], w, norm=rms(96), sketch=sketch)
    with pytest.raises(ShapeError, match=r"the sketch of w \[640, 96\] is .*make it with make_sketch"):
        head_argmax(x, w[:640], norm=rms(96), sketch=sketch)
    with pytest.raises(ShapeError, match="give vocab"):
        head_argmax(x, w, norm=rms(96), sketch=sketch, shards=VocabShards())
    with pytest.raises(ShapeError, match="norm 'batch'"):
        head_argmax(x, w, norm=Norm(kind="batch", eps=0.0, scale=None), sketch=sketch)
    four = quantize_weights(rng.standard_normal((64, 64)).astype(np.float32), format="int4", group=32)
    with pytest.raises(BackendError, match="5 bits a weight, and the head is int4"):
        make_sketch(four)
    assert "excludes too few tokens" in sketch_refusal(w, WIDTH + 1) and sketch_refusal(w, WIDTH) is None
    with library.options(instruction_set="plain"):
        assert "slower than all logits with plain kernels" in sketch_refusal(w, 96)


def test_the_handler_checks_its_arguments(rng):
    """Behind the checks of the operation: what a program of its own hands over."""
    w = head(rng, "float32", rows=64, width=64)
    sketch, x, limit = make_sketch(w), np.ones((1, 64), np.float32), np.int32(64)
    ids, largest = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
    integers = (*library.call_integers(), operations.NORMS[None], *operands.facts(w))
    run = functools.partial(operands.call, "jaxinfer_head_argmax", numbers=(0.0,), integers=integers)
    good = {"x": x, "norm": None, "norm bias": None, "limit": limit, "blocks": sketch.blocks, "numbers": sketch.numbers, "w": w}
    for changes, words in (
        ({"x": np.ones((3, 64), np.float32)}, "at most 2 rows"),
        ({"x": np.ones((1, 32), np.float32)}, r"x must be float32 \[rows, inputs\]"),
        ({"norm": np.ones(32, np.float32)}, "norm has the wrong dtype or shape"),
        ({"limit": np.ones(1, np.int32)}, "limit has the wrong dtype or shape"),
        ({"limit": None}, "needs a limit and a sketch"),
        ({"blocks": sketch.blocks[:1]}, "blocks has the wrong dtype or shape"),
        ({"numbers": sketch.numbers[:, :2]}, "numbers has the wrong dtype or shape"),
        ({"w": w[:32]}, "a weight must be"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=words):
            run([ids, largest, ids], list((good | changes).values()))
    assert int(run([ids, largest, ids], list(good.values()))[0][0]) == np.asarray(w).sum(-1).argmax()
