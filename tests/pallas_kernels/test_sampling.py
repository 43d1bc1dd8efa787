"""Choice of tokens: kept sets against a sorting oracle, draws against probabilities, a split vocabulary against a whole one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.errors import ShapeError
from pallas_kernels.sampling import VocabShards, argmax, log_probs, reference, sample, top_log_probs
from pallas_kernels.sampling.random import gumbel, threefry
from pallas_kernels.sampling.shards import WHOLE_VOCAB
from pallas_kernels.sampling.specs import SPECS

SHARDS = 4


def knobs(rows, **given):
    """Arguments of `sample` with every step switched off but those given."""
    base = {
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "seeds": np.zeros(rows, np.uint32),
        "steps": np.zeros(rows, np.int32),
    }
    return {name: jnp.asarray(np.broadcast_to(np.asarray(given.get(name, old), old.dtype), rows)) for name, old in base.items()}


draw = jax.jit(sample)


@functools.cache
def split(op, **static):
    """`op` over a vocabulary cut into SHARDS parts: (logits, keyword arrays) -> the result of every shard, [SHARDS, ...]."""
    mesh = Mesh(np.array(jax.devices()[:SHARDS]), ("tensor",))

    def body(logits, arrays):
        shards = VocabShards(
            offset=jax.lax.axis_index("tensor") * logits.shape[-1],
            max=lambda x: jax.lax.pmax(x, "tensor"),
            sum=lambda x: jax.lax.psum(x, "tensor"),
            min=lambda x: jax.lax.pmin(x, "tensor"),
            gather=lambda x: jax.lax.all_gather(x, "tensor", axis=1, tiled=True),
        )
        return jax.tree.map(lambda y: y[None], op(logits, **arrays, **static, shards=shards))

    specs = (PartitionSpec(None, "tensor"), PartitionSpec())
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("tensor"), check_vma=False))


needs_devices = pytest.mark.skipif(jax.device_count() < SHARDS, reason="needs 4 devices")


def every_shard(results, want):
    """Each shard gives the same, and it is `want`."""
    for one in np.asarray(results):
        np.testing.assert_array_equal(one, want)


def make_logits(rng, rows, spec, scale=3.0):
    logits = (rng.standard_normal((rows, spec.size)) * scale).astype(np.float32)
    if spec.padding:
        logits[:, -spec.padding :] = -np.inf
    return logits


def kept_by_sorting(row, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Ids that may be drawn, in float64 and by sorting."""
    z = row.astype(np.float64) / np.float64(np.float32(temperature))
    keep = z > -np.inf
    if top_k:
        keep &= z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
    p = np.where(keep, np.exp(z - z.max()), 0)
    p /= p.sum()
    if top_p < 1:
        above = np.array([p[z > z_i].sum() for z_i in z])
        keep &= (above < np.float64(np.float32(top_p))) | (z == z.max())
    return set(np.flatnonzero(keep & (p >= np.float64(np.float32(min_p)) * p.max())))


def kept(logits, shards=WHOLE_VOCAB, *, temperature, top_k, top_p, min_p):
    """The same through the threshold that `sample` uses."""
    z = logits / temperature[:, None]
    least = reference.kept_from(z, shards.max(jnp.max(z, -1)), top_k, top_p, min_p, shards)
    return (z >= least[:, None]) & (z > -jnp.inf)


SETTINGS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 256},
    {"top_k": 10_000},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.99},  # nearer to 1 the sums of float32 decide
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
    {"top_k": 200, "top_p": 0.99, "temperature": 0.3},
    {},
]


def as_rows(settings):
    rows = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return {
        name: jnp.asarray([s.get(name, off) for s in settings], jnp.int32 if name == "top_k" else jnp.float32)
        for name, off in rows.items()
    }


def test_kept_tokens_are_those_of_a_sort(rng):
    """Every setting in one batch, so that rows with steps on and off stand beside each other."""
    for scale in (0.1, 3.0, 30.0):
        logits = make_logits(rng, len(SETTINGS), SPECS["odd.257"], scale)
        got = jax.jit(kept)(jnp.asarray(logits), **as_rows(SETTINGS))
        for row, mask, setting in zip(logits, np.asarray(got), SETTINGS, strict=True):
            assert set(np.flatnonzero(mask)) == kept_by_sorting(row, **setting), setting


def test_ties_are_kept_together(rng):
    logits = rng.integers(-3, 3, (len(SETTINGS), 257)).astype(np.float32)
    got = jax.jit(kept)(jnp.asarray(logits), **as_rows(SETTINGS))
    for row, mask, setting in zip(logits, np.asarray(got), SETTINGS, strict=True):
        assert set(np.flatnonzero(mask)) == kept_by_sorting(row, **setting), setting


