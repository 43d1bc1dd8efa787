"""`jaxinfer chat`: the session and the shell on an engine that only counts, then a tiny model in a pipe and in a terminal."""

import io
import json
import stat
import sys

import jax
import pytest
from speaking import QUICK, Terminal, write_model

import jaxinfer
from jaxinfer import SamplingParams, cli
from jaxinfer.cli import chat, terminal
from jaxinfer.cli.session import Answer, ContextFullError, Session, read_conversation
from jaxinfer.errors import ChatTemplateError
from jaxinfer.requests import Delta, GenerationResult, Timings, TokenLogprob


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
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat") / "talker")


@pytest.fixture(scope="module")
def engine(folder):
    return jaxinfer.init_inference(folder, {"inference_max_tokens": QUICK[1], "micro_batch_size": 1})


@pytest.fixture
def say(capsys, monkeypatch, engine):
    """say(text, *arguments): status, stdout and stderr of a chat whose stdin is a pipe with that text, on the one engine."""

    def init_inference(source, config, *, tokenizer, progress):
        assert config == engine.config
        monkeypatch.setattr(engine, "tokenizer", tokenizer)
        return engine

    monkeypatch.setattr("jaxinfer.api.init_inference", init_inference)

    def call(text: str | bytes, *arguments) -> tuple[int, str, str]:
        stdin = io.StringIO(text) if isinstance(text, str) else io.TextIOWrapper(io.BytesIO(text), "utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        status = cli.main(["chat", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


# --- the session, on an engine whose tokens are words


class Counting:
    """Answers "one two three ..."; `stop_after` pieces Ctrl-C is pressed."""

    def __init__(self, limit: int = 1000):
        self.config = jaxinfer.EngineConfig(inference_max_tokens=limit)
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.stop_after: int | None = None
        self.closed = 0

    def chat_prompt(self, messages):
        words = " ".join(f"{m['role']} {m['content']}" for m in messages).split()
        return list(range(len(words)))

    def stream(self, ids, params):
        self.params.append(params)
        words = ["one", " two", " three"]
        try:
            for i, word in enumerate(words):
                if i == self.stop_after:
                    raise KeyboardInterrupt
                result = None
                if i == len(words) - 1:
                    timings = Timings(prefill_seconds=0.1, decode_seconds=0.1)
                    result = GenerationResult(
                        text="one two three",
                        token_ids=[1, 2, 3],
                        finish_reason="stop",
                        prompt_token_ids=ids,
                        logprobs=None,
                        timings=timings,
                    )
                yield Delta(text=word, token_ids=[i + 1], result=result)
        finally:
            self.closed += 1


@pytest.fixture
def session() -> Session:
    return Session(Counting(), SamplingParams(temperature=1.0, seed=5))


def answered(session: Session, text: str) -> Answer:
    session.say(text)
    return session.answer(session.check_room(), lambda text: None)


def test_an_answer_becomes_a_message(session):
    pieces: list[str] = []
    session.system = "Be brief."
    session.say("Hello")
    answer = session.answer(session.check_room(), pieces.append)
    assert pieces == ["one", " two", " three"] and answer.text == "one two three" and answer.finish_reason == "stop"
    assert session.conversation() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "one two three"},
    ]
    assert answer.prompt_tokens == 5 and answer.used == 8 and answer.rate > 0


@pytest.mark.parametrize(("stop_after", "kept"), [(2, "one two"), (0, None)])
def test_an_interrupted_answer_is_kept_as_far_as_it_came(session, stop_after, kept):
    session.engine.stop_after = stop_after
    answer = answered(session, "Hello")
    assert answer.finish_reason == "interrupted" and session.engine.closed == 1
    assert [m["content"] for m in session.messages] == ["Hello"] + ([kept] if kept else [])


def test_another_answer_has_another_seed(session):
    answered(session, "Hello")
    for _ in range(2):
        assert session.again()
        session.answer(session.check_room(), lambda text: None)
    answered(session, "More")
    assert [p.seed for p in session.engine.params] == [5, 6, 7, 5]
    assert len(session.messages) == 4 and not Session(Counting(), SamplingParams()).again()


