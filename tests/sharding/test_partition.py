"""Which units a shard holds: everything exactly once, padded and replicated where sizes do not divide."""

import itertools

import numpy as np
import pytest

from sharding.errors import MeshError
from sharding.partition import Units, gather, split_even, split_heads


@pytest.mark.parametrize(
    ("size", "shards", "unit"), [(12, 3, 1), (10, 4, 1), (1536, 5, 32), (64, 1, 64), (3, 8, 1), (96, 4, 32), (50, 6, 1)]
)
def test_split_even_covers_the_axis_once(size, shards, unit):
    parts = split_even(size, shards, unit)
    assert len({p.length for p in parts}) == 1  # every shard has one shape
    held = np.concatenate([p.elements for p in parts])
    assert sorted(held[held >= 0]) == list(range(size))
    for p in parts:
        starts = p.elements.reshape(-1, unit)[:, 0]
        assert ((starts < 0) | (starts % unit == 0)).all()  # no unit is cut


def test_split_even_refuses_units_that_do_not_divide():
    with pytest.raises(MeshError, match="10 elements is not made of units of 4"):
        split_even(10, 2, 4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (8, 8), (8, 2), (6, 1), (32, 8), (10, 5), (12, 4)])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 6, 8, 16])
def test_split_heads_keeps_groups_together(heads, kv_heads, shards):
    split, group = split_heads(heads, kv_heads, shards), heads // kv_heads
    assert len(split.query) == len(split.kv) == shards
    assert len({len(q) for q in split.query}) == len({len(k) for k in split.kv}) == 1
    held = [q for shard in split.query for q in shard if q >= 0]
    assert sorted(held) == list(range(heads))  # every query head is somewhere, once
    for queries, kvs in zip(split.query, split.kv, strict=True):
        each = len(queries) // len(kvs)
        for q, kv in zip(queries, itertools.chain(*([k] * each for k in kvs)), strict=True):
            assert q < 0 or q // group == kv  # beside the kv head that it reads


def test_split_heads_refuses_groups_that_do_not_divide():
    with pytest.raises(MeshError, match="10 query heads are not a multiple of 4 kv heads"):
        split_heads(10, 4, 2)


@pytest.mark.parametrize(
    "units", [Units(2, (0, 1, 2)), Units(2, (2, 0)), Units(3, (1, -1)), Units(1, (-1, 5, 5)), Units(6, (0,))]
)
def test_gather(units):
    x = np.arange(24).reshape(6, 4)
    index = units.elements
    want = np.where((index >= 0)[:, None], x[np.maximum(index, 0)], 0)
    got = gather(x, (units, None))
    np.testing.assert_array_equal(got, want)
    assert got.flags.owndata or got.base.flags.owndata
    got[:] = -1
    assert x.min() == 0  # a copy
