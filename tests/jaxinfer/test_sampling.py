"""The policy of requests as arrays: against transformers' processors, every row with knobs of its own, and draws against probabilities."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import secrets
import subprocess
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from sampling_cases import END_TOKENS, GOLDEN, KNOBS, VOCAB, Golden

from jaxinfer.errors import SamplingParamsError
from jaxinfer.sampling import MAX_PROCESSORS, Past, Processors, SamplingArrays, apply_processors, choose_tokens, edit_logits
from jaxinfer.sampling_params import SamplingParams
from pallas_kernels.sampling import WHOLE_VOCAB, reference
from sharding.context import ALONE, ParallelContext

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_golden_sampling.py"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.load(GOLDEN)


def arrays(golden: Golden, rows, **changes) -> tuple[jax.Array, SamplingArrays, Past, jax.Array]:
    """(logits, sampling, past, steps) of some rows, which may be repeated."""
    cases = golden.cases
    params = [SamplingParams.from_dict(cases.params[i] | changes) for i in rows]
    sampling = SamplingArrays.of(params, [50] * len(params), [END_TOKENS] * len(params), len(params))
    tokens, lengths, prompts = cases.tokens[rows], cases.lengths[rows], cases.prompt_lengths[rows]
    return cases.logits[rows], sampling, Past(tokens=tokens, lengths=lengths, edits=sampling.edits), lengths - prompts


def everything(logits, sampling: SamplingArrays, past: Past, steps):
    """The logits before the temperature, and those that are drawn from: -inf where the threshold of `sample` forbids."""
    edited = edit_logits(logits, sampling, past, steps, WHOLE_VOCAB)
    z = edited / sampling.temperature[:, None]
    least = reference.kept_from(z, jnp.max(z, -1), sampling.top_k, sampling.top_p, sampling.min_p, WHOLE_VOCAB)
    return edited, jnp.where(z < least[:, None], -jnp.inf, z)


edit = jax.jit(everything)


def check(golden: Golden) -> None:
    """All rows in one batch, in one program."""
    before, after = edit(*arrays(golden, np.arange(len(golden.cases.params))))
    for name, found, wanted in (("edited", before, golden.edited), ("expected", after, golden.expected)):
        for row, (x, y) in enumerate(zip(np.asarray(found), wanted, strict=True)):
            where = f"{name}, row {row}: {golden.cases.params[row]}"
            np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y), where)
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=where)


def test_every_row_is_that_of_transformers(golden) -> None:
    check(golden)
    # each knob that stands alone in a row does something there
    changed = (golden.expected != golden.cases.logits).any(-1)
    assert [i for i, done in enumerate(changed[: len(KNOBS)]) if not done] == [
        0,
        10,
        13,
        18,
    ]  # nothing, or too large or small to matter


@pytest.mark.oracle
def test_fresh_rows_are_those_of_transformers(tmp_path) -> None:
    for _ in range(5):
        seed = secrets.randbits(31)
        print(f"seed {seed}")
        command = [os.environ["JAXINFER_ORACLE_PYTHON"], SCRIPT, "--seed", str(seed), "--out", tmp_path / "fresh.npz"]
        subprocess.run(command, check=True)
        check(Golden.load(tmp_path / "fresh.npz"))


def test_a_row_alone_is_the_row_in_the_batch(golden) -> None:
    together = edit(*arrays(golden, np.arange(len(golden.cases.params))))
    for row in (0, 5, 8, 23, 24, 30, 39):
        for whole, alone in zip(together, edit(*arrays(golden, [row])), strict=True):
            np.testing.assert_array_equal(whole[row], alone[0])


DRAWN = [7, 19, 21, 22, 23, 24, 28, 33]  # one knob, several, and all of them


def test_draws_follow_the_probabilities_of_transformers(golden) -> None:
    """Fixed seeds: chi-squared of 4,000 draws a row, unlikely tokens as one class, below a bound that one in 10,000 exceeds."""
    draw = jax.jit(
        lambda logits, sampling, past, steps: (
            choose_tokens(logits, sampling, steps, lambda: past, ALONE, vocab=VOCAB, top=0).token
        )
    )
    rows, repeats = np.repeat(DRAWN, 125), 32
    logits, sampling, past, steps = arrays(golden, rows)
    seen = np.zeros((len(DRAWN), VOCAB))
    for i in range(repeats):
        sampling.seed[:] = np.arange(len(rows)) * repeats + i
        for group, token in zip(np.repeat(np.arange(len(DRAWN)), 125), draw(logits, sampling, past, steps), strict=True):
            seen[group, token] += 1
    for counts, row in zip(seen, DRAWN, strict=True):
        z = golden.expected[row].astype(np.float64)
        p = np.exp(z - z.max())
        expected = p / p.sum() * counts.sum()
        rare = expected < 5
        assert counts[expected == 0].sum() == 0
        a = np.array([*counts[~rare], counts[rare].sum()])
        b = np.array([*expected[~rare], max(expected[rare].sum(), 1e-9)])
        chi, free = ((a - b) ** 2 / np.maximum(b, 1)).sum(), max((~rare).sum(), 1)
        # Wilson and Hilferty's approximation of the 99.99th percentile
        assert chi < free * (1 - 2 / (9 * free) + 3.72 * np.sqrt(2 / (9 * free))) ** 3, (golden.cases.params[row], chi, free)
        assert (counts > 0).sum() > 1 or (expected > 0).sum() == 1


def test_log_probabilities_are_those_of_the_model(golden) -> None:
    """Of what was drawn after all the knobs, but before any of them."""
    logits, sampling, past, steps = arrays(golden, DRAWN, logprobs=0)
    choice = choose_tokens(logits, sampling, steps, lambda: past, ALONE, vocab=VOCAB, top=3)
    z = logits.astype(np.float64)
    want = z - np.log(np.exp(z).sum(-1, keepdims=True))
    np.testing.assert_allclose(choice.logprob, want[np.arange(len(DRAWN)), choice.token], atol=1e-5)
    np.testing.assert_array_equal(choice.top_ids, np.argsort(-z, -1)[:, :3])


def test_rows_without_knobs_ask_for_nothing(golden) -> None:
    """The edits and the history stand in one branch of a conditional, and rows that have ended do not open it."""
    logits, sampling, past, steps = arrays(golden, [0, 1, 24], temperature=0.0)
    asked = []

    def choose(live):
        def looked():
            asked.append(1)
            return past

        run = functools.partial(choose_tokens, logits, sampling, steps, looked, ALONE, vocab=VOCAB, top=0)
        return jax.jit(run)(live=live)

    assert choose(jnp.ones(3, bool)).token.tolist() == golden.edited[[0, 1, 24]].argmax(-1).tolist()
    assert choose(jnp.zeros(3, bool)).token.tolist() == logits.argmax(-1).tolist()
    assert asked  # traced, so that it can be run


# --- the user's own function


def forbid_seen(logits, tokens, length):
    """No token twice; written for the padding that is promised."""
    return logits.at[tokens].set(-jnp.inf) + 0 * length


def only_even(logits, tokens, length):
    assert logits.shape == (VOCAB,)
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, logits, -jnp.inf)


def test_processors_touch_their_rows(golden) -> None:
    processors = Processors(VOCAB)
    functions = [None, forbid_seen, only_even, forbid_seen]
    params = [SamplingParams(logits_processor=f) for f in functions]
    sampling = SamplingArrays.of(params, [9] * 4, [()] * 4, 5, processors)
    assert sampling.edits.processor.tolist() == [0, 1, 2, 1, 0] and sampling.edited.tolist() == [False, True, True, True, False]
    used = processors.used(functions)
    assert used == ((1, forbid_seen), (2, only_even)) and processors.used([only_even]) == ((2, only_even),)
    logits, tokens, lengths = golden.cases.logits[:5], golden.cases.tokens[:5], golden.cases.lengths[:5]
    got = apply_processors(logits, Past(tokens=tokens, lengths=lengths, edits=sampling.edits), used)
    want = logits.copy()
    for row in (1, 3):
        want[row, tokens[row, : lengths[row]]] = -np.inf
    want[2, 1::2] = -np.inf
    np.testing.assert_array_equal(got, want)


def test_a_split_vocabulary_changes_nothing(golden) -> None:
    """Edits where each part lies, the user's function on the whole, without the padding that makes the parts equal."""
    processors = Processors(VOCAB)
    cases = golden.cases
    rows = [0, 1, 7, 11, 22, 23, 24, 30]
    params = [SamplingParams.from_dict(cases.params[i] | {"seed": i, "temperature": float(i % 2)}) for i in rows]
    params[1] = dataclasses.replace(params[1], logits_processor=only_even)
    logits, tokens, lengths = (np.asarray(a[rows]) for a in (cases.logits, cases.tokens, cases.lengths))
    steps = lengths - cases.prompt_lengths[rows]
    sampling = SamplingArrays.of(params, [50] * len(rows), [END_TOKENS] * len(rows), len(rows), processors)
    used = processors.used([only_even])

    def choose(ctx, logits):
        past = Past(tokens=tokens, lengths=lengths, edits=sampling.edits)
        return choose_tokens(logits, sampling, steps, lambda: past, ctx, vocab=VOCAB, top=0, processors=used).token

    whole = jax.jit(functools.partial(choose, ALONE))(logits)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    parts = jax.shard_map(
        functools.partial(choose, ParallelContext(tensor=("tensor",))),
        mesh=mesh,
        in_specs=P(None, "tensor"),
        out_specs=P(),
        check_vma=False,
    )
    split = jax.jit(parts)(np.pad(logits, ((0, 0), (0, -VOCAB % 4)), constant_values=-np.inf))
    np.testing.assert_array_equal(split, whole)
    assert whole[1] % 2 == 0 and len(set(whole.tolist())) > 4


