"""`jaxinfer score`: its numbers are those of the engine and of a forward pass, its windows those of the stated protocol."""

import io
import json
import math
import re
import sys

import jax
import numpy as np
import pytest
from speaking import QUICK, write_model

import jaxinfer
from jaxinfer import cli
from jaxinfer.cli import score
from jaxinfer.requests import ScoreResult

TEXT = "Hello, world"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("score") / "talker")


@pytest.fixture(scope="module")
def engine(folder):
    return jaxinfer.init_inference(folder, {"inference_max_tokens": QUICK[1], "micro_batch_size": 1})


@pytest.fixture
def run(capsys, monkeypatch, engine, folder):
    """run(*arguments): status, stdout and stderr of a score on the one engine, limited to the tokens that its configuration says."""

    def init_inference(source, config, *, progress):
        monkeypatch.setattr(engine, "config", config)
        return engine

    monkeypatch.setattr("jaxinfer.api.init_inference", init_inference)

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(["score", str(folder), *map(str, (*QUICK, *arguments))])
        return status, *capsys.readouterr()

    return call


def test_numbers_are_those_of_a_forward_pass(run, folder):
    status, out, err = run("--text", TEXT, "--tokens", "--json")
    assert status == 0, err
    found = json.loads(out)
    [text] = found["texts"]
    ids = [row["token_id"] for row in text["scores"]]
    model = jaxinfer.load_model(folder)
    logits = np.asarray(jax.nn.log_softmax(model(np.asarray([ids]))[0]))
    expected = [float(logits[i, token]) for i, token in enumerate(ids[1:])]
    assert text["scores"][0]["logprob"] is None and text["scores"][0]["greedy_token_id"] is None
    np.testing.assert_allclose([row["logprob"] for row in text["scores"][1:]], expected, atol=1e-4)
    assert [row["greedy_token_id"] for row in text["scores"][1:]] == logits[:-1].argmax(-1).tolist()
    assert "".join(row["text"] for row in text["scores"]) == TEXT

    assert text["tokens"] == len(ids) and text["scored_tokens"] == len(ids) - 1 and text["left_out_tokens"] == 0
    assert math.isclose(text["total_logprob"], sum(expected), abs_tol=1e-3)
    assert math.isclose(text["perplexity"], math.exp(-sum(expected) / len(expected)), rel_tol=1e-3)
    assert found["total"] == {key: text[key] for key in ("total_logprob", "nll", "perplexity")}


