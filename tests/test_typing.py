"""What a type checker, or an editor, knows of a user's program: the public names, and what the calls give."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxinfer

ROOT = Path(__file__).parents[1]
PACKAGES = ("convert", "jaxinfer", "pallas_kernels", "sharding")

RIGHT = """
import jaxinfer
from jaxinfer import GenerationResult, SamplingParams

engine = jaxinfer.init_inference("demo", {"inference_max_tokens": 64})
params = SamplingParams(max_tokens=8, temperature=0.8, logit_bias={5: 1.0}, stop=("\\n",))
one: GenerationResult = engine.generate("The capital of France is", params)
print(one.text.upper(), one.token_ids[0] + 1, one.finish_reason)
ids: GenerationResult = engine.generate([1, 2, 3])
several: list[GenerationResult] = engine.generate(["One", "Two"], [params, params])
rows: list[GenerationResult] = engine.generate([[1, 2], [3]])
for piece in engine.stream("Once", params):
    print(piece.text, end="")
print(engine.score("Paris").total_logprob, engine.score(["a", "b"])[0].logprobs[0])
print(engine.chat([{"role": "user", "content": "Hi"}]).text)


async def many() -> str:
    results = await engine.agenerate(["a", "b"], params)
    return results[0].text + (await engine.agenerate("a")).text


def refuse(error: jaxinfer.errors.TokenLimitError) -> str:
    return str(error)


model: jaxinfer.Decoder = jaxinfer.load_model("demo", dtype="float32")
layers: int = model.config.layers
"""
# each line is wrong, and would not be found without types
WRONG = """
import jaxinfer

engine = jaxinfer.init_inference("demo")
engine.generate("text").token_ids + 1
engine.generate(["a", "b"]).text
engine.no_such_call()
jaxinfer.SamplingParams(max_token=5)
jaxinfer.no_such_name
jaxinfer.SamplingParams(temperature="warm")
"""


def check(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """mypy over a program, as a user's project would run it."""
    path = folder / "program.py"
    path.write_text(program)
    command = [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--ignore-missing-imports", str(path)]
    env = os.environ | {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(folder.parent / "mypy")}
    return subprocess.run([*command, "--explicit-package-bases"], env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_users_program(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    right = check(RIGHT, tmp_path)
    assert right.returncode == 0, right.stdout
    wrong = check(WRONG, tmp_path)
    found = {int(line.split(":")[1]) for line in wrong.stdout.splitlines() if "error:" in line}
    assert found == set(range(5, 11)), wrong.stdout


def test_the_stub_names_what_is_imported_lazily() -> None:
    """Each public name, from where it really is."""
    stub = ast.parse((ROOT / "jaxinfer" / "__init__.pyi").read_text("utf-8"))
    named = {a.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(named) == set(jaxinfer.__all__)
    homes = {name: f"jaxinfer.{home}" for name, home in jaxinfer._HOME.items()} | {"errors": "jaxinfer"}
    assert named == homes


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_have_types(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text("utf-8")
