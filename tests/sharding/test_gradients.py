"""Gradients of a placed model equal those of the plain module on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxinfer import generation
from jaxinfer.models import AttentionConfig, Decoder, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from jaxinfer.placement import local_layers, place
from sharding.mesh import make_mesh
from sharding.rules import DATA, EXPERT, ROW_AXES

pytestmark = pytest.mark.usefixtures("rough_programs")

B, T = 4, 7
SLOW = pytest.mark.slow


def config(heads: int, kv_heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab=50,  # 8 shards do not divide it
        embed=24,
        layers=3,
        attention=AttentionConfig(
            heads=heads, kv_heads=kv_heads, head_dim=8, scale=8**-0.5, rope=RopeConfig(dim=8), bias=True, output_bias=True
        ),
        mlp=MLPConfig(width=36, activation="gelu", bias=True),
        norm_eps=1e-5,
        tied=tied,
        max_positions=64,
    )


def loss_sum(logits, tokens, lengths):
    """Sum of the negative log-likelihoods of all real tokens but the first of each row."""
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    return -jnp.sum(jnp.where(jnp.arange(1, tokens.shape[1]) < lengths[:, None], logprobs, 0))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    return rng.integers(0, 50, (B, T)).astype(np.int32), np.array([7, 3, 6, 2], np.int32)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((8, 4, True), id="8/4 heads, tied"),
        pytest.param((9, 3, False), id="9/3 heads, own head", marks=SLOW),
    ],
)
def model(request):
    return random_module(config(*request.param))


def random_module(config: ModelConfig) -> Decoder:
    """With nothing at zero or one, so that every parameter has a gradient of its own."""
    module = Decoder(config, nnx.Rngs(1))
    rng = np.random.default_rng(4)
    for _, p in nnx.iter_graph(module):
        if isinstance(p, nnx.Param) and p.get_value().ndim == 1:
            p.set_value(p.get_value() + jnp.asarray(rng.normal(0, 0.1, p.get_value().shape), jnp.float32))
    return module


@pytest.fixture(scope="module")
def reference(model, batch):
    return gradients_of(model, batch)


def gradients_of(model, batch) -> Decoder:
    """Of the plain module by plain jax.grad, as a module of their own."""
    graph, state = nnx.split(model)
    tokens, lengths = batch
    grads = jax.jit(jax.grad(lambda s: loss_sum(nnx.merge(graph, s)(tokens, lengths=lengths), tokens, lengths)))(state)
    return nnx.merge(graph, grads)


@pytest.mark.parametrize(
    ("data", "stage", "tensor"),
    [
        (2, 1, 4),
        (1, 3, 2),
        *(pytest.param(*s, marks=pytest.mark.slow) for s in [(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 1, 2), (1, 1, 4), (1, 2, 1)]),
    ],
)
def test_placed_gradients_equal_the_modules(model, reference, batch, data, stage, tensor):
    check(model, reference, batch, make_mesh(data=data, stage=stage, tensor=tensor))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, pytest.param(2, marks=SLOW)])
def test_heads_that_several_shards_hold(batch, hosts):
    """Two kv heads on four shards: copies have the gradients of all query heads that read them. A group of three is padded to four, and
    padding has none."""
    module = random_module(config(6, 2, True))
    check(module, gradients_of(module, batch), batch, make_mesh(tensor_hosts=hosts, tensor=4 // hosts))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "hosts", "tensor"), [(1, 1, 4), (1, 2, 2), (3, 1, 2)])
def test_tokens_split_between_half_layers(model, reference, batch, stage, hosts, tensor):
    """Seven tokens, which no number of shards divides."""
    check(model, reference, batch, make_mesh(stage=stage, tensor_hosts=hosts, tensor=tensor), split=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "expert", "tensor"), [(1, 2, 2), pytest.param(2, 2, 1, marks=SLOW), pytest.param(1, 4, 1, marks=SLOW)]
)
def test_experts(batch, data, expert, tensor):
    """Three of them, so that no mesh divides them; tokens travel to them, and gradients the same way back."""
    moe = MoEConfig(experts=3, used=2, width=20, normalise=True, layers=(1, 2))
    mlp = MLPConfig(width=36, activation="silu")
    module = random_module(dataclasses.replace(config(8, 4, True), mlp=mlp, moe=moe))
    check(module, gradients_of(module, batch), batch, make_mesh(data=data, expert=expert, tensor=tensor))


def check(model, reference, batch, mesh, split=False):
    """Gradients of the placed model against the placed gradients of the module, shard by shard."""
    placed, wanted = place(model, mesh), place(reference, mesh)
    placed = placed.with_split_tokens() if split else placed

    def gradients(weights, tokens, lengths):
        def loss(weights):
            return loss_sum(generation.forward(local_layers(weights), tokens, lengths, plan=placed.plan), tokens, lengths)

        # split experts have seen the rows of all expert shards, all else those of its own
        over = lambda spec: (DATA,) if EXPERT in spec else ROW_AXES
        return jax.tree.map(lambda g, spec: lax.psum(g, over(spec)), jax.grad(loss)(weights), placed.specs)

    specs = (placed.specs, P(ROW_AXES), P(ROW_AXES))
    run = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=placed.specs, check_vma=False))
    found = run(placed.weights, *batch)

    largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(wanted.weights))
    for path, want in jax.tree_util.tree_leaves_with_path(wanted.weights):
        got = found
        for key in path:
            got = getattr(got, key.name) if hasattr(key, "name") else got[key.idx]
        for mine, theirs in zip(got.addressable_shards, want.addressable_shards, strict=True):
            error = np.abs(np.asarray(mine.data) - np.asarray(theirs.data)).max() / largest
            assert error < 1e-5, (jax.tree_util.keystr(path), error)
