"""What Pallas kernels read from device memory, derived from their own loads: addresses are computed, values are not.

A kernel is traced, and its index arithmetic is run for every program of its grid; each load marks the sectors of 32 bytes that it touches.
What floats are is of no interest, so that all arithmetic with them falls away; whole numbers that say where to read (positions, rows)
are those of the operands.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.gpus import GPUS
from pallas_kernels.target import interpreting

SECTOR = 32  # bytes that device memory gives at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
    """Of all kernels of a function. unique: bytes of sectors that any program reads, each kernel's once. handed_on: those of them in
    arrays that an earlier kernel made, which was the last to run. issued: bytes that all loads ask for, those of other programs again.
    operands: bytes of the arrays that are read from at all."""

    unique: int
    handed_on: int
    issued: int
    operands: int


class NotDerivable(Exception):
    """A kernel whose reads do not show in its loads, such as one whose blocks Pallas cuts."""


class _Made:
    """The value of an array that a kernel made, or that was computed from one: unknown."""


@dataclasses.dataclass
class _Ref:
    """An operand or a result of a kernel. value: of whole numbers that are known. made: by an earlier kernel."""

    number: int
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Any
    made: bool


def reads(function: Callable[..., Any], operands: Sequence[Any], *, device_kind: str = GPUS["h100"].device_kind) -> Reads:
    """operands: trees of jax.ShapeDtypeStruct, or of arrays where their values matter. Raises NotDerivable."""
    leaves, tree = jax.tree.flatten(tuple(operands))
    with interpreting(device_kind):
        # of a function of its own, so that no kept trace is used
        closed = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(tree, flat)))(*leaves)
    known = [a if isinstance(a, jax.Array | np.ndarray) else None for a in leaves]
    found: list[Reads] = []
    _outside(closed.jaxpr, [*closed.consts, *known], found)
    if not found:
        raise NotDerivable("there is no kernel")
    return Reads(**{f.name: sum(getattr(r, f.name) for r in found) for f in dataclasses.fields(Reads)})


def _outside(jaxpr, values: Sequence[Any], found: list[Reads]) -> list[Any]:
    """Run what is known of a program around its kernels; None and _Made are unknown."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
    value = lambda v: v.val if hasattr(v, "val") else env[v]  # of a literal
    for eqn in jaxpr.eqns:
        given = [value(v) for v in eqn.invars]
        if eqn.primitive.name == "pallas_call":
            found.append(_kernel(eqn, given))
            results: Sequence[Any] = [_Made()] * len(eqn.outvars)
        elif (inner := _inner(eqn)) is not None:
            results = _outside(inner.jaxpr, [*inner.consts, *given], found)
        elif any(isinstance(g, _Made) for g in given):
            results = [_Made()] * len(eqn.outvars)
        elif any(g is None for g in given) or eqn.primitive.name in ("while", "scan", "cond"):
            results = [None] * len(eqn.outvars)
        else:
            made = eqn.primitive.bind(*given, **eqn.params)
            results = made if eqn.primitive.multiple_results else [made]
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _inner(eqn):
    """The closed jaxpr that an equation calls once with its operands, or None."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if hasattr(inner, "jaxpr") and eqn.primitive.name not in ("while", "scan", "cond", "pallas_call"):
            return inner
    return None


def _kernel(eqn, given: Sequence[Any]) -> Reads:
    mapping, jaxpr = eqn.params["grid_mapping"], eqn.params["jaxpr"]
    refs = []
    for number, var in enumerate(jaxpr.invars):
        aval = var.aval
        value = given[number] if number < len(given) else None
        dtype, made = np.dtype(aval.dtype), isinstance(value, _Made)
        refs.append(_Ref(number, tuple(aval.shape), dtype, None if made or dtype.kind not in "iub" else value, made))
    for block, whole in zip(mapping.block_mappings, refs, strict=True):
        if tuple(getattr(b, "block_size", b) for b in block.block_shape) != tuple(block.array_aval.shape):
            raise NotDerivable(f"{eqn.params['name']}: Pallas cuts {list(whole.shape)} into blocks")
    grid = mapping.grid
    sectors = [math.ceil(math.prod(r.shape) * r.dtype.itemsize / SECTOR) for r in refs]

    @jax.jit
    def run():
        marks = [jnp.zeros(n, jnp.uint8) for n in sectors]
        counts = jnp.zeros(len(refs), jnp.int32)

        def program(index, state):
            at, rest = [], index
            for size in reversed(grid):
                at.insert(0, lax.rem(rest, size))
                rest = lax.div(rest, size)
            box = [state]
            _inside(jaxpr, refs, at, box)
            return _state(box[0])

        return lax.fori_loop(0, math.prod(grid), program, (tuple(marks), counts))

    marks, counts = run()
    read = [int(np.sum(np.asarray(m, np.int64))) * SECTOR for m in marks]
    read = [min(n, math.prod(r.shape) * r.dtype.itemsize) for n, r in zip(read, refs, strict=True)]
    return Reads(
        unique=sum(read),
        handed_on=sum(n for n, r in zip(read, refs, strict=True) if r.made),
        issued=int(sum(int(c) * r.dtype.itemsize for c, r in zip(counts, refs, strict=True))),
        operands=sum(math.prod(r.shape) * r.dtype.itemsize for n, r in zip(read, refs, strict=True) if n),
    )


def _inside(jaxpr, values: Sequence[Any], at: Sequence[Any], box: list) -> list[Any]:
    """The body of a kernel, or of a loop in it. box: holds the marks and counts so far."""
    env = dict(zip(jaxpr.invars, values, strict=True))
    value = lambda v: v.val if hasattr(v, "val") else env[v]  # of a literal
    for eqn in jaxpr.eqns:
        given = [value(v) for v in eqn.invars]
        name = eqn.primitive.name
        if name == "program_id":
            results: Sequence[Any] = [at[eqn.params["axis"]]]
        elif name == "masked_load":
            ref, transforms, mask, _ = jax.tree.unflatten(eqn.params["args_tree"], given)
            results = [_load(ref, transforms, mask, eqn.outvars[0].aval, box)]
        elif name == "get":
            results = [_load(given[0], jax.tree.unflatten(eqn.params["tree"], given[1:]), None, eqn.outvars[0].aval, box)]
        elif name in ("masked_swap", "swap"):
            results = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
        elif name == "scan":
            results = _scan(eqn, given, at, box)
        elif name == "while":
            results = _while(eqn, given, at, box)
        elif name == "cond":
            raise NotDerivable("a kernel with branches")
        elif (inner := _inner(eqn)) is not None:
            results = _inside(inner.jaxpr, given, at, box)
        else:
            made = eqn.primitive.bind(*given, **eqn.params)
            results = made if eqn.primitive.multiple_results else [made]
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _load(ref: _Ref, transforms, mask, aval, box: list):
    """Mark what a load reads; its values where they are known, else zeros."""
    index = _flat_index(ref, transforms, aval.shape)
    inside = jnp.ones(aval.shape, bool) if mask is None else jnp.broadcast_to(mask, aval.shape)
    marks, counts = box[0]
    sector = lax.div(index * ref.dtype.itemsize, SECTOR) if ref.dtype.itemsize < SECTOR else index
    marks = list(marks)
    marks[ref.number] = marks[ref.number].at[jnp.where(inside, sector, len(marks[ref.number]))].set(1, mode="drop")
    box[0] = marks, counts.at[ref.number].add(jnp.sum(inside, dtype=jnp.int32))
    if ref.value is None:
        return jnp.zeros(aval.shape, aval.dtype)
    taken = jnp.asarray(ref.value).reshape(-1).at[jnp.where(inside, index, 0)].get(mode="clip")
    return jnp.where(inside, taken, jnp.zeros((), aval.dtype))


def _flat_index(ref: _Ref, transforms, shape: tuple[int, ...]):
    """The place of each element of a load in its array, row by row."""
    indexers = [t for t in jax.tree.leaves(transforms, is_leaf=lambda t: hasattr(t, "indices")) if hasattr(t, "indices")]
    if not indexers:
        return jnp.arange(math.prod(ref.shape), dtype=jnp.int32).reshape(ref.shape)
    if len(indexers) > 1:
        raise NotDerivable("a view of a view")
    (indexer,) = indexers
    arrays = [i for i in indexer.indices if not hasattr(i, "start")]
    lead = np.broadcast_shapes(*(jnp.shape(a) for a in arrays)) if arrays else ()
    cuts = [i for i in indexer.indices if hasattr(i, "start")]
    index, seen = jnp.zeros(shape, jnp.int32), 0
    for i, size in zip(indexer.indices, ref.shape, strict=True):
        if hasattr(i, "start"):
            along = len(shape) - len(cuts) + seen if len(lead) + len(cuts) == len(shape) else seen
            place = i.start + (i.stride or 1) * lax.broadcasted_iota(jnp.int32, shape, along)
            seen += 1
        else:
            place = jnp.broadcast_to(jnp.reshape(i, (*jnp.shape(i), *(1,) * len(cuts))), shape)
        index = index * size + place
    return index


def _scan(eqn, given, at, box: list) -> list[Any]:
    inner, count = eqn.params["jaxpr"], len(eqn.outvars)
    consts, carry = given[: len(given) - count], given[len(given) - count :]

    def body(_, state):
        inside = [state[1]]
        out = _inside(inner.jaxpr, [*consts, *state[0]], at, inside)
        return out, _state(inside[0])

    out, state = lax.fori_loop(0, eqn.params["length"], body, (list(carry), _state(box[0])))
    box[0] = state
    return out


def _while(eqn, given, at, box: list) -> list[Any]:
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_consts, body_consts = given[:of_test], given[of_test : of_test + of_body]
    carry = given[of_test + of_body :]
    test, inner = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]

    def body(state):
        inside = [state[1]]
        out = _inside(inner.jaxpr, [*body_consts, *state[0]], at, inside)
        return out, _state(inside[0])

    more = lambda state: _inside(test.jaxpr, [*test_consts, *state[0]], at, [state[1]])[0]
    out, state = lax.while_loop(more, body, (list(carry), _state(box[0])))
    box[0] = state
    return out


def _state(state):
    return tuple(state[0]), state[1]
