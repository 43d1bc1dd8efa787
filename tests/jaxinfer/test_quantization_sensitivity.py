"""Bits by sensitivity: the estimates beside measured KL divergences, and the allocation beside all others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import TinyModel

import jaxinfer
from convert.load import materialize
from jaxinfer import QuantizationConfig, errors
from jaxinfer.loading import module_of, open_source
from jaxinfer.quantization.grids import decoded, nearest, search_grid
from jaxinfer.quantization.policy import spec_of
from jaxinfer.quantization.sensitivity import Choice, allocate, allocate_to_loss, sensitivities
from jaxinfer.quantizing import compare


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_estimates_are_near_what_is_measured(tiny_model: Callable[..., TinyModel], tied: bool) -> None:
    """One matrix at a time in INT4: the KL divergence on fresh tokens of the model's own is what was predicted, within a factor."""
    model = tiny_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=tied)
    opened = open_source(model.folder)
    tokens = np.random.default_rng(0).integers(0, 97, (48, 32)).astype(np.int32)
    found = sensitivities(opened.tensors, opened.config, tokens, forms=("w4a16-g64", "w4a16-g32", "w8a16", "float32"))
    reference = jaxinfer.load_model(model.folder, dtype="float32")
    values = materialize(opened.tensors)
    # inputs of which each output has many are what the estimate is made for; heads of 8 numbers are not
    ratios = {}
    for path in (
        "blocks.0.mlp.down",
        "blocks.1.mlp.up",
        "blocks.2.attention.v",
        "blocks.2.mlp.gate",
        "embedding" if tied else "head",
    ):
        choices = {choice.form: choice for choice in found[path]}
        assert choices["float32"].cost == 0 and choices["w8a16"].cost < 0.05 * choices["w4a16-g32"].cost
        w = jnp.asarray(values[path])
        grid = search_grid(w, jnp.ones(w.shape[1]), spec_of(QuantizationConfig.parse("w4a16-g32"), w.shape[1]))
        changed = module_of(opened.config, values | {path: np.asarray(decoded(nearest(w, grid), grid))})
        ratios[path] = choices["w4a16-g32"].cost / compare(reference, changed, tokens[:16]).kl
    assert all(0.3 < ratio < 3 for ratio in ratios.values()), ratios
    assert [choice.form for choice in found["blocks.0.mlp.down"]] == ["w4a16-g32", "w8a16", "float32"]  # 96 inputs


def test_allocation_is_the_best_of_all() -> None:
    rng = np.random.default_rng(1)
    make = lambda: [
        Choice(form=str(n), nbytes=int(n), cost=float(c)) for n, c in zip([10, 14, 20, 40], rng.random(4), strict=True)
    ]
    choices = {name: make() for name in "abcde"}
    for budget in (50, 75, 110, 200):
        found = allocate(choices, budget)
        size = sum(c.nbytes for c in found.values())
        assert size <= budget and list(found) == list(choices)
        fitting = [c for c in itertools.product(*choices.values()) if sum(x.nbytes for x in c) <= size]
        least = min(sum(x.cost for x in c) for c in fitting)
        # greedy on the hulls is Lagrange's solution until a step no longer fits
        assert sum(c.cost for c in found.values()) <= least + 0.35
    whole = allocate(choices, 200)
    assert {name: c.cost for name, c in whole.items()} == {name: min(c.cost for c in cs) for name, cs in choices.items()}
    with pytest.raises(errors.QuantizationError, match="leaves 49 bytes for matrices, which need 50 in their smallest forms"):
        allocate(choices, 49)


def test_allocation_to_a_loss_is_the_smallest_of_all() -> None:
    """Within one step of the best of all combinations; a loss that nothing reaches is refused."""
    rng = np.random.default_rng(5)
    choices = {
        name: [
            Choice(form=f"{n}", nbytes=10 * (n + 1), cost=float(c))
            for n, c in enumerate([*np.sort(rng.random(3))[::-1] / 10, 0])
        ]
        for name in "abcd"
    }
    every = [(sum(c.nbytes for c in p), sum(c.cost for c in p)) for p in itertools.product(*choices.values())]
    for loss in (0.05, 0.1, 0.2, 1.0):
        found = allocate_to_loss(choices, loss)
        cost, size = sum(c.cost for c in found.values()), sum(c.nbytes for c in found.values())
        possible = [nbytes for nbytes, other in every if other <= math.log1p(loss)]
        assert cost <= math.log1p(loss) and min(possible) <= size <= min(possible) + 30
    assert all(c.form == "0" for c in allocate_to_loss(choices, 10.0).values())
    choices["e"] = [Choice(form="0", nbytes=1, cost=0.1)]
    with pytest.raises(errors.QuantizationError, match=r"a loss of 5\.00% allows 0\.04879 .* cost 0\.10000; raise it"):
        allocate_to_loss(choices, 0.05)


@pytest.mark.slow
def test_no_form_fits(tiny: TinyModel) -> None:
    opened = open_source(tiny.folder)
    tokens = np.ones((1, 8), np.int32)
    with pytest.raises(errors.QuantizationError, match=r"has 72 inputs, and none of the forms w4a16-g64"):
        sensitivities(opened.tensors, opened.config, tokens, forms=("w4a16-g64",))