@pytest.mark.parametrize("value", [0.0, -0.0, 5.0, -1e-40, 1e30])
def test_a_row_of_one_value_keeps_every_token(value):
    logits = jnp.full((len(SETTINGS), 64), value, jnp.float32)
    assert jax.jit(kept)(logits, **as_rows(SETTINGS)).all()


def test_argmax_is_the_lowest_id_of_the_largest(rng):
    logits = rng.integers(-5, 5, (6, 300)).astype(np.float32)
    logits[0] = -np.inf
    logits[1, 17:] = np.nan
    got = argmax(jnp.asarray(logits))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got[2:], logits[2:].argmax(-1))
    # nothing to choose from: still an id of the vocabulary
    assert (np.asarray(got[:2]) < 300).all() and (np.asarray(got[:2]) >= 0).all()
    bf16 = jnp.asarray(rng.standard_normal((3, 300)), jnp.bfloat16)
    np.testing.assert_array_equal(argmax(bf16), np.asarray(bf16, np.float32).argmax(-1))


def test_temperature_zero_is_greedy_row_by_row(rng):
    logits = jnp.asarray(make_logits(rng, 6, SPECS["odd.257"]))
    hot = np.array([0, 1, 0, 5, 0, 0], np.float32)
    got = draw(logits, **knobs(6, temperature=hot, top_k=0, top_p=0.99, seeds=np.arange(6)))
    np.testing.assert_array_equal(np.asarray(got)[hot == 0], np.asarray(argmax(logits))[hot == 0])


def test_knobs_of_greedy_rows_are_ignored(rng):
    logits = jnp.asarray(make_logits(rng, 3, SPECS["odd.257"]))
    got = draw(logits, **knobs(3, temperature=[0, 0, 1], top_k=[5, 0, 1], top_p=[0.0, 0.1, 1.0], min_p=[1.0, 0, 0]))
    np.testing.assert_array_equal(got, argmax(logits))


def test_padding_is_never_drawn(rng):
    spec = SPECS["odd.257"]
    logits = np.full((400, spec.size), -1e4, np.float32)
    logits[:, -spec.padding :] = -np.inf
    got = draw(
        jnp.asarray(logits),
        **knobs(400, temperature=100, top_k=[0, 300] * 200, top_p=[1, 1, 0.9, 1] * 100, seeds=np.arange(400)),
    )
    assert (np.asarray(got) < spec.size - spec.padding).all()
    assert draw(jnp.zeros((1, 1)), **knobs(1, top_k=3, top_p=0.5))[0] == 0


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_probabilities(setting):
    """A fixed seed: chi-squared over 20,000 draws of 12 tokens, below its 99.99th percentile with 11 degrees of freedom."""
    row = np.random.default_rng(3).standard_normal(12).astype(np.float32)
    count = 20_000
    rows = knobs(count, **setting, seeds=np.arange(count) // 100, steps=np.arange(count) % 100)
    tokens = np.asarray(draw(jnp.broadcast_to(row, (count, 12)), **rows))
    ids = sorted(kept_by_sorting(row, **setting))
    p = np.exp(row.astype(np.float64)[ids] / setting.get("temperature", 1))
    p /= p.sum()
    seen = np.bincount(tokens, minlength=12)
    assert seen.sum() == seen[ids].sum() == count
    assert ((seen[ids] - count * p) ** 2 / (count * p)).sum() < 37.4


def test_draws_of_a_batch_are_those_of_its_rows_alone(rng):
    logits = jnp.asarray(make_logits(rng, 5, SPECS["odd.257"]))
    rows = knobs(
        5,
        temperature=[0.5, 1, 2, 0, 1],
        top_k=[0, 9, 0, 0, 50],
        top_p=[1, 1, 0.9, 1, 0.5],
        seeds=[1, 2, 3, 4, 5],
        steps=[0, 7, 7, 7, 9],
    )
    together = draw(logits, **rows)
    for i in range(5):
        assert draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in rows.items()})[0] == together[i]


def test_seed_and_step_change_the_draw():
    logits = jnp.zeros((64, 1000))
    for changed in ("seeds", "steps"):
        tokens = np.asarray(draw(logits, **knobs(64, **{changed: np.arange(64)})))
        assert len(set(tokens)) > 50
    assert len(set(np.asarray(draw(logits, **knobs(64))))) == 1


def test_threefry_is_that_of_its_authors():
    """Known answers of the Random123 distribution, threefry 2x32 with 20 rounds."""
    known = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, want in known:
        got = threefry(*(tuple(jnp.uint32(v) for v in pair) for pair in (key, counter)))
        assert tuple(int(v) for v in got) == want


