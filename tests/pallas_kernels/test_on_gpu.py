"""On a GPU: every case of the kernel report, at the size of a real model, against the reference on the same device."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import ON_GPU

from pallas_kernels.registry import using

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no GPU here")]
BENCH = Path(__file__).parents[2] / "scripts" / "bench"
TOLERANCE = 2e-2  # of the largest value: two roundings to bfloat16
CHOSEN = ("sample", "route")  # tokens and experts, of which a rounding may choose another


def test_cases_of_the_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    from kernel_peers import KERNELS, written
    from kernel_report import drawn

    from pallas_kernels.cases import cases

    wrong = []
    for case in cases():
        if case.op in CHOSEN or written(case) > 1 << 31:
            continue
        operands = drawn(case)
        found = jax.jit(lambda *args, case=case: case.run(*args))(*operands)
        with using(without=KERNELS):
            wanted = jax.jit(lambda *args, case=case: case.run(*args))(*operands)
        for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            step = 1 if jnp.issubdtype(w.dtype, jnp.integer) else TOLERANCE * float(jnp.abs(w.astype(jnp.float32)).max())
            error = float(np.abs(np.asarray(f, np.float32) - np.asarray(w, np.float32)).max(initial=0))
            if not error <= step:
                wrong.append(f"{case.op} {case.name}: {error} and not {step}")
    assert not wrong, "\n".join(wrong)