def test_what_does_not_fit_is_told_with_what_would():
    session = Session(Counting(limit=40), SamplingParams(max_tokens=20))
    for text in ("first words here", "second", "third"):
        session.say(text)
        session.messages.append({"role": "assistant", "content": "a b c d"})
    session.say("and now")
    with pytest.raises(
        ContextFullError, match=r"has 26 tokens and an answer takes up to 20, more than the 40 .* oldest 1 turn \(2"
    ) as error:
        session.check_room()
    cut = error.value.cut
    assert (cut.messages, cut.turns, cut.tokens) == (2, 1, 17)
    session.drop(cut)
    assert len(session.check_room()) == 17 and session.messages[0]["content"] == "second"

    alone = Session(Counting(limit=40), SamplingParams(max_tokens=20))
    alone.say("word " * 30)
    with pytest.raises(ContextFullError, match="no older turns are left") as error:
        alone.check_room()
    assert error.value.cut is None


def test_conversations_are_saved_and_read(session, tmp_path):
    session.system = "Sei kürzer."
    answered(session, "Grüße 👍🏽")
    session.save(tmp_path / "saved.json")
    messages = read_conversation(tmp_path / "saved.json")
    assert messages == session.conversation()
    (tmp_path / "list.json").write_text(json.dumps(messages[1:]))
    other = Session(Counting(), SamplingParams())
    other.continue_with(read_conversation(tmp_path / "list.json"))
    assert other.system is None and other.messages == session.messages
    other.continue_with(messages)
    assert other.system == "Sei kürzer." and other.messages == session.messages
    for text in ("[1", '{"messages": 3}', '[{"role": "user"}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ChatTemplateError):
            read_conversation(tmp_path / "bad.json")


# --- the shell


@pytest.fixture
def shell(session, monkeypatch, capsys):
    """shell(*lines): what stderr and stdout hold after a person typed these lines and left; shell.answers: to questions."""

    class Run:
        def __init__(self):
            self.answers = iter(())

        def __call__(self, *lines: str, person: bool = True, **options) -> tuple[str, str]:
            typed = iter(lines)

            def read(prompt: str = "") -> str:
                line = next(typed, None)
                if line is None:
                    raise EOFError
                if isinstance(line, BaseException):
                    raise line
                return line

            monkeypatch.setattr(chat, "read_turn", read)
            monkeypatch.setattr(chat, "agrees", lambda question: next(self.answers))
            capsys.readouterr()
            chat.Shell(session, as_json=False, person=person, drop_oldest=False, **options).talk()
            out, err = capsys.readouterr()
            return out, err

    return Run()


def test_a_shell_answers_and_leaves(shell, session):
    out, _ = shell("Hello", "", "  ", "//literally", "/quit", "never said")
    assert out == "one two three\none two three\n"
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["Hello", "/literally"]


def test_statistics_follow_an_answer(session, capsys):
    shell = chat.Shell(session, as_json=False, person=True, drop_oldest=False)
    shell.stats = True
    shell.turn("Hello there")
    assert capsys.readouterr().err.startswith("[3 tokens, ") and len(session.messages) == 2


def test_commands_change_the_conversation(shell, session, tmp_path):
    file = tmp_path / "c.json"
    _, err = shell(
        "/system Be brief.", "/system", "Hello", f"/save {file}", "/reset", "/show", f"/load {file}", "/undo", "/show"
    )
    assert "Be brief." in err and session.system == "Be brief." and session.messages == []
    assert "(3 messages are in" in err and "(taken back: 'Hello')" in err
    assert json.loads(file.read_text())["messages"][1] == {"role": "user", "content": "Hello"}
    shell("/system none", "/undo", "/regenerate", "/load", f"/load {tmp_path}/nothing")
    assert session.system is None


def test_a_file_is_overwritten_only_after_a_question(shell, tmp_path):
    file = tmp_path / "c.json"
    file.write_text("precious")
    shell.answers = iter([False, True])
    shell("Hello", f"/save {file}")
    assert file.read_text() == "precious"
    shell(f"/save {file}")
    assert "Hello" in file.read_text()


def test_parameters_are_shown_and_set(shell, session):
    _, err = shell('/params temperature=0.5 stop=["x","y"] max_tokens=7', "/params")
    assert session.params == SamplingParams(temperature=0.5, stop=("x", "y"), max_tokens=7, seed=5)
    assert "temperature" in err and "0.5" in err and "best_of" not in err
    for wrong in ("/params temperature=-1", "/params temprature=1", "/params n=2", "/params hot"):
        assert "error:" in shell(wrong)[1]
    shell("/params reset")
    assert session.params == SamplingParams()


def test_errors_leave_the_session_as_it_was(shell, session):
    _, err = shell("/nothing", "/regenrate", KeyboardInterrupt(), "Hello")
    assert "there is no /nothing; /help" in err and "did you mean /regenerate?" in err and "Ctrl-D leaves" in err
    assert len(session.messages) == 2
    session.engine.stop_after = 0
    _, err = shell("Again", "/regenerate")
    assert "(your message was taken back)" in err
    assert [m["role"] for m in session.messages] == ["user", "assistant"], "an answer that did not come replaces none"
    session.engine.stop_after = 1
    out, err = shell("Again")
    assert out == "one\n" and "(stopped; /regenerate asks again)" in err and session.messages[-1]["content"] == "one"


def test_a_person_is_asked_before_turns_are_dropped(shell, session):
    session.engine.config = jaxinfer.EngineConfig(inference_max_tokens=20)
    session.params = SamplingParams(max_tokens=5)
    shell("a b c d e")
    shell.answers = iter([False])
    _, err = shell("f g h i j")
    assert "context:" in err and "without its oldest 1 turn" in err and len(session.messages) == 2
    shell.answers = iter([True])
    shell("f g h i j")
    assert [m["content"] for m in session.messages] == ["f g h i j", "one two three"]


def test_a_turn_as_json_has_its_logprobs(session, capsys):
    chosen = TokenLogprob(token_id=1, logprob=-0.5, top={1: -0.5})

    def stream(ids, params):
        timings = Timings(prefill_seconds=0.1, decode_seconds=0.1)
        result = GenerationResult(
            text="x", token_ids=[1], finish_reason="stop", prompt_token_ids=ids, logprobs=[chosen], timings=timings
        )
        yield Delta(text="x", token_ids=[1], result=result)

    session.engine.stream = stream
    chat.Shell(session, as_json=True, person=False, drop_oldest=False).turn("Hello")
    turn = json.loads(capsys.readouterr().out)
    assert turn["assistant"] == "x" and turn["logprobs"] == [{"token_id": 1, "logprob": -0.5, "top": {"1": -0.5}}]


def test_help_lists_every_command(shell):
    _, err = shell("/help")
    assert all(f"/{name}" in err for name in chat.COMMANDS)


# --- lines


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Hi"], "Hi"),
        (["one \\", "two\\", "three"], "one \ntwo\nthree"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        ([' """ x', '"""  '], " x"),
    ],
)
def test_several_lines_are_one_turn(lines, expected):
    waiting = iter(lines)
    assert terminal.read_turn(lambda prompt: next(waiting)) == expected
    assert next(waiting, None) is None


