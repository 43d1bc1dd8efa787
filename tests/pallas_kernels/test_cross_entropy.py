"""Log-probabilities of tokens against float64, whole and over shards, and the GPU's kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from kernel_checks import compiled, kernels

from pallas_kernels.cross_entropy import cross_entropy, log_probs
from pallas_kernels.cross_entropy.specs import SPECS
from pallas_kernels.errors import ShapeError

IMPLEMENTATIONS = ("reference", "pallas")


def truth(logits, targets):
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return np.take_along_axis(z, targets[..., None], -1)[..., 0] - np.log(np.exp(z).sum(-1))


@pytest.mark.parametrize("name", ["odd.1000", "odd.1"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_log_probs(rng, implementation, name):
    spec = SPECS[name]
    logits = jnp.asarray(rng.standard_normal((2, spec.tokens, spec.vocabulary)) * 20, jnp.float32)
    logits = logits.at[0, 0, 0].set(1e4)
    targets = rng.integers(0, spec.vocabulary, (2, spec.tokens)).astype(np.int32)
    with kernels():
        found = cross_entropy(logits, jnp.asarray(targets), implementation=implementation)
    np.testing.assert_allclose(-found, truth(logits, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_words_that_are_forbidden(implementation):
    logits = jnp.full((2, 5000), -jnp.inf).at[0, 4500].set(3.0).at[1, 7].set(2.0)
    with kernels():
        found = log_probs(logits, jnp.asarray([4500, 8]), implementation=implementation)
    np.testing.assert_array_equal(found, [0.0, -np.inf])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_over_shards_and_its_gradient(rng, implementation):
    logits = jnp.asarray(rng.standard_normal((3, 40)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 40, 3), jnp.int32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    cut, whole = PartitionSpec(None, "tensor"), PartitionSpec()

    @jax.custom_vjp
    def total(a):
        return jax.lax.psum(a, "tensor")

    total.defvjp(lambda a: (jax.lax.psum(a, "tensor"), None), lambda _, g: (g,))

    def shard(logits, targets):
        def loss(z):
            first = jax.lax.axis_index("tensor") * z.shape[-1]
            largest = lambda m: jax.lax.pmax(m, "tensor")
            with kernels():
                found = log_probs(
                    z, targets, first=first, max_over_shards=largest, sum_over_shards=total, implementation=implementation
                )
            return jnp.sum(found), found

        gradient, found = jax.grad(loss, has_aux=True)(logits)
        return found, gradient

    found, gradient = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(cut, whole), out_specs=(whole, cut), check_vma=False))(
        logits, targets
    )
    np.testing.assert_allclose(found, truth(logits, np.asarray(targets)), rtol=1e-5, atol=1e-6)
    z = np.asarray(logits, np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, np.eye(40)[np.asarray(targets)] - p, atol=1e-6)


def test_wrong_arguments_are_refused():
    logits, targets = jnp.ones((2, 5)), jnp.zeros(2, jnp.int32)
    for arguments, reason in (
        ({"targets": jnp.zeros(3, jnp.int32)}, "targets"),
        ({"targets": jnp.zeros(2)}, "integers"),
        ({"targets": targets, "max_over_shards": lambda m: m}, "come together"),
    ):
        with pytest.raises(ShapeError, match=reason):
            log_probs(logits, **arguments)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "gpu"),
    [("llama_3_1_8b", "h100"), ("smollm2_135m", "a100"), ("llama_3_1_8b.shard_of_8", "b200")],
)
def test_compiles_for_gpus(name, gpu):
    spec = SPECS[name]
    struct = jax.ShapeDtypeStruct
    found = compiled(
        gpu,
        lambda logits, targets: log_probs(logits, targets),
        struct((spec.tokens, spec.vocabulary), jnp.float32),
        struct((spec.tokens,), jnp.int32),
        launches=("cross_entropy", "loop_subtract_fusion"),
    )
    assert found.kernels
