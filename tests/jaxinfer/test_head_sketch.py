"""Greedy decoding by way of a sketch of the head: nothing but the time of a step may show whether an engine has one."""

import contextlib

import jax
import numpy as np
import pytest
from flax import nnx
from small_families import FAMILIES

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.layout import make_plan
from jaxinfer.memory import weight_bytes
from jaxinfer.placement import module_tensors, place, placed_shapes
from pallas_kernels import registry
from pallas_kernels.head_argmax import sketch_refusal
from sharding.mesh import make_mesh

PROMPT = [5, 17, 3, 88, 4]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(autouse=True)
def needs_a_sketch():
    if reason := sketch_refusal(np.empty((97, 72), np.float32), 72):
        pytest.skip(reason)


def both(make_engine, **keys):
    """An engine with a sketch and one without."""
    engines = [make_engine(head_sketch=wanted, **keys) for wanted in (True, False)]
    assert [engine.params.sketch is not None for engine in engines] == [True, False]
    return engines


@pytest.mark.parametrize(
    "keys",
    [{}, {"dtype": "bfloat16"}, {"quantization": "w8a8-token"}, {"tp": 2}, {"tp": 2, "pp": 2, "quantization": "w8a16"}],
    ids=str,
)
def test_the_text_is_the_same(make_engine, keys):
    sketched, plain = both(make_engine, **keys)
    for prompts in ([PROMPT], [PROMPT, PROMPT[:2]]):
        got, want = ([r.token_ids for r in engine.generate(prompts, GREEDY)] for engine in (sketched, plain))
        assert got == want


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.8, "seed": 3},
        {"logprobs": 0},
        {"logprobs": 3},
        {"repetition_penalty": 1.5},
        {"min_tokens": 6, "stop_token_ids": [7]},
    ],
    ids=str,
)
def test_what_needs_logits_gets_them(make_engine, asked):
    params = SamplingParams(max_tokens=12, ignore_eos=True, **asked)
    got, want = (engine.generate(PROMPT, params) for engine in both(make_engine))
    assert got.token_ids == want.token_ids
    if "logprobs" in asked:
        assert [t.logprob for t in got.logprobs] == pytest.approx([t.logprob for t in want.logprobs], abs=1e-6)
        assert all(t.logprob < 0 for t in got.logprobs)


def test_one_row_that_samples_beside_a_greedy_one(make_engine):
    mixed = [GREEDY, SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=1)]
    got, want = ([r.token_ids for r in engine.generate([PROMPT, PROMPT], mixed)] for engine in both(make_engine))
    assert got == want and got[0] == make_engine(head_sketch=True).generate(PROMPT, GREEDY).token_ids


def test_a_step_takes_it(make_engine):
    """Decoding chooses the operation for one and two sequences, and all logits for more."""
    engine = make_engine(head_sketch=True)
    chosen: set[tuple[str, str]] = set()

    class Watch:
        def call(self, implementation, args, kwargs):
            chosen.add((implementation.op, implementation.name))
            return contextlib.nullcontext()

    for batch, takes in ((1, True), (2, True), (4, False)):
        chosen.clear()
        with registry.observing(Watch()):
            engine.programs.decode(0).trace(engine.params, engine.programs.state(batch, 64)(), np.int32(1))
        assert (("head_argmax", "native") in chosen) == takes


@pytest.mark.parametrize("tp", [1, 2])
def test_its_bytes_are_counted(tiny_decoder, tp):
    mesh = make_mesh(tensor=tp, devices=jax.devices()[:tp])
    tensors, plan = module_tensors(tiny_decoder), make_plan(tiny_decoder.config, mesh)
    how = {"config": tiny_decoder.config, "plan": plan, "head_sketch": True}
    placed, shapes = place(tensors, mesh, **how), placed_shapes(tensors, mesh, **how)
    assert jax.tree.map(np.shape, placed.weights) == jax.tree.map(lambda a: a.shape, shapes.weights)
    assert placed.specs == shapes.specs
    assert weight_bytes(tensors, mesh, plan, head_sketch=True) * tp == placed.nbytes
    assert weight_bytes(tensors, mesh, plan, head_sketch=True) > weight_bytes(tensors, mesh, plan)


def test_models_that_are_better_without(tiny_decoder):
    """Capped logits may be equal where logits are not; and nobody made it for XLA."""
    capped, mesh = jaxinfer.Decoder(FAMILIES["gemma2"], nnx.Rngs(0)), make_mesh(devices=jax.devices()[:1])
    assert capped.config.soft_cap is not None
    assert place(capped, mesh, head_sketch=True).weights.sketch is None
    assert place(tiny_decoder, mesh, head_sketch=True, kernels="xla").weights.sketch is None
    assert place(tiny_decoder, mesh).weights.sketch is None
