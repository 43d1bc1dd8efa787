"""The search for tiles: what a trace asks for, which tiles are legal, and which is taken, with a clock that is made up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import close, kernels

from pallas_kernels import tuner
from pallas_kernels.attention import attention
from pallas_kernels.deviceless import compile_for
from pallas_kernels.errors import BackendError
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.norm import rms_norm
from pallas_kernels.qtensor import round_to_nearest
from pallas_kernels.quant_matmul import quant_matmul
from pallas_kernels.registry import choose, register, unregister
from pallas_kernels.rope_cache import rope_cache
from pallas_kernels.target import interpreting
from pallas_kernels.tuning import tile_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    rows: int
    warps: int
    stages: int


DEFAULT = Tile(rows=4, warps=4, stages=2)


@pytest.fixture
def traced():
    """The tiles of an operation that is wrong with eight warps and refuses more than eight rows, as they are traced."""
    seen: list[Tile] = []

    def twice(x, *, factor):
        seen.append(tile_for("twice", DEFAULT, width=x.size))
        if seen[-1].rows > 8:
            raise BackendError("twice: at most 8 rows")
        return x * (factor + (seen[-1].warps == 8))

    register("twice", "reference", twice)
    yield seen
    unregister("twice", "reference")


def call(x):
    return choose("twice").function(x, factor=2.0)


@pytest.fixture
def task(traced):
    (found,) = tuner.record(lambda: jax.eval_shape(lambda x: call(x) + call(x[::1]), jax.ShapeDtypeStruct((6,), jnp.float32)))
    return found


def test_neighbours_are_one_step_away():
    assert tuner.neighbours(Tile(rows=1, warps=32, stages=1)) == [
        Tile(rows=2, warps=32, stages=1),
        Tile(rows=1, warps=16, stages=1),
        Tile(rows=1, warps=32, stages=2),
    ]
    assert len(tuner.neighbours(DEFAULT)) == 6


def test_a_recorded_call_is_made_again(task):
    assert (task.op, task.key, task.default) == ("twice", {"width": 6}, DEFAULT)
    assert task.call.operands == (jax.ShapeDtypeStruct((6,), jnp.float32),)
    (x,) = task.call.arrays(np.random.default_rng(0))
    np.testing.assert_array_equal(task.call(x), 2 * x)


def seconds(tile: Tile) -> float:
    """Best with eight rows and four stages, of what is right; most with eight warps."""
    return 10 - tile.rows / 2 - tile.stages - 5 * (tile.warps == 8) + abs(tile.warps - 4) / 100


def test_the_fastest_legal_tile_is_found(task, traced):
    measured = tuner.best(task, timer=lambda executable, operands: 8 * seconds(traced[-1]), repeats=1)
    by_tile = {c.tile: c for c in measured}
    assert measured[0].tile.rows == 8 and measured[0].tile.warps == 4 and measured[0].tile.stages > DEFAULT.stages + 2
    assert measured[0].seconds == pytest.approx(seconds(measured[0].tile))
    wrong, refused = dataclasses.replace(DEFAULT, warps=8), dataclasses.replace(DEFAULT, rows=16, stages=3)
    assert by_tile[wrong].refusal == "its results are not those of the default tile" and by_tile[wrong].seconds is None
    assert by_tile[refused].refusal == "twice: at most 8 rows"
    entry = tuner.entry(task, measured)
    assert entry.tile == dataclasses.asdict(measured[0].tile) and entry.default_seconds == seconds(DEFAULT)


def test_the_heuristic_stays_where_the_gain_is_noise(task, traced):
    timer = lambda executable, operands: 8 * (1.0 if traced[-1] == DEFAULT else 0.99)
    entry = tuner.entry(task, tuner.best(task, timer=timer, repeats=1))
    assert entry.tile == dataclasses.asdict(DEFAULT) and entry.seconds == entry.default_seconds == 1.0


def test_a_default_that_is_not_legal_is_said(task):
    wider = dataclasses.replace(task, default=dataclasses.replace(DEFAULT, rows=16))
    with pytest.raises(BackendError, match=r"its own tile .* is not legal here: twice: at most 8 rows"):
        tuner.best(wider, repeats=1)


def turned(x, cache, at):
    """A call that writes into a cache."""
    return rope_cache(x, x[:, :, :1], x[:, :, :1], None, None, cache, rows=None, positions=at)


@pytest.mark.parametrize("sets", [1, 2])
def test_a_call_that_is_repeated_gives_its_results(rng, sets):
    given = []
    for first in range(sets):
        k, v = (jnp.asarray(rng.standard_normal((1, 1, 9, 8)), jnp.float32) for _ in range(2))
        given.append(
            (jnp.asarray(rng.standard_normal((1, 1, 2, 8)), jnp.float32), LayerCache(k=k, v=v), jnp.full((1, 1), first))
        )
    tree = jax.tree.structure(given[0])
    places = tuner.updates(jax.eval_shape(turned, *given[0]), given[0])
    assert places == {1: 1, 2: 2} and tuner.updates((given[0][0],), given[0]) == {}
    run = tuner.repeated(lambda *a: turned(*jax.tree.unflatten(tree, a)), sets, 3, places)
    found = jax.jit(run)(*(a for one in given for a in jax.tree.leaves(one)))
    for f, one in zip(found, given, strict=True):
        close(f, turned(*one), 1e-7)


@pytest.mark.aot
def test_a_cache_that_is_written_is_not_copied_each_time():
    """Else the time of a small write would be that of the copy of all that it does not touch."""
    cache = jax.eval_shape(lambda: LayerCache.zeros(rows=1, kv_heads=1, tokens=1000, head_dim=64, dtype=jnp.bfloat16))
    args = jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.float32), cache, jax.ShapeDtypeStruct((1, 1), jnp.int32)
    flat, tree = jax.tree.flatten(args)
    call = lambda *a: turned(*jax.tree.unflatten(tree, a))
    places = tuner.updates(jax.eval_shape(turned, *args), args)
    loops = [compile_for("h100", tuner.repeated(call, 1, 50, p), *flat).launches for p in (places, {})]
    kept, copied = (launches[launches.index("kWhile") :].count("kCopy") for launches in loops)
    assert copied == kept + 2  # keys and values


def test_a_clock_takes_the_median(monkeypatch):
    times = iter([0, 5, 10, 11, 20, 23, 30, 31.5, 40, 42])
    monkeypatch.setattr(tuner.time, "perf_counter", lambda: next(times))
    assert tuner.clock(lambda x: x, [jnp.ones(1)]) == 2  # of 5, 1, 3, 1.5 and 2


@pytest.mark.slow
def test_what_kernels_ask_for(rng):
    w = jax.tree.map(jnp.asarray, round_to_nearest(rng.standard_normal((32, 64)).astype(np.float32), format="int8"))
    cache = LayerCache.zeros(rows=2, kv_heads=1, tokens=32, head_dim=16, dtype=jnp.bfloat16)

    def trace():
        # under jax.jit, whose traces are kept: a second recording finds the same
        def run(x, q, positions):
            y = rms_norm(quant_matmul(x, w), jnp.ones(32), eps=1e-5)
            return y, attention(q, cache, rows=None, positions=positions, scale=0.1)

        structs = [
            jax.ShapeDtypeStruct(*s) for s in (((3, 64), jnp.float32), ((2, 1, 2, 16), jnp.float32), ((2, 1), jnp.int32))
        ]
        jax.eval_shape(jax.jit(run), *structs)

    for _ in range(2):
        with interpreting():
            found = tuner.record(trace)
        assert [(t.op, t.call.implementation.op) for t in found][:3] == [
            ("quant_matmul", "quant_matmul"),
            ("norm", "rms_norm"),
            ("attention", "attention"),
        ]
    call = found[2].call
    arrays = [path for path, leaf in zip(call.paths, call.leaves, strict=True) if isinstance(leaf, jax.ShapeDtypeStruct)]
    operands = dict(zip(arrays, call.arrays(rng), strict=True))
    positions = next(a for path, a in operands.items() if "positions" in path)
    np.testing.assert_array_equal(positions, [[31], [31]])  # the whole cache is seen
    with kernels():
        measured = tuner.best(found[1], timer=lambda executable, operands: 1.0, repeats=1)
    assert len(measured) > 3 and all(c.refusal is None for c in measured), measured


@pytest.mark.aot
def test_legal_tiles_of_a_gpu_that_is_not_here():
    from pallas_kernels.deviceless import lower_for

    shapes = jax.ShapeDtypeStruct((64, 1 << 15), jnp.float32), jax.ShapeDtypeStruct((1 << 15,), jnp.float32)
    (task,) = tuner.record(lambda: lower_for("a100", lambda x, s: rms_norm(x, s, eps=1e-5), *shapes))
    tile = dataclasses.replace(task.default, rows=1, warps=32)
    found = tuner.candidates(dataclasses.replace(task, default=tile), "a100")
    assert found[0].refusal is None and found[0].kernels[0].registers > 16
    spilled = [c for c in found if c.refusal is not None]
    assert [c.tile.rows for c in spilled] == [2] and "bytes of registers are spilled" in spilled[0].refusal
