"""Changes of logits before a choice: against loops over Python lists on fresh inputs, and over a split vocabulary."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.errors import ShapeError
from pallas_kernels.sampling import VocabShards, add_bias, ban, ngram_completions, penalize, word_completions

SHARDS, B, S, V = 4, 6, 40, 60


@pytest.fixture
def past(rng):
    """Tokens of few kinds, so that they repeat; rubbish after each row's end, some of it no token."""
    tokens = rng.integers(0, 5, (B, S)).astype(np.int32) * 13 % V
    lengths = np.array([1, 2, 7, 20, S, S - 1], np.int32)
    prompts = np.array([1, 1, 0, 12, 17, S - 1], np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = rng.choice([0, 13, 26, -1, 2**31 - 1, V], S - length)
    return tokens, lengths, prompts


@functools.cache
def split(op):
    """`op` over a vocabulary cut into SHARDS parts: (logits, arrays by keyword) -> the parts, joined again. It has no collective."""
    mesh = Mesh(np.array(jax.devices()[:SHARDS]), ("tensor",))

    def body(logits, arrays):
        refused = lambda x: pytest.fail("a collective")
        offset = jax.lax.axis_index("tensor") * logits.shape[-1]
        return op(logits, **arrays, shards=VocabShards(offset=offset, max=refused, sum=refused, min=refused, gather=refused))

    specs = (PartitionSpec(None, "tensor"), PartitionSpec())
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(None, "tensor"), check_vma=False))
    return lambda logits, **arrays: run(logits, arrays)


WAYS = {"whole": lambda op: jax.jit(op), "split": split}


@pytest.fixture(params=WAYS)
def run(request):
    if request.param == "split" and jax.device_count() < SHARDS:
        pytest.skip(f"needs {SHARDS} devices")
    return WAYS[request.param]


@pytest.mark.parametrize("used", ["all", "repetition", "presence", "frequency", "none"])
def test_penalize(rng, past, run, used):
    tokens, lengths, prompts = past
    logits = (rng.standard_normal((B, V)) * 3).astype(np.float32)
    logits[:, 13] = -np.inf
    off = {"repetition": np.ones(B), "presence": np.zeros(B), "frequency": np.zeros(B)}
    on = {"repetition": [1.5, 0.7, 1, 2, 1.1, 3], "presence": [0.5, -1, 0, 2, 1, 0], "frequency": [0, 0.3, 0.4, -0.5, 2, 1]}
    knobs = {name: np.float32(on[name] if used in (name, "all") else row) for name, row in off.items()}
    want = logits.astype(np.float64)
    for i in range(B):
        for t in set(tokens[i, : lengths[i]].tolist()):
            want[i, t] = want[i, t] / knobs["repetition"][i] if want[i, t] > 0 else want[i, t] * knobs["repetition"][i]
        for t, count in collections.Counter(tokens[i, prompts[i] : lengths[i]].tolist()).items():
            want[i, t] -= knobs["presence"][i] + count * knobs["frequency"][i]
    got = run(penalize)(logits, tokens=tokens, prompt_lengths=prompts, lengths=lengths, **knobs)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


def ids_of(row):
    return set(np.asarray(row)[np.asarray(row) >= 0].tolist())


def test_ngram_completions(past):
    """Every size in every row: of none, of one token, of more tokens than there are, of as many as nobody waits for."""
    tokens, lengths, _ = past
    ask = jax.jit(ngram_completions)
    found = 0
    for sizes in ([1, 2, 3, 4, 5, 6], [2, 2, 2, 2, 2, 2], [0, 3, 0, 3, 3, 2], [1, 3, 8, 20, 40, 2**31 - 1], [0] * B):
        got = ask(tokens, lengths=lengths, sizes=np.array(sizes, np.int32))
        for row, said, length, n in zip(got, tokens, lengths, sizes, strict=True):
            said = said[:length].tolist()
            seen = {tuple(said[i : i + n]) for i in range(length - n + 1)} if n else set()
            want = {gram[-1] for gram in seen if gram[:-1] == tuple(said[length - n + 1 :])}
            assert ids_of(row) == want
            found += len(want)
    assert found > 3


def test_word_completions(rng, past):
    tokens, lengths, _ = past
    W, L = 30, 4
    words = np.full((B, W, L), -1, np.int32)
    wanted = []
    for i in range(B):
        said, want = tokens[i, : lengths[i]].tolist(), set()
        for w in range(W - 1):  # the last one stays empty
            size = rng.integers(1, L + 1)
            word = rng.integers(0, 5, size) * 13 % V
            words[i, w, L - size :] = word
            if size - 1 <= len(said) and word[:-1].tolist() == said[len(said) - size + 1 :]:
                want.add(int(word[-1]))
        wanted.append(want)
    got = jax.jit(word_completions)(tokens, lengths=lengths, words=words)
    assert [ids_of(row) for row in got] == wanted
    assert len(set(map(frozenset, wanted))) > 1
    single = jax.jit(word_completions)(tokens, lengths=lengths, words=words[..., -1:])
    assert [ids_of(row) for row in single] == [ids_of(row) for row in words[..., -1]]


def test_ban_and_bias(rng, run):
    logits = rng.standard_normal((B, V)).astype(np.float32)
    ids = np.stack([rng.permutation(V)[:9] for _ in range(B)]).astype(np.int32)
    ids[:, 3:5] = -1
    ids[0] = -1
    bias = rng.standard_normal(ids.shape).astype(np.float32)
    banned, biased = logits.copy(), logits.copy()
    for i, row in enumerate(ids):
        for t, b in zip(row, bias[i], strict=True):
            if t >= 0:
                banned[i, t], biased[i, t] = -np.inf, biased[i, t] + b
    np.testing.assert_array_equal(run(ban)(logits, ids=ids), banned)
    np.testing.assert_array_equal(run(add_bias)(logits, ids=ids, bias=bias), biased)
    assert run(ban)(banned, ids=ids).dtype == jnp.float32


def test_wrong_arguments_are_refused():
    logits, ids, row = jnp.zeros((2, 8)), jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    knobs = {name: jnp.ones(2) for name in ("repetition", "presence", "frequency")}
    with pytest.raises(ShapeError, match=r"presence must be floating \[2\].*int32"):
        penalize(logits, ids, prompt_lengths=row, lengths=row, **{**knobs, "presence": row})
    with pytest.raises(ShapeError, match=r"tokens \[B, S\] must be int32 with B = 2, got int32\[3, 3\]"):
        penalize(logits, jnp.zeros((3, 3), jnp.int32), prompt_lengths=row, lengths=row, **knobs)
    with pytest.raises(ShapeError, match=r"tokens \[B, S\].*float32"):
        ngram_completions(logits, lengths=row, sizes=row)
    with pytest.raises(ShapeError, match=r"sizes \[B\].*int32\[2, 3\]"):
        ngram_completions(ids, lengths=row, sizes=ids)
    with pytest.raises(ShapeError, match=r"words \[B, W, L\]"):
        word_completions(ids, lengths=row, words=ids)
    with pytest.raises(ShapeError, match=r"ids \[B, n\]"):
        ban(logits, row)
    with pytest.raises(ShapeError, match=r"bias must be float \[2, 3\], one per id, got int32\[2, 3\]"):
        add_bias(logits, ids, ids)
