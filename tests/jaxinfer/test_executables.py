"""Executables: written by `jaxinfer compile`, loaded by a start that compiles nothing, refused where they do not fit."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_llama import TinyModel, check, tokens_of

import jaxinfer
from jaxinfer import SamplingParams, cli, executables, programs
from jaxinfer.errors import ExecutablesError
from pallas_kernels import registry

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 17, 3, 88], [60]]
PARAMS = SamplingParams(max_tokens=6)
CONFIG = {"inference_max_tokens": 32, "micro_batch_size": 1}
TWO = {"engine": {"tensor_parallel_size": 2}}

# A start from nothing: counts what jax compiles and traces, and says what the engine says.
FRESH = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
names = []
def listen(event, duration, **details):
    if "compile" in event or "trace" in event:
        names.append(str(details.get("fun_name")))
jax.monitoring.register_event_duration_secs_listener(listen)
import jaxinfer
folder, prompts, configs = json.loads(sys.argv[1])
params = jaxinfer.SamplingParams(max_tokens=6)
found = []
for config in configs:
    with jaxinfer.init_inference(folder, config) as engine:
        tokens = [r.token_ids for r in engine.generate(prompts, params)]
        stream = engine.stream(prompts[0], params)
        next(stream)
        stream.close()
        logprobs = engine.score(prompts[0]).logprobs if "engine" not in config else None
        found.append([tokens, logprobs])
print(json.dumps([found, [name for name in names if name != "<lambda>"]]))  # shapes of a module's parameters
"""


@pytest.fixture(scope="module")
def model(tiny_model) -> TinyModel:
    """Of a size that no other test has: executables that are loaded serve all engines of one model in a process."""
    return tiny_model(vocab_size=103, num_hidden_layers=2)


