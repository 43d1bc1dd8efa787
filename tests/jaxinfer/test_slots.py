"""The engine's four calls by hand: sequences that enter, go on, leave early and take each other's slots."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest
from kernel_checks import kernels
from tiny_llama import GREEDY, NEW, PROMPTS, padded, tokens_of

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.sampling import SamplingArrays
from pallas_kernels.registry import observing


def arrays(params: list[SamplingParams]) -> SamplingArrays:
    return SamplingArrays.of(params, [p.max_tokens or 1 for p in params], [p.stop_token_ids for p in params], len(params))


def read(engine: jaxinfer.Engine, i: int):
    """A prefix of prompt i alone."""
    return engine.prefill(engine.params, *padded([PROMPTS[i]]), arrays([GREEDY]))


class Slots:
    """What each slot has said so far, kept by hand."""

    def __init__(self, engine: jaxinfer.Engine, batch: int):
        self.engine, self.batch, self.state = engine, batch, engine.init_state(batch)
        self.said: dict[int, list[int]] = {}

    def insert(self, slot: int, i: int) -> None:
        prefix = read(self.engine, i)
        self.state = self.engine.insert(prefix, self.state, np.array([slot], np.int32))
        self.said[slot] = prefix.first.token.tolist()

    def decode(self, steps: int) -> None:
        self.state, emitted = self.engine.decode(self.engine.params, self.state, steps)
        counts, tokens = np.asarray(emitted.counts), np.asarray(emitted.choices.token)
        for slot in range(counts.size):
            m, b = divmod(slot, self.batch)
            new = tokens[m, b, : counts[m, b]].tolist()
            assert slot in self.said or not new
            self.said.setdefault(slot, []).extend(new)
        self.done = np.asarray(emitted.done).reshape(-1)

    def free(self, slot: int) -> list[int]:
        self.state = self.engine.free(self.state, slot)
        return self.said.pop(slot)


def by_hand(engine: jaxinfer.Engine, greedy: list[list[int]], slots: list[int], batch: int) -> None:
    """Sequences come and go at odd moments; each says what it says alone."""
    a, b, c = slots
    hand = Slots(engine, batch)
    hand.decode(3)  # nothing is there
    hand.insert(b, 1)
    hand.decode(1)
    hand.insert(a, 2)
    hand.decode(3)
    said = hand.free(b)  # in the middle of its way through the stages
    assert 1 < len(said) < NEW and said == greedy[1][: len(said)]
    hand.insert(b, 3)  # another one takes its place at once
    hand.insert(c, 6)
    hand.decode(2)
    said = hand.free(a)
    assert said == greedy[2][: len(said)]
    hand.decode(1)
    hand.insert(a, 0)
    for _ in range(4 * NEW):
        hand.decode(1)
    assert hand.done.all()
    assert (hand.said[a], hand.said[b], hand.said[c]) == (greedy[0], greedy[3], greedy[6])
    for slot in slots:
        hand.free(slot)  # of one that has ended: nothing
    hand.insert(b, 5)
    hand.decode(NEW)
    hand.decode(NEW)
    assert hand.said[b] == greedy[5]


def test_slots_by_hand(engine, greedy) -> None:
    by_hand(engine, greedy, [3, 0, 2], 4)


def test_insert_leaves_rows_out(engine, greedy) -> None:
    params = [GREEDY] * 4
    prefix = engine.prefill(engine.params, *padded(PROMPTS[:4]), arrays(params))
    state = engine.insert(prefix, engine.init_state(4), np.array([2, -1, -1, 1], np.int32))
    _, emitted = engine.decode(engine.params, state, NEW)
    assert np.asarray(emitted.counts).tolist() == [[0, NEW - 1, NEW - 1, 0]]
    tokens = np.asarray(emitted.choices.token)[0]
    assert (tokens[2, : NEW - 1].tolist(), tokens[1, : NEW - 1].tolist()) == (greedy[0][1:], greedy[3][1:])


def test_state_is_donated(engine) -> None:
    state = engine.init_state(1)
    prefix = read(engine, 1)
    inserted = engine.insert(prefix, state, np.zeros((1,), np.int32))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.caches))
    decoded, _ = engine.decode(engine.params, inserted, 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(inserted.caches))
    freed = engine.free(decoded, 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(decoded.caches))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((freed, prefix, engine.params)))


def test_an_engine_keeps_one_state(engine, greedy) -> None:
    """Work of the same size goes on in the arrays of the last one."""
    engine.generate(PROMPTS[1], GREEDY)
    where = lambda: [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._slots.state.caches)]
    before = where()
    assert engine.generate(PROMPTS[1], GREEDY).token_ids == greedy[1]
    assert where() == before


def test_slots_by_hand_in_a_pipeline(make_engine, greedy) -> None:
    """Two stages of unequal length; the first slots of both micro-batches, and the second of one."""
    by_hand(make_engine(pp=2), greedy, [0, 2, 3], 2)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 3), (2, 2), (3, 1)])
def test_slots_by_hand_on_meshes(make_engine, greedy, tp: int, pp: int) -> None:
    by_hand(make_engine(tp=tp, pp=pp), greedy, [3 * pp - 1, 0, 1], 3)


class Chosen:
    """The implementations that are traced."""

    def __init__(self):
        self.names: set[tuple[str, str]] = set()

    @contextlib.contextmanager
    def call(self, implementation, args, kwargs):
        self.names.add((implementation.op, implementation.name))
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "keys", "pp"),
    [
        pytest.param({}, {}, 1, id="grouped heads"),
        pytest.param({"num_key_value_heads": 9}, {}, 2, id="a kv head for each head, two stages"),
        pytest.param({"num_key_value_heads": 1}, {"kv_cache": {"dtype": "int8"}}, 1, id="one kv head, int8 cache"),
        pytest.param(
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
            {"prefill_chunk": 8},
            1,
            id="windows, prompts in chunks",
        ),
    ],
)
def test_slots_by_hand_with_kernels_of_gpus(make_engine, tiny_model, changes, keys, pp: int) -> None:
    """They are interpreted; what each sequence says is what it says through XLA."""
    model = tiny_model(**changes)
    said = tokens_of([make_engine(model=model, kernels="xla", **keys).generate(prompt, GREEDY) for prompt in PROMPTS])
    chosen = Chosen()
    with kernels(), observing(chosen):
        by_hand(make_engine(model=model, pp=pp, **keys), said, [0, 2, 3], 2 if pp > 1 else 4)
    assert {("attention_block", "pallas"), ("attention", "pallas"), ("argmax", "pallas")} <= chosen.names
