"""Gradients of placed models with all that families have beside Llama: post norms, norms of q and k, windows, learned positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer import generation
from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, RopeConfig
from jaxinfer.placement import local_layers, place
from sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("rough_programs")

LENGTHS = np.array([7, 3, 6, 2], np.int32)
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 0.4}
COMMON = {"family": "any", "vocab": 50, "embed": 24, "layers": 2, "norm_eps": 1e-5, "tied": True, "max_positions": 16}
CAPPED = ModelConfig(
    attention=AttentionConfig(rope=RopeConfig(dim=8), qk_norm=True, soft_cap=2.0, **HEADS),
    mlp=MLPConfig(width=36, activation="gelu_tanh"),
    norm="rms_offset",
    post_norms=True,
    windows=(2, None),
    embed_scale=24**0.5,
    soft_cap=3.0,
    **COMMON,
)
LEARNED = ModelConfig(
    attention=AttentionConfig(rope=None, bias=True, output_bias=True, **HEADS),
    mlp=MLPConfig(width=36, activation="gelu_tanh", gated=False, bias=True),
    norm="layer",
    learned_positions=True,
    **COMMON,
)


def loss_sum(logits, tokens):
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    return -jnp.sum(jnp.where(jnp.arange(1, tokens.shape[1]) < LENGTHS[:, None], logprobs, 0))


def module(config: ModelConfig) -> Decoder:
    """Nothing at zero or one, so that every parameter has a gradient of its own."""
    model, rng = Decoder(config, nnx.Rngs(1)), np.random.default_rng(4)
    for _, p in nnx.iter_graph(model):
        if isinstance(p, nnx.Param) and p.get_value().ndim == 1:
            p.set_value(p.get_value() + jnp.asarray(rng.normal(0, 0.1, p.get_value().shape), jnp.float32))
    return model


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "stage", "tensor"),
    [
        pytest.param(CAPPED, 1, 2, id="capped on 2 shards"),
        pytest.param(CAPPED, 2, 2, id="capped on 2 stages of 2", marks=SLOW),
        pytest.param(LEARNED, 1, 2, id="learned on 2 shards", marks=SLOW),
        pytest.param(LEARNED, 2, 2, id="learned on 2 stages of 2", marks=SLOW),
    ],
)
def test_placed_gradients_equal_the_modules(config, stage, tensor):
    model, mesh = module(config), make_mesh(stage=stage, tensor=tensor)
    tokens = np.random.default_rng(3).integers(0, config.vocab, (4, 7)).astype(np.int32)
    graph, state = nnx.split(model)
    whole = jax.jit(jax.grad(lambda s: loss_sum(nnx.merge(graph, s)(tokens, lengths=LENGTHS), tokens)))(state)
    wanted = place(nnx.merge(graph, whole), mesh).weights
    placed = place(model, mesh)

    def gradients(weights):
        logits = lambda weights: generation.forward(local_layers(weights), tokens, LENGTHS, plan=placed.plan)
        return jax.grad(lambda weights: loss_sum(logits(weights), tokens))(weights)

    run = jax.shard_map(gradients, mesh=mesh, in_specs=(placed.specs,), out_specs=placed.specs, check_vma=False)
    found = jax.jit(run)(placed.weights)

    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(wanted))
    for path, got, want in zip(paths, jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        for mine, theirs in zip(got.addressable_shards, want.addressable_shards, strict=True):
            error = np.abs(np.asarray(mine.data) - np.asarray(theirs.data)).max() / largest
            assert error < 1e-5, (path, error)
    new = {"q_norm", "attention_post_norm"} if config is CAPPED else {"positions", "norm_bias"}
    assert all(any(path.endswith(f".{name}") for path in paths) for name in new)