def test_an_answer_to_a_question_is_no_unless_it_is_yes(capsys):
    def end(prompt):
        raise EOFError

    assert terminal.agrees("?", lambda prompt: " Yes ") and terminal.agrees("?", lambda prompt: "y")
    assert not terminal.agrees("?", lambda prompt: "") and not terminal.agrees("?", end)


def test_prompts_are_not_among_answers_that_go_to_a_file(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\nlast"))
    assert [terminal.read_line("> "), terminal.read_line("> ")] == ["typed", "last"]
    with pytest.raises(EOFError):
        terminal.read_line("> ")
    assert capsys.readouterr() == ("", "> > > ")


# --- a tiny model in a pipe


def test_each_line_of_a_pipe_is_a_turn(say, engine, folder):
    status, out, err = say("Hello\n\nAnd <|im_end|> you?\n", folder, *QUICK, "--max-tokens", 5, "--system", "S.", "--json")
    assert status == 0, err
    turns = [json.loads(line) for line in out.splitlines()]
    messages = [{"role": "system", "content": "S."}]
    for number, (turn, text) in enumerate(zip(turns, ("Hello", "And <|im_end|> you?"), strict=True), 1):
        messages.append({"role": "user", "content": text})
        expected = engine.chat(messages, SamplingParams(max_tokens=5))
        assert (turn["turn"], turn["user"], turn["assistant"]) == (number, text, expected.text)
        assert turn["token_ids"] == expected.token_ids and turn["finish_reason"] == expected.finish_reason
        assert turn["prompt_tokens"] == len(expected.prompt_token_ids) and turn["dropped_messages"] == 0
        messages.append({"role": "assistant", "content": expected.text})
    assert expected.prompt_token_ids.count(1) == 4, "one end for each message that ended"

    plain = say("Hello\n", folder, *QUICK, "--max-tokens", 5, "--system", "S.", "--stats")
    assert plain[0] == 0 and plain[1] == turns[0]["assistant"].removesuffix("\n") + "\n"
    assert "of 160 in use]" in plain[2]


def test_a_conversation_that_outgrows_the_context(say, folder):
    lines = "".join(f"line {i} {'x' * 20}\n" for i in range(4))
    options = (folder, *QUICK, "--max-tokens", 30, "--ignore-eos")
    status, out, err = say(lines, *options)
    assert status == 1 and "more than the 160 that the engine was started for" in err and "--drop-oldest drops them" in err
    status, out, err = say(lines, *options, "--drop-oldest", "--json")
    assert status == 0, err
    turns = [json.loads(line) for line in out.splitlines()]
    assert [t["turn"] for t in turns] == [1, 2, 3, 4] and sum(t["dropped_messages"] for t in turns) > 0
    assert "without its oldest" in err and all(t["used"] <= 160 for t in turns)


def test_a_template_of_ones_own_and_a_conversation_to_go_on_with(say, folder, tmp_path, monkeypatch):
    template, saved = tmp_path / "t.jinja", tmp_path / "c.json"
    template.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}/{% endfor %}")
    said = {"system": "S", "user": "U", "assistant": "A"}
    saved.write_text(json.dumps([{"role": role, "content": content} for role, content in said.items()]))
    seen = []

    def stream(self, ids, params):
        seen.append(self.tokenizer.decode(ids))
        timings = Timings(prefill_seconds=0.1, decode_seconds=0.1)
        result = GenerationResult(
            text="", token_ids=[1], finish_reason="stop", prompt_token_ids=ids, logprobs=None, timings=timings
        )
        yield Delta(text="", token_ids=[1], result=result)

    monkeypatch.setattr("jaxinfer.engine.Engine.stream", stream)
    say("new\n", folder, *QUICK, "--chat-template", template, "--load", saved)
    say("new\n", folder, *QUICK, "--chat-template", template, "--load", saved, "--system", "T")
    assert seen == ["s:S/u:U/a:A/u:new/", "s:T/u:U/a:A/u:new/"]


