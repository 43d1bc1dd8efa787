"""What kernel_report.py --measure puts beside a kernel: the same call through XLA, which calls cuBLAS for products of floats, through other
implementations that take it, and through torch's own kernel where torch is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from pallas_kernels.cases import Case
from pallas_kernels.errors import BackendError
from pallas_kernels.registry import using

KERNELS = ("pallas", "mosaic", "jax_triton")
OTHERS = ("mosaic", "cudnn", "jax_triton")  # by name, for the operation that a case is of
TORCH = Path(__file__).parent / "peer_torch_kernels.py"

type Timer = Callable[[Case], float]


def beside(case: Case, timer: Timer, *, limit: int = 1 << 31) -> dict[str, float]:
    """Seconds of the case by implementation, without those that do not take it. limit: bytes that what XLA writes in between may have."""
    found: dict[str, float] = {}
    if written(case) <= limit:
        with using(without=KERNELS):
            found["xla"] = timer(case)
    for name in OTHERS:
        try:
            with using({case.op: name}):
                jax.eval_shape(lambda *args: case.run(*args), *case.args)  # a function of its own, so that it is traced anew
                found[name] = timer(case)
        except BackendError:  # it does not take this case, or there is no such implementation
            continue
    return found


def written(case: Case) -> int:
    """Bytes of the largest array that the reference makes."""
    with using(without=KERNELS):
        jaxpr = jax.make_jaxpr(lambda *args: case.run(*args))(*case.args)
    return max((v.aval.size * v.aval.dtype.itemsize for v in _results(jaxpr.jaxpr)), default=0)


def _results(jaxpr):
    for eqn in jaxpr.eqns:
        yield from eqn.outvars
        for inner in jaxprs_in_params(eqn.params):
            yield from _results(inner)


def torch_seconds(cases: list[Case], *, device: str = "cuda", python: str | None = None) -> dict[tuple[str, str], float]:
    """Seconds by (op, name) of the cases that torch has a kernel of its own for; none where torch is not installed. python: whose torch."""
    asked = [
        {"op": case.op, "name": case.name, "arrays": [[list(a.shape), str(a.dtype)] for a in jax.tree.leaves(case.args)]}
        for case in cases
        if all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(case.args)) and "gradients" not in case.name
    ]
    done = subprocess.run(
        [python or os.environ.get("TORCH_PYTHON", sys.executable), str(TORCH), "--device", device],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"torch is left out: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    return {(row["op"], row["name"]): row["seconds"] for row in json.loads(done.stdout)}
