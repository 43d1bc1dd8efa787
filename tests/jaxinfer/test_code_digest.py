"""Digests of functions: alike for the same code and bound values in any process, different for all else."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from jaxinfer.code_digest import code_digest, is_plain
from pallas_kernels import registry

SOURCE = """
import functools, numpy as np
def scaled(by, table=(1, frozenset(["a", "b"]))):
    def run(x):
        return x * by + len(table)
    return run
class Adder:
    def __init__(self, n): self.n = np.full(2, n)
    def __call__(self, x): return x + self.n
"""


def made(source: str = SOURCE, name: str = "users_kernels") -> dict:
    space: dict = {"__name__": name}
    exec(compile(source, name, "exec"), space)
    return space


def test_what_differs_is_seen() -> None:
    space = made()
    scaled, adder = space["scaled"], space["Adder"]
    functions = [
        scaled(2),
        scaled(3),
        scaled(2, table=()),
        functools.partial(scaled(2), 1),
        functools.partial(scaled(2), x=1),
        adder(1),
        adder(2),
        adder(1).__call__,
        scaled,
        made(SOURCE.replace("x * by", "x - by"))["scaled"](2),
        made(SOURCE.replace('"b"', '"c"'))["scaled"],
    ]
    assert len({code_digest(f) for f in functions}) == len(functions)
    assert code_digest(scaled(2)) == code_digest(made()["scaled"](2)) == code_digest(jax.jit(scaled(2)))
    assert code_digest(adder(1)) == code_digest(made()["Adder"](1))
    assert code_digest(scaled(2), scaled(3)) != code_digest(scaled(3), scaled(2))


def test_another_process_finds_the_same(tmp_path: Path) -> None:
    program = (
        f"exec({SOURCE!r}, globals()); from jaxinfer.code_digest import code_digest; print(code_digest(scaled(2), Adder(1)))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]


def test_the_file_of_a_function_counts(tmp_path: Path, monkeypatch) -> None:
    """What it calls by a global name stands there."""
    monkeypatch.syspath_prepend(tmp_path)
    seen = set()
    for number in (1, 2):
        name = f"kernels_of_a_user_{number}"
        (tmp_path / f"{name}.py").write_text(f"def helper(x):\n    return x + {number}\ndef run(x):\n    return helper(x)\n")
        seen.add(code_digest(__import__(name).run))
    assert len(seen) == 2


def test_what_is_plain() -> None:
    folders = {"pallas_kernels": Path(registry.__file__).parent}
    assert is_plain(registry.register, folders) and is_plain(registry._everywhere, folders)
    own = lambda x: x
    for function in (own, functools.partial(registry.register), functools.wraps(registry.register)(own), jax.jit(own), np.add):
        assert not is_plain(function, folders)
    mine = registry.register_file("of_a_user", "mine", "os.path")
    try:
        assert not is_plain(mine.function, folders) and not is_plain(mine.supports, folders)
    finally:
        registry.unregister("of_a_user", "mine")