def test_gumbel_noise():
    noise = np.asarray(gumbel(jnp.arange(40, dtype=jnp.uint32), jnp.zeros(40, jnp.int32), jnp.arange(5000)), np.float64)
    assert np.isfinite(noise).all()
    # mean and deviation of 200,000 draws: Euler's constant and pi / sqrt(6), within five standard errors
    assert abs(noise.mean() - 0.57722) < 5 * 1.2825 / np.sqrt(noise.size)
    assert abs(noise.std() - np.pi / np.sqrt(6)) < 0.02


@needs_devices
def test_a_split_vocabulary_changes_nothing(rng):
    spec = SPECS["odd.257"]
    logits = make_logits(rng, len(SETTINGS), spec)
    logits = np.pad(logits, ((0, 0), (0, -spec.size % SHARDS)), constant_values=-np.inf)
    logits[0, [3, 100, 200]] = 50  # a tie over shards
    rows = {**knobs(len(SETTINGS), seeds=np.arange(len(SETTINGS)), steps=5), **as_rows(SETTINGS)}
    rows["temperature"] = rows["temperature"].at[0].set(0)
    tokens = rng.integers(0, spec.size - spec.padding, len(SETTINGS)).astype(np.int32)

    every_shard(split(argmax)(logits, {}), argmax(jnp.asarray(logits)))
    assert argmax(jnp.asarray(logits))[0] == 3
    every_shard(split(sample)(logits, rows), draw(jnp.asarray(logits), **rows))

    whole = log_probs(jnp.asarray(logits), jnp.asarray(tokens))
    for one in np.asarray(split(log_probs)(logits, {"tokens": tokens})):
        np.testing.assert_allclose(one, whole, rtol=1e-6, atol=1e-5)  # sums over the vocabulary in another order
    values, ids = top_log_probs(jnp.asarray(logits), 70)  # more than one shard has
    split_values, split_ids = split(top_log_probs, n=70)(logits, {})
    every_shard(split_ids, ids)
    for one in np.asarray(split_values):
        np.testing.assert_allclose(one, values, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["smollm2_135m", "odd.257", "odd.1"])
def test_log_probs(rng, name):
    spec = SPECS[name]
    logits = make_logits(rng, 4, spec) + 1000  # far from 0: the largest must be taken out
    tokens = rng.integers(0, spec.size - spec.padding, 4).astype(np.int32)
    z = logits.astype(np.float64)
    want = z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
    got = jax.jit(log_probs)(jnp.asarray(logits), jnp.asarray(tokens))
    # logits near 1000 have a spacing of 6e-5
    np.testing.assert_allclose(got, want[np.arange(4), tokens], atol=2e-4)
    n = min(20, spec.size)
    values, ids = jax.jit(top_log_probs, static_argnums=1)(jnp.asarray(logits), n)
    np.testing.assert_array_equal(ids, np.argsort(-z, -1, kind="stable")[:, :n])
    np.testing.assert_allclose(values, np.take_along_axis(want, np.asarray(ids), -1), atol=2e-4)


def test_log_probs_of_padding_and_ties():
    logits = jnp.asarray([[1.0, 1.0, -jnp.inf, 1.0]])
    assert log_probs(logits, jnp.asarray([2], jnp.int32))[0] == -jnp.inf
    values, ids = top_log_probs(logits, 3)
    np.testing.assert_array_equal(ids, [[0, 1, 3]])
    np.testing.assert_allclose(values, np.full((1, 3), -np.log(3)), rtol=1e-6)


def test_greedy_batches_run_no_random_numbers(rng):
    """The draw stands in one branch of a conditional, not beside it."""
    run = jax.jit(functools.partial(sample, implementation="reference"))
    text = run.lower(jnp.zeros((2, 64)), **knobs(2)).as_text()
    main = text.split("stablehlo.case")[0] if "stablehlo.case" in text else text.split("stablehlo.if")[0]
    assert "shift_left" not in main and "shift_left" in text


def test_wrong_arguments_are_refused():
    logits = jnp.zeros((2, 8))
    with pytest.raises(ShapeError, match=r"\[B, V\]"):
        argmax(jnp.zeros(8))
    with pytest.raises(ShapeError, match=r"top_k must be signedinteger \[2\].*got float32"):
        sample(logits, **{**knobs(2), "top_k": jnp.zeros(2)})
    with pytest.raises(ShapeError, match=r"seeds must be unsignedinteger \[2\].*\[3\]"):
        sample(logits, **{**knobs(2), "seeds": jnp.zeros(3, jnp.uint32)})
    with pytest.raises(ShapeError, match="tokens"):
        log_probs(logits, jnp.zeros(3, jnp.int32))
    for n in (0, 9):
        with pytest.raises(ShapeError, match="n must be from 1 to the 8 entries"):
            top_log_probs(logits, n)