@pytest.fixture(scope="module", autouse=True)
def user(tmp_path_factory) -> Path:
    """The user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def compiled_model(model, tmp_path_factory) -> Path:
    """A copy of the model with executables beside it, for one device and for two."""
    folder = tmp_path_factory.mktemp("compiled") / "model"
    shutil.copytree(model.folder, folder)
    sizes = ["--prompt-tokens", "16", "--new-tokens", "6", "--max-length", "32", "--micro-batch-size", "1", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxinfer.engine.SCORE_ROWS", 1)
        assert cli.main(["compile", str(folder), *sizes]) == 0
        assert cli.main(["compile", str(folder), *sizes, "--without-scores", "--tp", "2"]) == 0
    return folder


@pytest.fixture
def fresh_programs(monkeypatch) -> None:
    monkeypatch.setattr(programs, "_shared", type(programs._shared)())


@pytest.fixture
def changed(compiled_model, tmp_path, fresh_programs) -> Callable[..., Path]:
    """changed(edit): a copy of the checkpoint whose manifest `edit` changed, not signed again; of the executables for one device."""

    def make(edit: Callable[[dict], object]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(compiled_model, folder)
        [manifest] = folder.glob("executables/cpu-single-*/executables.json")
        values = json.loads(manifest.read_text())
        edit(values)
        manifest.write_text(json.dumps(values))
        return folder

    return make


def engine_of(folder: Path, **keys) -> jaxinfer.Engine:
    return jaxinfer.init_inference(folder, CONFIG | keys)


@pytest.mark.slow
def test_a_fresh_process_compiles_nothing(compiled_model, model) -> None:
    """On one device and on a mesh, with donated states; and says what an engine says that compiles."""
    configs = [CONFIG, CONFIG | TWO]
    given = json.dumps([str(compiled_model), PROMPTS, configs])
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, "-c", FRESH, given], env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    found, names = json.loads(child.stdout)
    assert names == []
    with engine_of(model.folder) as engine:
        expected = tokens_of(engine.generate(PROMPTS, PARAMS))
        np.testing.assert_allclose(found[0][1][1:], engine.score(PROMPTS[0]).logprobs[1:], rtol=1e-5)
    assert [tokens for tokens, _ in found] == [expected, expected]


def test_what_is_written(compiled_model, user) -> None:
    folders = sorted(path.name for path in (compiled_model / "executables").iterdir())
    assert len(folders) == 2 and folders[0].startswith("cpu-single-") and folders[1].startswith("cpu-tensor2-")
    manifest = json.loads((compiled_model / "executables" / folders[1] / "executables.json").read_text())
    assert manifest["identity"]["mesh"] == {"data": 1, "stage": 1, "expert": 1, "tensor_hosts": 1, "tensor": 2}
    assert {entry["name"] for entry in manifest["programs"]} == {"state", "prefill", "insert", "decode", "free"}
    key = user / "jaxinfer" / "executables.key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32


def test_loaded_executables_are_shared_and_need_not_be_there(compiled_model, compiled, fresh_programs) -> None:
    with engine_of(compiled_model) as engine:
        assert not compiled
        expected = tokens_of(engine.generate(PROMPTS, PARAMS))
        assert not compiled
    with engine_of(compiled_model, executables=False) as engine:  # of the same programs: they have what was loaded
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected and not compiled
    with engine_of(compiled_model) as engine:
        engine.generate([1] * 20, PARAMS)  # of another size
        assert sorted(compiled) == ["jit(insert)", "jit(prefill)"]


def test_false_ignores_them(changed, compiled) -> None:
    folder = changed(lambda m: m["environment"].update(jax="0.1"))
    with engine_of(folder, executables=False) as engine:
        engine.generate(PROMPTS[0], PARAMS)
    assert "jit(decode)" in compiled


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["environment"].update(jax="0.1.2"), ["jax: made with 0.1.2, here it is 0."]),
        (lambda m: m["environment"].update(jaxinfer="9.9"), ["jaxinfer: made with 9.9"]),
        (lambda m: m["environment"].update(sources="0"), ["sources"]),
        (lambda m: m["environment"].update(device_kind="TPU"), ["device_kind: made with TPU, here it is cpu"]),
        (lambda m: m["environment"]["cpu_features"].append("avx9000"), ["cpu_features: made with avx9000"]),
        (lambda m: m["environment"]["operations"].update(mlp_block=["mine"]), ["operations.mlp_block"]),
        (lambda m: m.update(format_version=2), ["format_version 2, not 1"]),
        (lambda m: m.pop("programs"), ["has no programs"]),
        (lambda m: m["programs"][0].update(name="no_such"), ["is damaged"]),
        (lambda m: m["programs"][0]["result"].update({"class": "os:system"}), ["os:system is no result"]),
    ],
    ids=["jax", "jaxinfer", "sources", "device", "cpu", "operations", "format", "no programs", "no such program", "no result"],
)
def test_what_does_not_fit_is_refused(changed, edit, words) -> None:
    folder = changed(edit)
    with pytest.raises(ExecutablesError) as error:
        engine_of(folder, executables=str(folder / "executables"))
    check(error, *words, "executables=False")


def test_a_users_function_under_a_known_name_is_seen(compiled_model, fresh_programs) -> None:
    """However it is wrapped; and what was there before, put back, fits again."""
    before = next(i for i in registry.implementations("rms_norm") if i.name == "reference")
    put = functools.partial(registry.register, "rms_norm", "reference", supports=before.supports, replace=True)
    own = lambda *arguments, **keywords: before.function(*arguments, **keywords)
    try:
        for function in (own, functools.partial(before.function), functools.wraps(before.function)(own), jax.jit(own)):
            put(function)
            with pytest.raises(ExecutablesError) as error:
                engine_of(compiled_model)
            check(error, "operations.rms_norm: made without reference (", "and with reference;", "compile` again")
    finally:
        put(before.function, priority=before.priority)
    engine_of(compiled_model).close()


def test_what_another_user_made_is_not_taken_by_itself(changed, compiled) -> None:
    folder = changed(lambda m: m["config"].update(inference_max_tokens=33))
    with pytest.raises(ExecutablesError) as error:
        engine_of(folder)
    check(error, "was not made by this user", f"executables='{folder}/executables'")
    with engine_of(folder, executables=folder / "executables") as engine:  # who names it answers for it
        engine.generate(PROMPTS, PARAMS)
    assert not compiled


def test_damaged_files_are_refused(changed) -> None:
    folder = changed(lambda m: None)
    for path in folder.glob("executables/cpu-single-*/*.bin"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with (
        engine_of(folder, executables=folder / "executables") as engine,
        pytest.raises(ExecutablesError, match="not what was written"),
    ):
        engine.generate(PROMPTS[0], PARAMS)


def test_executables_for_something_else(compiled_model, tmp_path, compiled, fresh_programs) -> None:
    """Beside the checkpoint they are passed over; those that are asked for must fit."""
    with engine_of(compiled_model, dtype="bfloat16") as engine:
        assert not any(program.ready for program in engine.programs.built.values())
    with pytest.raises(ExecutablesError) as error:
        engine_of(compiled_model, dtype="bfloat16", executables=compiled_model / "executables")
    check(
        error, "the nearest differ", "weights.layers[0].attention.qkv[0]: made with float32[1, 120, 72]", "bfloat16[1, 120, 72]"
    )
    with pytest.raises(ExecutablesError, match="holds no executables"):
        engine_of(compiled_model, executables=tmp_path)
    with pytest.raises(ExecutablesError, match="the nearest differ"):
        engine_of(compiled_model, dtype="bfloat16", executables=True)


def test_pickles_name_nothing_but_arrays() -> None:
    class Harmful:
        def __reduce__(self):
            return os.system, ("true",)

    program = programs.Program(
        "p", {}, programs.Recipe(function=lambda: 0, inputs=(), outputs=None), mesh=_mesh(), weights=False
    )
    with pytest.raises(ExecutablesError, match=r"posix\.system"):
        executables._load(pickle.dumps(Harmful()), program)
    with pytest.raises(ExecutablesError, match="cannot be loaded"):
        executables._load(b"nothing", program)


def test_a_failure_leaves_what_was_there(compiled_model, monkeypatch, capsys) -> None:
    """A compilation that breaks off, and the folder of one that was killed."""
    folder = compiled_model / "executables"
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    [own] = folder.glob("cpu-single-*")
    left = folder / f".{own.name}.partial-999999999-abcd"
    left.mkdir()
    monkeypatch.setattr("jaxinfer.ahead.Need.compile", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["compile", str(compiled_model), "--prompt-tokens", "16", "--max-length", "32", "--micro-batch-size", "1"])
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_compile_refuses_wrong_usage(compiled_model, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compile", str(compiled_model), "--batch", "0"])
    assert "--batch needs numbers of at least 1" in capsys.readouterr().err


def _mesh():
    from sharding.mesh import make_mesh

    return make_mesh()
