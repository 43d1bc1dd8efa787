"""`jaxinfer bench`: what it measures, and the layout that it promises."""

from __future__ import annotations

import json

import golden_weights
import numpy as np
import pytest

from jaxinfer import cli
from jaxinfer.layout import make_plan
from jaxinfer.loading import open_source
from jaxinfer.measuring import Spread, timed
from pallas_kernels.head_argmax import sketch_refusal
from sharding.mesh import make_mesh

SIZES = [
    "--prompt-tokens",
    "16",
    "--batch",
    "2",
    "--context",
    "16",
    "--tokens",
    "2",
    "--repetitions",
    "2",
    "--max-length",
    "128",
]


@pytest.fixture(scope="module")
def folder(tiny_model):
    return str(tiny_model(num_hidden_layers=2).folder)


def check_spread(spread: dict) -> None:
    assert spread.keys() == {"median", "min", "max", "count"}
    assert 0 < spread["min"] <= spread["median"] <= spread["max"] and spread["count"] == 2


@pytest.mark.slow
def test_json(folder, capsys) -> None:
    assert cli.main(["bench", folder, *SIZES, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format_version"] == 2 and facts["source"] == folder and facts["platform"] == "cpu" and facts["devices"] == 1
    assert (
        facts["mesh"]["tensor"] == 1
        and facts["cores"] >= 1
        and facts["processor"]
        and facts["versions"].keys() >= {"jax", "jaxlib"}
    )
    assert 1e8 < facts["bandwidth_bytes_per_second"] < 1e13
    # two layers and the head, as float32; of the embedding one row is read, and where there is a sketch, it instead of the head
    layer = 72 * (72 + 2 * 24 + 72 + 3 * 96 + 2)
    head = 97 * 72 * 4 if sketch_refusal(np.empty((97, 72), np.float32), 72) else 4 * (3 * 704 + 3 * 32 * 4)
    assert facts["weight_bytes"] == 4 * (2 * layer + 72) + head

    [prefill] = facts["prefill"]
    assert (prefill["tokens"], prefill["sequences"]) == (16, 1)
    check_spread(prefill["seconds"])
    assert prefill["tokens_per_second"]["median"] == pytest.approx(16 / prefill["seconds"]["median"])

    assert [d["sequences"] for d in facts["decode"]] == [2]
    for decode in facts["decode"]:
        check_spread(decode["seconds_per_step"])
        assert (decode["context"], decode["cache"], decode["steps"]) == (16, 128, 2)
        assert decode["tokens_per_second"]["max"] == pytest.approx(decode["sequences"] / decode["seconds_per_step"]["min"])
        # the second and third pair of tokens after the context are timed: 20 cached tokens on average, keys and values in 3 heads of 8
        cached = decode["sequences"] * 20 * 2 * 2 * 3 * 8 * 4
        assert decode["bytes_per_step"] == decode["weight_bytes"] + cached and decode["weight_bytes"] == facts["weight_bytes"]
        assert decode["bytes_per_second"]["median"] == pytest.approx(
            decode["bytes_per_step"] / decode["seconds_per_step"]["median"]
        )
        share = decode["bytes_per_second"]["median"] / facts["bandwidth_bytes_per_second"]
        assert decode["share_of_bandwidth"]["median"] == pytest.approx(share)

    kinds = [(e["block"], e["phase"], e["sequences"], e["tokens"]) for e in facts["layers"]]
    assert kinds == [(block, *sizes) for sizes in (("decode", 2, 1), ("prefill", 1, 16)) for block in ("attention", "mlp")]
    for entry in facts["layers"]:
        check_spread(entry["seconds"])
    assert sum(e["weight_bytes"] for e in facts["layers"][:2]) == 4 * layer


def test_tables(folder, capsys) -> None:
    assert cli.main(["bench", folder, *SIZES, "--without-layers"]) == 0
    out = capsys.readouterr().out
    assert "prefill" in out and "16 tokens" in out and "share" in out and "one layer" not in out


@pytest.mark.slow
def test_a_mesh(folder, capsys) -> None:
    """Two stages and two copies: the least state holds four sequences, and its weights are read four times."""
    arguments = ["--pp", "2", "--dp", "2", "--batch", "3", "--without-layers", "--json"]
    assert cli.main(["bench", folder, *SIZES, *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["devices"] == 4 and facts["prefill"][0]["sequences"] == 2
    assert facts["decode"][0]["sequences"] == 4


@pytest.mark.slow
def test_per_layer(tmp_path, capsys) -> None:
    """Every layer, with a window or without, on two stages: as JSON from which a pipeline is planned, and as a table."""
    folder = golden_weights.write_case_folder(golden_weights.load_case("gemma2"), tmp_path / "gemma2")
    sizes = ["--pp", "2", "--batch", "2", "--context", "16", "--repetitions", "2", "--max-length", "64", "--per-layer"]
    assert cli.main(["bench", str(folder), *sizes, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format_version"], facts["source"], facts["context"]) == (1, str(folder), 16) and facts["mesh"]["stage"] == 2
    found = [(e["layer"], e["stage"], e["kind"], e["window"], e["sequences"]) for e in facts["layers"]]
    assert found == [(0, 0, "dense", 6, 2), (1, 0, "dense", None, 2), (2, 1, "dense", 6, 2)]
    for entry in facts["layers"]:
        check_spread(entry["seconds"])
    times = [entry["seconds"]["median"] for entry in facts["layers"]]
    assert make_plan(open_source(folder).config, make_mesh(stage=3), costs=times).counts == (1, 1, 1)
    assert cli.main(["bench", str(folder), *sizes]) == 0
    out = capsys.readouterr().out
    assert "each layer by itself" in out and out.count("dense, window 6") == 2


def test_what_does_not_fit_is_refused(folder, capsys) -> None:
    assert cli.main(["bench", folder, *SIZES, "--prompt-tokens", "4096"]) == 1
    assert "--prompt-tokens need 4096 tokens, inference_max_tokens is 128" in capsys.readouterr().err
    assert cli.main(["bench", folder, *SIZES, "--per-layer", "--context", "4096"]) == 1
    assert "--context needs 4096 tokens, inference_max_tokens is 128" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", folder, "--batch", "0"])
    assert "--batch needs numbers of at least 1" in capsys.readouterr().err


def test_spread() -> None:
    spread = Spread.of([2.0, 1.0, 4.0])
    assert spread.to_dict() == {"median": 2.0, "min": 1.0, "max": 4.0, "count": 3}
    assert spread.each(lambda s: 1 / s).to_dict() == {"median": 0.5, "min": 0.25, "max": 1.0, "count": 3}
    calls: list[int] = []
    assert timed(lambda: calls.append(1), 3).count == 3 and len(calls) == 4


@pytest.mark.slow
def test_start(folder, capfd) -> None:
    """Fresh processes, and a second engine in each that makes no program. What is wrong with the source is said once."""
    assert cli.main(["bench", folder, "--start", "--repetitions", "2", "--json", "--max-length", "64"]) == 0
    facts = json.loads(capfd.readouterr().out)
    for name in ("first_token_seconds", "load_seconds", "second_engine_seconds"):
        check_spread(facts[name])
    assert facts["source"] == folder and facts["second_engine_programs"] == 0
    assert facts["second_engine_seconds"]["median"] < facts["first_token_seconds"]["median"]
    assert facts["load_seconds"]["median"] < facts["first_token_seconds"]["median"]
    assert cli.main(["bench", f"{folder}/none.gguf", "--start"]) == 1
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("error:") == 1 and "neither a path that exists" in said.err