def test_processors_that_cannot_be() -> None:
    processors = Processors(VOCAB)
    with pytest.raises(SamplingParamsError, match="cannot be traced by jax"):
        processors.number(lambda logits, tokens, length: logits if length > 3 else -logits)
    for wrong in (lambda *_: 5, lambda z, *_: z[:-1], lambda z, *_: z.astype(jnp.bfloat16), lambda z, *_: (z, z)):
        with pytest.raises(SamplingParamsError, match=r"it must give float32 \[97\]"):
            processors.number(wrong)
    assert processors.number(None) == 0


def test_processors_are_remembered_while_they_are_used() -> None:
    """Any number of them, one after the other; a number never means two functions."""
    processors = Processors(VOCAB)
    often, held = functools.partial(only_even), processors.hold(functools.partial(forbid_seen))
    numbers = {held.number, processors.number(often)}
    for _ in range(3 * MAX_PROCESSORS):
        numbers.add(processors.number(functools.partial(only_even)))
        assert processors.number(often) == 2
    assert numbers == {*range(1, 3 * MAX_PROCESSORS + 3)}
    assert processors.hold(held.function) is held
    assert processors.used([None, often, held.function]) == ((1, held.function), (2, often))
    other, seen = functools.partial(only_even), weakref.WeakSet[functools.partial]()
    seen.add(other)
    first = processors.number(other)
    for _ in range(MAX_PROCESSORS):
        processors.number(functools.partial(only_even))
    assert processors.number(other) > first
    del other
    for _ in range(MAX_PROCESSORS):
        processors.number(functools.partial(only_even))
    gc.collect()
    assert not seen


def test_arrays_need_what_is_resolved() -> None:
    with pytest.raises(SamplingParamsError, match="bad_words holds 'a'; give token ids"):
        SamplingArrays.of([SamplingParams(bad_words="a")], [1], [()], 1)
    with pytest.raises(SamplingParamsError, match=r"logits_processor is .*only_even.*give `processors`"):
        SamplingArrays.of([SamplingParams(logits_processor=only_even)], [1], [()], 1)
