"""The commands: in process on a tiny model, and as processes where exit status, signals and pipes matter."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden_weights
import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import jaxinfer
from jaxinfer import cli
from jaxinfer.cli import environment, output
from jaxinfer.cli.info import stored_forms
from jaxinfer.cli.stats import process_age
from jaxinfer.loading import open_source
from jaxinfer.requests import GenerationResult, Timings, TokenLogprob
from pallas_kernels import platforms
from pallas_kernels.cpu import library

ROOT = Path(__file__).parents[2]
CASE = golden_weights.load_case("llama3")
PROMPT, GREEDY = CASE["prompts"][0], CASE["greedy"][0]
EXPECTED = GREEDY["ids"]
IDS = ",".join(map(str, PROMPT))
COMMANDS = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]


@pytest.fixture(scope="module", autouse=True)
def cached_programs():
    """Every command makes an engine of its own: let even the small programs come from the persistent cache."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "0")  # for the processes
        jax.config.update(name, 0.0)
        yield
        jax.config.update(name, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint without a tokenizer."""
    return golden_weights.write_case_folder(CASE, tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer: one token for each printable ASCII character."""
    folder = golden_weights.write_case_folder(CASE, tmp_path_factory.mktemp("cli") / "spoken")
    printable = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if 33 <= ord(c) < 127]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={"<eos>": 0, "Ġ": 1} | {c: i for i, c in enumerate(printable, 2)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(capsys):
    """run(*arguments): the exit status, stdout and stderr of a command in this process."""

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def results(run):
    """results(*arguments): what `generate ... --json` gives, after it went well."""

    def call(*arguments) -> dict:
        status, out, err = run("generate", *arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    return call


def process(*arguments, **options) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "jaxinfer", *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes | options)


# --- generate


def test_generate_gives_the_oracle_tokens(results, folder):
    found = results(folder, "--prompt-ids", IDS, "--max-tokens", len(EXPECTED), "--ignore-eos")
    assert found["source"] == str(folder)
    [result] = found["results"]

    assert golden_weights.first_difference(result["token_ids"], EXPECTED, GREEDY["gaps"], GREEDY["runner_up"]) is None
    assert result["prompt"] is None and result["prompt_token_ids"] == PROMPT and result["finish_reason"] == "length"


def test_several_prompts_are_one_batch_in_their_order(results, run, spoken):
    prompts = ("--prompt", "Hi there", "--prompt-ids", IDS, "--max-tokens", 3)
    found = results(spoken, *prompts)["results"]
    assert [r["prompt"] for r in found] == ["Hi there", None]
    assert found[1]["prompt_token_ids"] == PROMPT
    _, out, _ = run("generate", spoken, *prompts)
    assert out.splitlines() == ["[1] Hi there", found[0]["text"], f"[2] {IDS}", found[1]["text"]]


def test_stream_puts_together_what_generate_gives(results, run, spoken):
    options = (spoken, "--prompt", "Hi there", "--max-tokens", 6, "--ignore-eos")
    expected = results(*options)["results"][0]
    status, out, err = run("generate", *options, "--stream")
    assert (status, out) == (0, expected["text"] + "\n"), err
    _, out, _ = run("generate", *options, "--stream", "--json")
    *deltas, last = map(json.loads, out.splitlines())
    assert "".join(d["text"] for d in deltas) == expected["text"] == last["results"][0]["text"]
    assert [t for d in deltas for t in d["token_ids"]] == expected["token_ids"]


def test_without_a_tokenizer_ids_are_printed(run, folder):
    options = ("--prompt-ids", IDS, "--max-tokens", 3, "--ignore-eos")
    assert run("generate", folder, *options)[1] == ",".join(map(str, EXPECTED[:3])) + "\n"
    assert run("generate", folder, *options, "--stream")[1] == ",".join(map(str, EXPECTED[:3])) + "\n"


def test_options_reach_the_engine(results, folder, monkeypatch):
    seen = []

    class Engine:
        def generate(self, prompts, params):
            seen.extend([prompts, params])
            timings = Timings(prefill_seconds=0.1, decode_seconds=0.2)
            logprobs = [TokenLogprob(token_id=5, logprob=-0.5, top={5: -0.5, 6: -1.0})]
            return [
                GenerationResult(
                    text="", token_ids=[5], finish_reason="stop", prompt_token_ids=p, logprobs=logprobs, timings=timings
                )
                for p in prompts
            ]

    def init_inference(source, config, *, progress, expect=None):
        seen.append(config)
        return Engine()

    monkeypatch.setattr("jaxinfer.api.init_inference", init_inference)
    options = ("--dtype", "bfloat16", "--quantize", "w8a8", "--tp", 2, "--pp", 3, "--max-length", 99)
    options += ("--micro-batch-size", 5, "--kv-cache-dtype", "int8", "--max-tokens", 4, "--temperature", 1.5, "--top-k", 50)
    options += ("--top-p", 0.9, "--min-p", 0.1, "--seed", 7, "--stop", "a", "--stop", "b", "--stop-token-id", 95)
    result = results(folder, "--prompt-ids", IDS, *options, "--ignore-eos", "--logprobs", 6)["results"][0]
    assert result["logprobs"] == [{"token_id": 5, "logprob": -0.5, "top": {"5": -0.5, "6": -1.0}}]
    config, prompts, params = seen
    assert config == jaxinfer.EngineConfig(
        dtype="bfloat16",
        quantization=jaxinfer.QuantizationConfig.parse("w8a8"),
        engine=jaxinfer.ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3),
        inference_max_tokens=99,
        micro_batch_size=5,
        kv_cache=jaxinfer.CacheConfig(dtype="int8"),
        max_logprobs=6,
    )
    assert prompts == [PROMPT]
    assert params == jaxinfer.SamplingParams(
        max_tokens=4,
        temperature=1.5,
        top_k=50,
        top_p=0.9,
        min_p=0.1,
        seed=7,
        stop=("a", "b"),
        stop_token_ids=(95,),
        ignore_eos=True,
        logprobs=6,
    )