@pytest.mark.slow
def test_a_long_file_is_cut_into_windows(run, engine, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("The quick brown fox, and so on. " * 10)
    status, out, err = run("--file", file, "--window", 50, "--json", "--tokens")
    assert status == 0, err
    [text] = json.loads(out)["texts"]
    ids = engine.tokenizer.encode(file.read_text(), add_special=False)
    assert len(ids) == 320 == text["tokens"]
    assert text["windows"] == 6 and text["left_out_tokens"] == 20 and text["scored_tokens"] == 6 * 49
    windows = [ids[i : i + 50] for i in range(0, 300, 50)]
    expected = [result.logprobs for window in windows for result in [engine.score(window)]]
    found = [[row["logprob"] for row in text["scores"] if row["window"] == n] for n in range(6)]
    for one, other in zip(found, expected, strict=True):
        assert one[0] is other[0] is None
        np.testing.assert_allclose(one[1:], other[1:], atol=1e-4)
    assert math.isclose(text["nll"], -np.mean([p for window in expected for p in window[1:]]), rel_tol=1e-4)

    few = json.loads(run("--file", file, "--window", 50, "--windows", 2, "--json")[1])
    assert few["window"] == 50 and few["texts"][0]["windows"] == 2 and few["texts"][0]["left_out_tokens"] == 220
    out = run("--file", file, "--window", 50, "--windows", 2)[1]
    assert "98 tokens, 220 at the end left out" in out


def test_several_texts_have_a_total(run):
    found = json.loads(run("--text", TEXT, "--ids", "5,6,7", "--json")[1])
    assert [t["name"] for t in found["texts"]] == ["text 1", "text 2"] and found["texts"][1]["tokens"] == 3
    assert math.isclose(found["total"]["total_logprob"], sum(t["total_logprob"] for t in found["texts"]))
    count = sum(t["scored_tokens"] for t in found["texts"])
    assert math.isclose(found["total"]["nll"], -found["total"]["total_logprob"] / count)
    status, out, _ = run("--text", TEXT, "--ids", "5,6,7")
    assert status == 0 and out.count("perplexity") == 3 and "all together" in out


def test_a_text_from_a_pipe(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    [text] = json.loads(run("--json")[1])["texts"]
    assert text["name"] == "stdin" and text["tokens"] == len(TEXT)


def test_the_table_has_a_row_for_each_token(run):
    out = run("--text", "a 東\n", "--tokens")[1]
    rows = out.splitlines()[2:8]
    tokens = [row.split()[1] for row in rows]
    assert [row.split()[0] for row in rows] == list("012345") and [tokens[i] for i in (0, 1, 5)] == ["a", "␣", "\\n"]
    assert all(re.fullmatch(r"<\d+>", token) for token in tokens[2:5]), "bytes of a character are no text by themselves"
    assert len({row.index(".") for row in rows[1:]}) == 1 and "\033" not in out
    assert all("%" in row or "e-" in row for row in rows[1:])


def test_columns_hold_wide_characters(capsys):
    class Engine:
        class tokenizer:
            decode = staticmethod(lambda ids, skip_special: {1: "a", 2: "東京"}[ids[0]])

    result = ScoreResult(token_ids=[1, 2, 1], logprobs=[None, -0.5, -20.0], greedy_token_ids=[None, 2, 2])
    score._print_table(Engine, result)
    head, first, second, third = capsys.readouterr().out.splitlines()
    assert second == "      1  東京     -0.500   60.65%" and third == "      2  a       -20.000    2e-09  ██████████  東京"
    assert head.split() == ["token", "log-p", "p", "expected"] and first == "      0  a             -"


def test_a_perplexity_beyond_all_numbers_is_still_json(run, engine, monkeypatch):
    result = ScoreResult(token_ids=[1, 2], logprobs=[None, -1000.0], greedy_token_ids=[None, 2])
    monkeypatch.setattr("jaxinfer.engine.Engine.score", lambda self, windows: [result])
    assert json.loads(run("--ids", "1,2", "--json")[1])["total"]["perplexity"] is None
    assert "beyond 1e304" in run("--ids", "1,2")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", ""], "text 1 has 0 tokens; from the second one on"),
        (["--text", "x"], "text 1 has 1 tokens"),
        (["--ids", "1,100000"], "token 100000"),
        (["--text", "abc", "--window", "200"], "--window is 200, the engine reads 160 tokens"),
        (["--file", "no/such/file"], "the file no/such/file cannot be read: No such file"),
        (["--text", "a\ud800b"], "half of a surrogate pair"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_what_cannot_be_scored_is_told(run, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "") and words in err and "Traceback" not in err


def test_text_needs_a_tokenizer(run, engine, monkeypatch):
    monkeypatch.setattr(engine, "tokenizer", None)
    assert "give token ids with --ids" in run("--text", "abc")[2]
    out = run("--ids", "5,6,7", "--tokens")[1]
    assert out.splitlines()[2].split()[:2] == ["0", "5"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "a", "--window", "1"], "--window is 1; give at least 2"),
        (["--text", "a", "--windows", "0"], "give at least 1"),
        (["--ids", "1;2"], "not a list of token ids"),
        (["--text", "a", "--cpu-devices", "0"], "at least 1"),
    ],
)
def test_wrong_usage_of_score(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_a_text_is_asked_for_where_stdin_is_a_terminal(run, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(SystemExit):
        run()
    assert "give a text" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_reads_as_well_as_its_maker_says(smollm2_gguf, capsys, tmp_path):
    """Text in its own language is likely, and a permutation of its words is not."""
    (tmp_path / "words").write_text("The capital of France is Paris, and the capital of Italy is Rome.")
    (tmp_path / "mixed").write_text("Paris is the of and capital Italy, capital of Rome France is the.")
    files = [option for name in ("words", "mixed") for option in ("--file", str(tmp_path / name))]
    assert cli.main(["score", str(smollm2_gguf), "--max-length", "64", *files, "--json"]) == 0
    words, mixed = json.loads(capsys.readouterr().out)["texts"]
    assert words["perplexity"] < 12 < 50 < mixed["perplexity"]
