"""`jaxinfer profile`: which part of the model an instruction is of, whose time is whose, and a real trace."""

from __future__ import annotations

import json

import pytest

from jaxinfer import cli
from jaxinfer.profiling import Module, Operation, Scope, Trace, attribute, scope_of

HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused_computation (param_0: f32[4]) -> f32[4] {
  %param_0 = f32[4]{0} parameter(0)
  ROOT %multiply.1 = f32[4]{0} multiply(%param_0, %param_0), metadata={op_name="jit(step)/while/body/layer_1/jit(layer)/mlp_block/up/mul"}
}

%body (arg: (f32[4], s32[])) -> (f32[4], s32[]) {
  %arg = (f32[4]{0}, s32[]) parameter(0)
  %gte = f32[4]{0} get-tuple-element(%arg), index=0
  %fusion.7 = f32[4]{0} fusion(%gte), kind=kLoop, calls=%fused_computation
  %dot.2 = f32[4]{0} dot(%fusion.7, %gte), metadata={op_name="jit(step)/while/body/layer_0/jit(layer)/attention_block/qkv/dot_general"}
  %dot.4 = f32[4]{0} dot(%dot.2, %gte)
  %add.6 = f32[4]{0} add(%dot.4, %gte), metadata={op_name="jit(step)/while/body/layer_0/jit(layer)/attention_block/out/add"}
  ROOT %tuple = (f32[4]{0}, s32[]) tuple(%add.6, %gte)
}

ENTRY %main.9 (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0), metadata={op_name="x"}
  %copy.3 = f32[4]{0} copy(%x)
  %while.1 = (f32[4]{0}, s32[]) while(%copy.3), condition=%cond, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %get.5 = f32[4]{0} get-tuple-element(%while.1), index=0
}
"""


@pytest.mark.parametrize(
    ("op_name", "path", "layer"),
    [
        ("jit(decode)/while/body/layer_12/jit(layer)/attention_block/norm/mul", "layers/attention_block/norm", 12),
        (
            "jit(prefill)/layer_0/jit(layer)/attention_block/attention/bkqs,bksh->bkqh/dot_general",
            "layers/attention_block/attention",
            0,
        ),
        ("jit(prefill)/layer_0/a/transpose;attention_block/attention/transpose", "layers/a", 0),
        ("attention_block/norm/reduce_sum", "layers/attention_block/norm", None),
        ("jit(decode)/while/body/sample/cond/branch_1_fun/jit(_where)/select_n", "sample", None),
        ("jit(decode)/shard_map/head/dot_general", "head", None),
    ],
)
def test_parts_by_name(op_name, path, layer) -> None:
    assert scope_of(op_name) == Scope(path=path, layer=layer)


@pytest.mark.parametrize("op_name", ["jit(decode)/while/body/cos", "arguments[0].layers[0].mlp.down", "add", ""])
def test_no_part(op_name) -> None:
    assert scope_of(op_name) is None


def test_modules() -> None:
    module = Module.parse(HLO)
    assert module.name == "jit_step" and module.containers == {"while.1"}
    assert module.scopes["dot.2"] == Scope(path="layers/attention_block/qkv", layer=0)
    assert module.scopes["fusion.7"] == Scope(path="layers/mlp_block/up", layer=1)  # of what it holds
    assert module.scopes["dot.4"] == Scope(path="layers/attention_block", layer=0)  # between qkv and out
    assert module.scopes["copy.3"] == Scope(path="other")


def test_every_instant_is_shared_out() -> None:
    """Two instructions side by side, a loop that holds them, a gap, another program, and what is outside of the window."""
    ran = [("while.1", 10, 60), ("dot.2", 10, 30), ("fusion.7", 20, 40), ("copy.3", 50, 60), ("dot.2", 200, 300)]
    operations = [Operation(name, "jit_step", start, end) for name, start, end in ran]
    operations.append(Operation("add", "jit_other", 60, 70))
    trace = Trace(operations=operations, windows={"decode": [(0, 100)], "prefill": [(200, 250), (260, 280)]})
    found = attribute(trace, "decode", [Module.parse(HLO)])
    assert found.wall == 100
    assert found.scopes == {"layers/attention_block/qkv": 15, "layers/mlp_block/up": 15, "other": 10, "program other": 10}
    assert found.layers == {0: 15, 1: 15}
    assert found.between == 10 and found.outside == 40 and found.accounted == 0.5
    found = attribute(trace, "prefill", [Module.parse(HLO)])
    assert found.wall == 70 and found.scopes == {"layers/attention_block/qkv": 70} and found.outside == found.between == 0


@pytest.fixture(scope="module")
def folder(tiny_model):
    return str(tiny_model(num_hidden_layers=2).folder)


@pytest.mark.slow
def test_a_real_trace(folder, tmp_path, capsys) -> None:
    out = tmp_path / "trace"
    # a native kernel is half a layer in one operation, and has no parts to tell apart
    sizes = ["--prompt-tokens", "16", "--batch", "1", "--tokens", "4", "--max-length", "128", "--kernels", "xla"]
    assert cli.main(["profile", folder, *sizes, "--output", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["trace"] == str(out) and facts["platform"] == "cpu"
    assert list(out.glob("plugins/profile/*/*.xplane.pb")) and list(out.glob("plugins/profile/*/*.trace.json.gz"))
    prefill, decode = facts["phases"]
    assert (prefill["phase"], prefill["tokens"], prefill["steps"]) == ("prefill", 16, 3)
    assert (decode["phase"], decode["tokens"], decode["steps"]) == ("decode", 1, 4)
    for phase in (prefill, decode):
        parts = {"head", "sample", "layers/attention_block/attention", "layers/mlp_block/down"}
        assert parts <= phase["scopes"].keys()
        assert set(phase["layers"]) == {"0", "1"}
        named = sum(phase["scopes"].values())
        assert named + phase["between_operations_seconds"] + phase["outside_seconds"] == pytest.approx(phase["wall_seconds"])
        assert phase["accounted"] == pytest.approx(named / phase["wall_seconds"])
        assert 0 < sum(phase["layers"].values()) < named
        assert phase["scopes"].get("other", 0) < named / 2


def test_table(folder, tmp_path, capsys) -> None:
    sizes = ["--prompt-tokens", "16", "--tokens", "4", "--max-length", "128", "--layers"]
    assert cli.main(["profile", folder, *sizes, "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in ("decode: 1 tokens of 1 sequences", "attention_block", "between operations", "outside of programs", "layer 1"):
        assert words in text


def test_too_many_tokens_are_refused(folder, tmp_path, capsys) -> None:
    arguments = ["--prompt-tokens", "100", "--tokens", "20", "--max-length", "128", "--output", str(tmp_path / "none")]
    assert cli.main(["profile", folder, *arguments]) == 1
    assert "need 141, inference_max_tokens is 128" in capsys.readouterr().err and not (tmp_path / "none").exists()
