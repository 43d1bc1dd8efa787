"""jaxinfer tune: the tiles that a model's programs ask for, measured with a clock that is made up, or compiled only."""

import json

import jax
import pytest

from jaxinfer import cli, tuning
from jaxinfer.ahead import Traffic
from jaxinfer.config import EngineConfig
from jaxinfer.errors import BackendError, ConfigError
from pallas_kernels.target import interpreting
from pallas_kernels.tuning import forget, tile_for, user_folder

TRAFFIC = Traffic(prompt_tokens=(32,), new_tokens=(8,), scores=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The user's cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


@pytest.mark.slow
def test_tiles_of_a_model_are_measured_and_taken(tiny, here, monkeypatch):
    config = EngineConfig.load({"inference_max_tokens": 64, "micro_batch_size": 1, "dtype": "bfloat16"})
    tasks = tuning.tasks(tiny.folder, config, TRAFFIC, gpu="h100")
    assert {"norm", "quant_matmul", "attention", "rope_cache"} <= {task.op for task in tasks}
    assert len({(task.op, *task.key.items()) for task in tasks}) == len(tasks)
    norms = tuning.tasks(tiny.folder, config, TRAFFIC, ops=["norm"], gpu="h100")
    assert norms and {task.op for task in norms} == {"norm"}
    pairs = tuning.tasks(tiny.folder, config, TRAFFIC, ops=["softmax", "route"], gpu="h100")  # which this model has none of
    assert {task.op for task in pairs} == {"softmax", "route"}
    with pytest.raises(ConfigError, match=r"convolution: no tile of that operation is asked for; there are .*quant_matmul"):
        tuning.tasks(tiny.folder, config, TRAFFIC, ops=["convolution"], gpu="h100")

    with pytest.raises(BackendError, match="measured on an NVIDIA GPU, and the device here is a cpu"):
        tuning.measure(norms, user_folder())
    monkeypatch.setattr(tuning, "check_gpu", lambda: jax.local_devices()[0])
    calls: list[int] = []
    timer = lambda executable, operands: calls.append(1) or (1.0 if len(calls) == 3 else 2.0)
    with interpreting():
        (tuned,) = tuning.measure(norms[:1], user_folder(), timer=timer, repeats=1)
    assert len(calls) > 3 and tuned.candidates[0].tile != norms[0].default
    assert json.loads((user_folder() / "v1" / "cpu" / "norm.json").read_text())["entries"][0]["key"] == norms[0].key
    assert tile_for("norm", norms[0].default, **norms[0].key) == tuned.candidates[0].tile


def test_what_the_command_refuses(capsys):
    assert cli.main(["tune"]) == 1
    assert "--compile-only CARD lists the legal ones of a GPU that is not here" in capsys.readouterr().err
    for arguments, reason in (
        (["--compile-only", "k80"], "there are a100, h100, b200"),
        (["--compile-only", "h100", "--output", "x"], "measures nothing"),
        (["--batch", "0"], "--batch needs numbers of at least 1"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["tune", *arguments])
        assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_the_shapes_of_llama_without_a_gpu(here, capsys):
    arguments = ["--op", "norm", "--dtype", "bfloat16", "--prompt-tokens", "32"]
    assert cli.main(["tune", *arguments, "--compile-only", "a100", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["key"]["width"] == 4096 and found["candidates"][0]["tile"] == found["default"]
    assert all(c["kernels"][0]["registers"] > 0 for c in found["candidates"] if c["refusal"] is None)
    assert cli.main(["tune", *arguments, "--compile-only", "a100"]) == 0
    assert "(the default)" in capsys.readouterr().out
