"""The module as users hold it: generating inside their own jit, training, placing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import NEW, PROMPTS, padded

import jaxinfer
from jaxinfer import SamplingParams
from sharding.mesh import make_mesh


def test_pure_generate(tiny_decoder, greedy, sampled) -> None:
    """Inside of the user's own jit, in a padded batch, with arrays for what differs per row; rows end at a token of their own."""
    graph, state = nnx.split(tiny_decoder)
    ids, lengths = padded(PROMPTS[:4])
    stop = next(token for token in greedy[1][3:] if token not in greedy[0])
    cut = lambda tokens: tokens[: tokens.index(stop) + 1] if stop in tokens else tokens

    @jax.jit
    def run(state, temperature, seed):
        model = nnx.merge(graph, state)
        keys = {"max_new_tokens": NEW, "temperature": temperature, "seed": seed, "stop_token_ids": (stop,)}
        return jaxinfer.generate(model, jnp.asarray(ids), lengths=lengths, **keys)

    def rows(out: jaxinfer.Generated) -> list[list[int]]:
        assert out.tokens.shape == (4, NEW)
        return [tokens[:count] for tokens, count in zip(out.tokens.tolist(), out.counts.tolist(), strict=True)]

    expected = [cut(tokens) for tokens in greedy[:4]]
    assert len(expected[0]) == NEW > len(expected[1])
    assert rows(run(state, 0.0, 0)) == expected
    mixed = run(state, jnp.array([1.0, 0, 0, 0]), jnp.array([11, 0, 0, 0], jnp.uint32))
    assert rows(mixed) == [cut(sampled[0]), *expected[1:]]


def test_pure_generate_of_one_token(tiny_decoder, greedy) -> None:
    one = jax.jit(lambda ids: jaxinfer.generate(tiny_decoder, ids, max_new_tokens=1))(jnp.array([PROMPTS[1]]))
    assert (one.tokens.tolist(), one.counts.tolist()) == ([greedy[1][:1]], [1])


def test_training_a_module(tiny, make_engine) -> None:
    """Plain jax.grad on the module; the engine then says what the trained module says."""
    model = jaxinfer.load_model(tiny.folder)
    graph, params = nnx.split(model)
    text = jnp.array([[5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61, 65]])

    def loss(params):
        logits = nnx.merge(graph, params)(text[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], -1).mean()

    @jax.jit
    def step(params):
        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    losses = []
    for _ in range(60):
        value, params = step(params)
        losses.append(float(value))
    assert losses[0] > 2 and losses[-1] < 0.1
    trained = nnx.merge(graph, params)
    engine = jaxinfer.init_inference(trained, {"inference_max_tokens": 64, "micro_batch_size": 4})
    assert engine.generate([5], SamplingParams(max_tokens=8)).token_ids == text[0, 1:9].tolist()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (8, 1), (1, 2), (2, 3)])
def test_place(tiny, tiny_decoder, tp: int, pp: int) -> None:
    """Every device holds its share: whole heads, groups of 32 of the mlp, rows of the vocabulary; and the vectors of the embedding."""
    placed = jaxinfer.place(tiny_decoder, make_mesh(tensor=tp, stage=pp))
    embed, head_dim = 72, 8
    queries, keys = {1: (9, 3), 2: (6, 2), 3: (3, 1), 8: (2, 1)}[tp]  # 8: 4 kv heads, one of them empty, twice each
    width = 32 * -(-3 // tp)
    attention = embed + 2 * embed * (queries + keys) * head_dim
    layer = attention + embed + 3 * embed * width
    vocab = -(-97 // (tp * pp))
    slots = -(-3 // pp)
    assert placed.nbytes == 4 * tp * pp * (slots * layer + 2 * vocab * embed + embed)
    for leaf in jax.tree.leaves(placed.weights.layers):
        assert leaf.shape[0] == pp
    embedding = placed.weights.embedding
    shards = sorted(embedding.addressable_shards, key=lambda s: s.index[0].start or 0)
    whole = np.concatenate([np.asarray(shard.data) for shard in shards])
    np.testing.assert_array_equal(whole[:97], tiny.tensors["model.embed_tokens.weight"])
    assert not whole[97:].any()


def test_place_leaves_the_module_alone(tiny, tiny_decoder) -> None:
    placed = jaxinfer.place(tiny_decoder, make_mesh())
    jax.tree.map(lambda leaf: leaf.delete(), placed.weights)
    np.testing.assert_array_equal(tiny_decoder.norm.get_value(), tiny.tensors["model.norm.weight"])