def test_prompts_from_files_and_stdin_and_stop_strings(results, spoken, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("Hi there\n")
    options = ("--max-tokens", 6, "--ignore-eos")
    whole = results(spoken, "--prompt-file", file, *options)["results"][0]
    assert whole["prompt"] == "Hi there"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi there\n"))
    stopped = results(spoken, *options, "--stop", whole["text"][3])["results"][0]
    assert stopped["prompt"] == "Hi there" and stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole["text"][: whole["text"].index(whole["text"][3])]


def test_the_command_line_overrides_the_configuration_file(run, folder, tmp_path):
    config = tmp_path / "engine.json"
    config.write_text(json.dumps({"inference_max_tokens": 8, "engine": {"tensor_parallel_size": 4096}}))
    options = ("--prompt-ids", IDS, "--max-tokens", 10, "--config", config)
    status, _, err = run("generate", folder, *options)
    assert status == 1 and "4096" in err
    status, _, err = run("generate", folder, *options, "--tp", 1)
    assert status == 1 and f"{len(PROMPT)} tokens and asks for 10 new ones, inference_max_tokens is 8" in err
    status, _, err = run("generate", folder, *options, "--tp", 1, "--max-length", 9)
    assert status == 1 and "inference_max_tokens is 9" in err


def test_several_samples_are_told_apart(results, run, spoken):
    options = (spoken, "--prompt", "Hi", "--max-tokens", 4, "--temperature", 1, "--seed", 3, "--n", 2, "--ignore-eos")
    [result] = results(*options)["results"]
    [other] = result["alternatives"]
    assert other["token_ids"] != result["token_ids"]
    assert run("generate", *options)[1].splitlines() == ["[1] Hi", result["text"], "[2] Hi", other["text"]]


def test_special_tokens_of_a_prompt_may_be_text(results, spoken):
    options = (spoken, "--prompt", "a<eos>b", "--max-tokens", 1, "--ignore-eos")
    special = results(*options)["results"][0]["prompt_token_ids"]
    plain = results(*options, "--special-as-text", "--echo")["results"][0]
    assert len(special) == 3 and len(plain["prompt_token_ids"]) == 7 and plain["text"].startswith("a<eos>b")


def test_stats(results, run, folder):
    stats = results(folder, "--prompt-ids", IDS, "--max-tokens", 5, "--ignore-eos", "--stats")["stats"]
    assert stats["prefill"]["tokens"] == len(PROMPT) and stats["decode"]["tokens"] == 4 and stats["total"]["tokens"] == 5
    assert 0 < stats["first_token_seconds"] < stats["process_first_token_seconds"]
    assert stats["decode"]["gb_per_second"] * stats["decode"]["seconds"] * 1e9 > 4 * stats["weight_bytes_per_step"]
    status, out, err = run("generate", folder, "--prompt-ids", IDS, "--max-tokens", 1, "--stats")
    assert status == 0 and out == f"{EXPECTED[0]}\n"
    assert "first token  " in err and "memory       weights" in err and "decode  " not in err  # one token: nothing is decoded


@pytest.mark.parametrize(("case", "tied"), [("tied", True), ("llama3", False)])
def test_an_embedding_table_counts_as_read_only_where_it_is_the_head(case, tied, tmp_path):
    source = golden_weights.write_case_folder(golden_weights.load_case(case), tmp_path / case)
    model = jaxinfer.load_model(source)
    everything = sum(t.nbytes for t in open_source(source).tensors.values())
    assert model.weights().step_bytes(1) == everything - (0 if tied else model.embedding.get_value().nbytes)


def test_process_age():
    assert 0 < process_age() < 24 * 3600


# --- convert and info


@pytest.mark.parametrize("spec", ["w8a8", "w4a16-g32"])
def test_convert_then_info_and_generate(run, results, spoken, tmp_path, spec):
    destination = tmp_path / "native"
    status, out, err = run("convert", spoken, destination, "--dtype", "float32", "--quantize", spec, "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert facts["destination"] == str(destination)
    assert set(facts["before"]) == {"float32"} and any(form.startswith(spec[:2].replace("w", "int")) for form in facts["after"])
    total = lambda forms, key: sum(form[key] for form in forms.values())
    assert total(facts["after"], "bytes") < total(facts["before"], "bytes") / 2
    assert total(facts["after"], "parameters") == total(facts["before"], "parameters")

    status, out, _ = run("info", destination, "--json")
    described = json.loads(out)
    assert status == 0 and described["format"] == "native" and described["stored"] == facts["after"]
    options = ("--prompt", "Hi there", "--max-tokens", 6, "--ignore-eos")
    converted = results(destination, *options)["results"][0]
    assert (
        converted["text"] and converted["token_ids"] == results(spoken, *options, "--quantize", spec)["results"][0]["token_ids"]
    )


def test_convert_does_not_overwrite_unless_told(run, folder, tmp_path):
    destination = tmp_path / "native"
    assert run("convert", folder, destination)[0] == 0
    status, out, err = run("convert", folder, destination)
    assert (status, out) == (1, "") and f"{destination} holds a checkpoint already" in err
    status, out, err = run("convert", folder, destination, "--dtype", "bfloat16", "--overwrite")
    assert status == 0 and "bfloat16" in out and "wrote" in err
    assert [p.name for p in tmp_path.iterdir()] == ["native"]


def test_info(run, folder, spoken):
    facts = json.loads(run("info", folder, "--json")[1])
    config = CASE["config"]
    tensors = golden_weights.make_tensors(CASE["tensors"], CASE["seed"]).values()
    assert facts["parameters"] == sum(t.size for t in tensors) and facts["bytes"] == sum(t.nbytes for t in tensors)
    assert facts["architecture"]["layers"] == config["num_hidden_layers"] and facts["tokenizer"] is None
    heads = config["num_hidden_layers"] * 2 * config["num_key_value_heads"]
    size = facts["architecture"]["attention"]["head_dim"]
    assert facts["cache_bytes_per_token"] == {
        "float32": heads * size * 4,
        "bfloat16": heads * size * 2,
        "int8": heads * (size + 4),
        "fp8": heads * (size + 4),
        "int4": heads * (size + -(-size // 8) + 4) // 2,
    }
    status, out, err = run("info", spoken)
    assert (status, err) == (0, "") and "\033" not in out
    assert "family" in out and f"{facts['parameters']:,}" in out and "no chat template" in out


def test_info_names_packed_forms(folder):
    config = jaxinfer.QuantizationConfig.parse("w4a8-g32-asym")
    forms = stored_forms(open_source(folder).stored_as(dtype=None, quantization=config).values())
    assert any(form.startswith("int4, group 32, with minimum, int8 inputs per") for form in forms)
    assert any(form.startswith("int8, per channel") for form in forms) and "float32" in forms


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "no/such/thing/here"], "no/such/thing/here is neither a path"),
        (["generate", "FOLDER", "--prompt", "Hi"], "no tokenizer; give token ids"),
        (["generate", "SPOKEN", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "FOLDER", "--prompt-ids", "100000"], "token 100000"),
        (["generate", "FOLDER", "--prompt-ids", "1", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "FOLDER", "--prompt-ids", "1", "--max-tokens", "5000", "--stats"], "asks for 5000 new ones"),
        (["generate", "FOLDER", "--prompt-ids", "1", "--quantize", "int3"], "'int3' is not understood"),
        (["generate", "FOLDER", "--prompt-ids", "1", "--tp", "0"], "tensor_parallel_size is 0"),
        (["generate", "FOLDER", "--prompt-ids", "1", "--config", "FOLDER/nothing.json"], "cannot be read"),
        (["generate", "FOLDER", "--prompt-file", "FOLDER/nothing.txt"], "nothing.txt cannot be read: No such file"),
        (["generate", "FOLDER", "--prompt-file", "FOLDER/model.safetensors"], "is not UTF-8 text"),
        (["convert", "FOLDER", "FOLDER"], "is not a native checkpoint; it is never overwritten"),
        (["convert", "FOLDER", "/proc/nothing/here"], "/proc/nothing"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_expected_errors_are_one_message(run, folder, spoken, arguments, message):
    status, out, err = run(*(a.replace("FOLDER", str(folder)).replace("SPOKEN", str(spoken)) for a in arguments))
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("jaxinfer: error: ") and message in last and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice"),
        (["info"], "give a SOURCE, or --system"),
        (["info", "x", "--system"], "give a SOURCE, or --system"),
        (["convert", "x"], "DST"),
        (["generate", "x", "--dtype", "int8"], "invalid choice"),
        (["generate", "x", "--prompt-ids", "1,b"], "not a list of token ids"),
        (["generate", "x", "--prompt", "a", "--prompt", "b", "--stream"], "--stream is for one prompt, there are 2"),
        (["generate", "x", "--prompt", "a", "--logprobs", "2"], "needs --json"),
        (["generate", "x", "--prompt", "a", "--stream", "--n", "2"], "--stream is for one sample"),
        (["generate", "x", "--prompt", "a", "--logit-bias", "5=1", "--logit-bias", "5=2"], "names a token twice"),
        (["generate", "x", "--prompt", "a", "--micro-batch-size", "many"], "neither a whole number nor auto"),
        (["generate", "x", "--prompt", "a", "--cpu-devices", "0"], "at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and not out and message in err


def test_a_prompt_is_asked_for_where_stdin_is_a_terminal(run, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(SystemExit):
        run("generate", "x")
    assert "give a prompt" in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)], ids=lambda c: "".join(c) or "jaxinfer")
def test_help_has_examples(run, capsys, command):
    with pytest.raises(SystemExit) as error:
        run(*command, "--help")
    out, _ = capsys.readouterr()
    assert not error.value.code and f"examples:\n  jaxinfer {' '.join(command)}" in out


def test_version(run, capsys):
    with pytest.raises(SystemExit) as error:
        run("--version")
    assert not error.value.code and capsys.readouterr().out.startswith("jaxinfer ")


# --- terminals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    with output.work("counting", "counted") as progress:
        progress(1, 2, "one")
    out, err = capsys.readouterr()
    assert not out and err.startswith("counting ...\ncounted in ")

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with output.work("counting", "counted") as progress:
        progress(1, 2, "one")
        progress(3_000_000, 4_000_000, "download")
        time.sleep(0.15)  # a turn of the display
    assert "downloading" in terminal.getvalue() and "3.0 MB of 4.0 MB" in terminal.getvalue()
    assert "counted" not in terminal.getvalue() and not capsys.readouterr().out


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert output.paint("x", "red", Terminal()) == "\033[1;31mx\033[0m"
    assert output.paint("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert output.paint("x", "red", Terminal()) == "x"


def test_bytes_are_written_for_people():
    assert [output.format_bytes(n) for n in (0, 999, 1000, 92_871_040, 16e9, 3e13)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "92.9 MB",
        "16.0 GB",
        "30.0 TB",
    ]


@pytest.mark.parametrize(
    ("plugins", "driver", "given", "expected"),
    [(True, False, None, "cpu"), (True, True, None, None), (False, False, None, None), (True, False, "cuda", "cuda")],
)
def test_cuda_plugins_stay_silent_without_a_driver(monkeypatch, plugins, driver, given, expected):
    monkeypatch.setattr(platforms, "_only_cuda_plugins", lambda: plugins)
    monkeypatch.setattr(platforms, "_has_nvidia_driver", lambda: driver)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if given:
        monkeypatch.setenv("JAX_PLATFORMS", given)
    environment.start_jax()
    assert os.environ.get("JAX_PLATFORMS") == expected
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # so that undoing restores what was there


# --- processes


def test_help_and_wrong_usage_do_not_wait_for_jax():
    code = """
import sys
from jaxinfer.cli import main
for arguments in (["--help"], ["generate", "--help"], ["chat", "--help"], ["generate", "x", "--dtype", "int8"], ["info"]):
    try:
        main(arguments)
    except SystemExit:
        pass
sys.exit(any(name in sys.modules for name in ("jax", "numpy", "rich", "tokenizers")))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_a_pipe_gets_the_text_and_nothing_else(spoken):
    child = process("generate", spoken, "--max-tokens", 3, "--json", stdin=subprocess.PIPE)
    out, err = child.communicate("Hi there\n")
    assert child.returncode == 0, err
    assert json.loads(out)["results"][0]["prompt"] == "Hi there"
    reason = library.refusal("cpu")
    told = [] if reason is None else [f"running on XLA: {reason}"]
    assert [line.split(" in ")[0] for line in err.splitlines()] == ["loading spoken ...", *told, "loaded spoken"]


def test_characters_that_stdout_cannot_write_are_written_out(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr("jaxinfer.cli.info.run", lambda args: print(f"größer {args.source}"))
    cli.main(["info", "name-\udcff"])
    assert written.buffer.getvalue() == b"gr\\xf6\\xdfer name-\\udcff\n"


def test_control_characters_reach_no_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = "a\x1b[2J\x07\r\x9b\tb\n"
    assert output.visible(text, Terminal()) == "a\\x1b[2J\\x07\\r\\x9b\tb\n"
    assert output.visible(text, io.StringIO()) == text


def test_a_reader_that_goes_away_ends_the_command_quietly(folder):
    with process("info", folder) as child:
        child.stdout.close()
        err = child.stderr.read()
    assert child.returncode == 141 and not err


def test_interrupting_is_quiet(folder, tmp_path):
    fifo = tmp_path / "prompt"
    os.mkfifo(fifo)
    child = process("generate", folder, "--prompt-file", fifo)
    with fifo.open("w"):  # opens when the command reads from it
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=300)
    assert child.returncode == 130 and err == "jaxinfer: interrupted\n"


@pytest.mark.slow
def test_a_mesh_of_cpu_devices(folder):
    arguments = ("generate", folder, "--prompt-ids", IDS, "--max-tokens", 4, "--ignore-eos", "--tp", 2)
    child = process(*arguments, "--cpu-devices", 2, "--max-length", 16, "--micro-batch-size", 1)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert out == ",".join(map(str, EXPECTED[:4])) + "\n"
