"""One answer on every mesh: tensor parallel where heads, groups and vocabulary do not divide, pipelines of unequal stages, both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from agreement import LEVELS, assert_same_texts, with_runner_up
from tiny_llama import GREEDY, NEW, PROMPTS, SAMPLED, TinyModel, tokens_of

import jaxinfer
from jaxinfer import EngineConfig, SamplingParams, errors
from jaxinfer.engine import Engine
from sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("rough_programs")

QUICK = [(3, 1), (2, 2)]
MANY = [(2, 1), (1, 2), (4, 1), (8, 1), (1, 3), (3, 2), (2, 3), (4, 2)]
MESHES = [*QUICK, *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in MANY)]


@pytest.mark.parametrize(("tp", "pp"), MESHES)
def test_generate(make_engine, greedy, sampled, tp: int, pp: int) -> None:
    """Greedy and sampled requests side by side, more than there are slots."""
    engine = make_engine(tp=tp, pp=pp, micro_batch_size=2)
    prompts = [PROMPTS[i] for i in (1, 0, 2, 3, 6, 2, 5, 0)]
    params = [GREEDY, SAMPLED[0], SAMPLED[2], GREEDY, SAMPLED[6], GREEDY, SAMPLED[5], GREEDY]
    expected = [greedy[1], sampled[0], sampled[2], greedy[3], sampled[6], greedy[2], sampled[5], greedy[0]]
    assert tokens_of(engine.generate(prompts, params)) == expected


@pytest.mark.parametrize(
    ("data", "tp", "pp"), [(2, 1, 1), *(pytest.param(*s, marks=pytest.mark.slow) for s in [(2, 2, 1), (2, 2, 2), (3, 1, 2)])]
)
def test_data_shards(tiny_decoder, greedy, sampled, data: int, tp: int, pp: int) -> None:
    """Sequences spread over data shards, more than there are slots, and prompts that are scored."""
    config = EngineConfig(inference_max_tokens=64, micro_batch_size=2)
    engine = Engine(jaxinfer.place(tiny_decoder, make_mesh(data=data, tensor=tp, stage=pp)), config)
    order = [1, 0, 2, 3, 6, 2, 5, 0, 4, 4, 6, 3, 1]
    assert tokens_of(engine.generate([PROMPTS[i] for i in order], [SAMPLED[i] for i in order])) == [sampled[i] for i in order]
    assert tokens_of(engine.generate([PROMPTS[i] for i in order[:5]], GREEDY)) == [greedy[i] for i in order[:5]]
    assert [token for delta in engine.stream(PROMPTS[1], GREEDY) for token in delta.token_ids] == greedy[1]
    params = SamplingParams(max_tokens=NEW, logprobs=0)
    for result, score in zip(engine.generate(PROMPTS, params), engine.score(PROMPTS), strict=True):
        assert result.token_ids[0] in range(97) and score.token_ids == result.prompt_token_ids
        again = engine.score(result.prompt_token_ids + result.token_ids).logprobs[len(score.token_ids) :]
        assert again == pytest.approx([token.logprob for token in result.logprobs], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 1), (4, 1), (4, 2)])
def test_tokens_split_between_half_layers(make_engine, greedy, sampled, tp: int, pp: int) -> None:
    """Generation, and scores of rows whose lengths no number of shards divides."""
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "sequence_parallel": True}
    engine = make_engine(engine=sizes)
    assert engine.plan.context.split_tokens
    prompts = [PROMPTS[i] for i in (1, 0, 2, 6)]
    expected = [greedy[1], sampled[0], greedy[2], sampled[6]]
    assert tokens_of(engine.generate(prompts, [GREEDY, SAMPLED[0], GREEDY, SAMPLED[6]])) == expected
    for one, other in zip(make_engine().score(prompts), engine.score(prompts), strict=True):
        assert other.logprobs[1:] == pytest.approx(one.logprobs[1:], abs=1e-4)
        assert other.greedy_token_ids == one.greedy_token_ids


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "chunk"), [(1, 1, 5), (1, 2, 1), (1, 2, 5), (2, 2, 3)])
def test_prompts_in_chunks(make_engine, greedy, tp: int, pp: int, chunk: int) -> None:
    """The same text and scores; chunks that divide no prompt, one of a token, and one row alone in the pipe."""
    engine = make_engine(tp=tp, pp=pp, micro_batch_size=2, prefill_chunk=chunk)
    assert engine.programs.prefill_chunk == chunk
    assert tokens_of(engine.generate([PROMPTS[i] for i in (1, 2, 5)], GREEDY)) == [greedy[i] for i in (1, 2, 5)]
    assert engine.generate(PROMPTS[2], GREEDY).token_ids == greedy[2]
    whole, found = make_engine().score(PROMPTS[2]), engine.score(PROMPTS[2])
    assert found.logprobs[1:] == pytest.approx(whole.logprobs[1:], abs=1e-4)
    assert found.greedy_token_ids == whole.greedy_token_ids


@pytest.mark.full
@pytest.mark.parametrize(("cache", "tp", "pp"), [("int8", 1, 2), ("bfloat16", 2, 1), ("int4", 1, 1)])
def test_prompts_in_chunks_over_small_caches(make_engine, cache: str, tp: int, pp: int) -> None:
    keys = {"tp": tp, "pp": pp, "kernels": "xla", "kv_cache": {"dtype": cache}}
    whole, chunked = make_engine(**keys), make_engine(**keys, prefill_chunk=4)
    assert tokens_of(chunked.generate(PROMPTS[:3], GREEDY)) == tokens_of(whole.generate(PROMPTS[:3], GREEDY))


def test_tokens_are_split_over_tensor_shards(tiny_decoder) -> None:
    config = EngineConfig(engine=jaxinfer.ParallelConfig(sequence_parallel=True), inference_max_tokens=64)
    with pytest.raises(errors.MeshError, match="splits tokens over tensor shards, and there is one"):
        Engine(jaxinfer.place(tiny_decoder, make_mesh(stage=2)), config)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [*QUICK, *MANY])
def test_alone_and_streamed(make_engine, greedy, sampled, tp: int, pp: int) -> None:
    engine = make_engine(tp=tp, pp=pp, micro_batch_size=2)
    for i in (1, 2):
        assert engine.generate(PROMPTS[i], SAMPLED[i]).token_ids == sampled[i]
        for every in (1, 7):
            heard = [token for delta in engine.stream(PROMPTS[i], GREEDY, every=every) for token in delta.token_ids]
            assert heard == greedy[i]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (3, 1), (8, 1), (1, 3)])
def test_probabilities(make_engine, tp: int, pp: int) -> None:
    """Log-probabilities of chosen tokens, of alternatives and of prompts, over all parts of the vocabulary."""
    alone, spread = make_engine(), make_engine(tp=tp, pp=pp, micro_batch_size=2)
    params = SamplingParams(max_tokens=NEW, logprobs=5)
    for one, other in zip(alone.generate(PROMPTS[:3], params), spread.generate(PROMPTS[:3], params), strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        for expected, found in zip(one.logprobs, other.logprobs, strict=True):
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert list(found.top) == list(expected.top)
            assert list(found.top.values()) == pytest.approx(list(expected.top.values()), abs=1e-4)
    for expected, found in zip(alone.score(PROMPTS), spread.score(PROMPTS), strict=True):
        assert found.logprobs[1:] == pytest.approx(expected.logprobs[1:], abs=1e-4)
        assert found.greedy_token_ids == expected.greedy_token_ids


@pytest.fixture(scope="session")
def wide(tiny_model) -> Callable[[int], TinyModel]:
    """wide(layers): inputs that groups of 32 and 64 divide; heads of 32, so that a group of 64 holds two."""
    changes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 6, "head_dim": 32}
    return lambda layers: tiny_model(num_hidden_layers=layers, **changes)


QUANTIZED = [
    ("w8a8", 2, 1),
    *(
        pytest.param(spec, tp, pp, marks=pytest.mark.slow)
        for spec, tp, pp in [
            ("w8a8", 3, 1),
            ("w8a8-token", 2, 1),
            ("w8a8-token", 3, 2),
            ("w4a16-g32", 2, 1),
            ("w4a16-g32", 3, 2),
            ("w4a16-g64-asym", 2, 2),
            ("w4a16-g64-asym", 3, 1),
            ("w4a8-g64", 4, 1),
            ("w8a16", 8, 1),
            ("w8a8-attn8", 2, 2),
        ]
    ),
]


@pytest.mark.parametrize(("spec", "tp", "pp"), QUANTIZED)
def test_quantised(make_engine, wide, spec: str, tp: int, pp: int) -> None:
    """The logical weight is quantised, so that every mesh holds the same levels."""
    keys: dict[str, Any] = {"model": wide(pp), "quantization": spec, "micro_batch_size": 2}
    if (
        "attn8" in spec
    ):  # many levels on the way: in XLA, where how many rows a call has does not decide how its inputs are rounded
        keys["kernels"] = "xla"
    alone, spread = make_engine(**keys), make_engine(tp=tp, pp=pp, **keys)
    expected = alone.generate(PROMPTS[1:3], with_runner_up(GREEDY))
    assert_same_texts(spread.generate(PROMPTS[1:3], GREEDY), expected, LEVELS)


def test_quantised_probabilities(make_engine, wide) -> None:
    """A group of 64 holds two heads; where it is cut, its scale and minimum are repeated."""
    keys = {"model": wide(1), "quantization": "w4a16-g64-asym"}
    expected, found = make_engine(**keys).score(PROMPTS[2]), make_engine(tp=2, **keys).score(PROMPTS[2])
    assert found.logprobs[1:] == pytest.approx(expected.logprobs[1:], abs=1e-4)
    assert found.greedy_token_ids == expected.greedy_token_ids


def test_quantised_weights_stay_packed(wide) -> None:
    """What is kept is the levels and scales, in the module as in the engine."""
    folder = wide(1).folder
    small = {"inference_max_tokens": 16, "micro_batch_size": 1, "head_sketch": False}
    size = lambda weights: sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    whole = size(jaxinfer.load_model(folder).weights())
    for spec, least, most in (("w8a8", 0.25, 0.28), ("w4a16-g32", 0.125, 0.2), ("w4a16-g64-asym", 0.125, 0.2)):
        engine = jaxinfer.init_inference(folder, small | {"quantization": spec})
        model = jaxinfer.load_model(folder, quantization=spec)
        assert least < size(engine.params) / whole < most
        # blocks of native kernels are whole; XLA has nothing to fill up
        assert size(model.weights()) <= size(engine.params) < 1.1 * size(model.weights())
        plain = jaxinfer.init_inference(folder, small | {"quantization": spec, "kernels": "xla"})
        assert size(model.weights()) == size(plain.params)
        again = jaxinfer.init_inference(model, small)
        jax.tree.map(np.testing.assert_array_equal, again.params, engine.params)