def test_what_is_wrong_is_told_before_weights_are_read(say, folder, tmp_path, monkeypatch):
    mute = write_model(tmp_path / "mute", template=None)
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for")
    monkeypatch.setattr("jaxinfer.api.init_inference", None)
    for arguments, words in (
        ([mute], "has no chat template"),
        ([folder, "--chat-template", broken], "does not compile"),
        ([folder, "--chat-template", folder / "model.safetensors"], "is not UTF-8 text"),
        ([folder, "--load", tmp_path / "nothing.json"], "No such file"),
        ([folder, "--temperature", "-1"], "temperature is -1.0"),
        ([folder, "--max-length", "1"], "inference_max_tokens is 1"),
    ):
        status, out, err = say("Hi\n", *arguments)
        assert (status, out) == (1, "") and words in err.splitlines()[-1] + err


def test_wrong_usage_of_chat(capsys):
    for arguments, words in (
        (["--logprobs", "2"], "needs --json"),
        (["--n", "2"], "unrecognized"),
        (["--logit-bias", "1"], "is not a token id"),
    ):
        with pytest.raises(SystemExit) as error:
            cli.main(["chat", "x", *arguments])
        assert error.value.code == 2 and words in capsys.readouterr().err


def test_bytes_that_are_no_text_are_refused(say, folder):
    status, out, err = say(b"not \xff fine\n", folder, *QUICK)
    assert (status, out) == (1, "") and "stdin is not UTF-8 text" in err


# --- a terminal


def test_a_conversation_in_a_terminal(folder, tmp_path):
    options = ("--max-length", 6000, "--micro-batch-size", 1, "--max-tokens", 5000, "--ignore-eos")
    with Terminal("chat", folder, *options, XDG_CACHE_HOME=str(tmp_path), NO_COLOR="1") as screen:
        screen.expect("/help lists commands; Ctrl-D leaves.")
        screen.type('"""\rone\rtwo"""\r')
        screen.expect('. two"""')
        screen.expect("\x1b[?25h")  # the bar has gone, so the answer has begun
        screen.type("\x03")
        screen.expect("(stopped; /regenerate asks again)")
        screen.expect("of 6000 in use]")
        screen.at_prompt()
        screen.type("half a li\x03")  # a line that is not wanted after all
        screen.expect("(Ctrl-D leaves, /help lists commands)")
        screen.at_prompt()
        screen.type("/sh\t\r")  # completed
        screen.expect("user: one\r\ntwo\r\nassistant:")
        screen.at_prompt()
        screen.type("/params temperature=0.5\r")
        screen.expect("max_tokens")
        screen.at_prompt()
        screen.type("\x1b[A\x1b[A\r")  # the line before the last one, again
        screen.expect("user: one\r\ntwo\r\nassistant:")
        screen.at_prompt()
        screen.type("\x04")
        assert screen.ends() == 0 and "Traceback" not in screen.screen
    history = tmp_path / "jaxinfer" / "chat_history"
    assert "/params temperature=0.5" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600
