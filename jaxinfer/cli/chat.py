"""`jaxinfer chat`: a conversation in the terminal, or one turn for each line of a pipe."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxinfer.cli.options import SOURCE_HELP, add_engine, add_sampling, engine_config, load_engine, sampling_params, start
from jaxinfer.cli.output import note, paint, print_fields, print_json, short_name, visible, work
from jaxinfer.cli.terminal import agrees, line_editing, open_terminal, read_turn
from jaxinfer.errors import LaunchError
from sharding.distributed import detect

# What a conversation has no use for: it has one answer a turn, and its prompt is on the screen already.
WITHOUT = ("n", "best_of", "echo", "prompt_logprobs", "logits_processor")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="""Talk with a model, in the format that its chat template gives. In a terminal, /help lists what else there is; Ctrl-C
stops an answer, Ctrl-D leaves. Where stdin is a pipe, each of its lines is a turn of the user.""",
        epilog="""examples:
  jaxinfer chat demo
  jaxinfer chat model.gguf --system "Answer in one sentence." --temperature 0.7 --max-length 4096
  printf 'My name is Ada.\\nWhat is my name?\\n' | jaxinfer chat demo --max-tokens 40 --json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    chat = parser.add_argument_group("conversation")
    chat.add_argument("--system", metavar="TEXT", help="the system message; by default what the template has by itself")
    chat.add_argument("--load", metavar="FILE", type=Path, help="go on with a conversation that /save wrote")
    chat.add_argument("--chat-template", metavar="FILE", type=Path, help="a Jinja template, instead of the checkpoint's")
    chat.add_argument(
        "--drop-oldest", action="store_true", help="drop the oldest turns without asking where the context is full"
    )
    chat.add_argument("--no-history", action="store_true", help="keep no file of the lines that were typed")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--stats",
        action=argparse.BooleanOptionalAction,
        help="a line with tokens and speed after each answer; by default in a terminal",
    )
    output.add_argument("--json", action="store_true", help="one JSON object for each turn on stdout")
    add_sampling(parser, without=WITHOUT, max_tokens="by default as many as the context leaves")
    add_engine(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    if detect() is not None:
        raise LaunchError(
            "a chat is one process with a terminal, and this is one of several; use jaxinfer generate under a launcher"
        )
    start(args)
    from jaxinfer.cli.session import Session, read_conversation
    from jaxinfer.demo import cache_dir

    config, params = engine_config(args), sampling_params(args)
    messages = read_conversation(args.load) if args.load else []
    tokenizer = _tokenizer(args)
    tokenizer.chat_prompt([{"role": "user", "content": "Hi"}])  # no template, or a wrong one, is told before weights are read
    session = Session(load_engine(args.source, config, tokenizer=tokenizer), params)
    session.continue_with(messages)
    session.system = session.system if args.system is None else args.system
    person = open_terminal()
    shell = Shell(session, as_json=args.json, person=person, drop_oldest=args.drop_oldest)
    shell.stats = person if args.stats is None else args.stats
    if not person:
        for line in _lines():
            shell.turn(line)
        return 0
    note(f"{short_name(args.source)}: {session.limit} tokens of context. /help lists commands; Ctrl-D leaves.")
    with line_editing([f"/{name}" for name in COMMANDS], None if args.no_history else cache_dir() / "chat_history"):
        shell.talk()
    return 0


def _tokenizer(args: argparse.Namespace):
    """The checkpoint's tokenizer, with the template of --chat-template where that is given."""
    from jaxinfer.errors import ChatTemplateError
    from jaxinfer.loading import open_source
    from jaxinfer.text import Tokenizer

    with work(f"reading {short_name(args.source)}") as progress:
        assets = open_source(args.source, progress).assets
    if args.chat_template is not None:
        try:
            template = args.chat_template.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ChatTemplateError(f"the chat template {args.chat_template} is not UTF-8 text: {error}") from error
        assets = dataclasses.replace(assets, config={**assets.config, "chat_template": template})
    return Tokenizer.from_assets(assets)


def _lines() -> Iterator[str]:
    """Lines of stdin that are not empty."""
    from jaxinfer.errors import PromptError

    try:
        for line in sys.stdin:
            if line.strip():
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not UTF-8 text: {error}") from error


class Shell:
    """The conversation on the screen: answers on stdout, all else on stderr. person: someone can be asked."""

    def __init__(self, session, *, as_json: bool, person: bool, drop_oldest: bool):
        self.session, self._as_json, self._person, self._drop_oldest = session, as_json, person, drop_oldest
        self.stats = False
        self._turns = 0

    def talk(self) -> None:
        """Read and answer until Ctrl-D or /quit."""
        from jaxinfer.errors import EXPECTED

        while True:
            try:
                said = read_turn()
                if said.startswith("/") and not said.startswith("//"):
                    if not self._command(said):
                        return
                elif said.strip():
                    self.turn(said.removeprefix("/") if said.startswith("//") else said)
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note("\n(Ctrl-D leaves, /help lists commands)")
            except (*EXPECTED, OSError) as error:  # what was asked is not possible; the conversation goes on
                note(f"{paint('error:', 'red', sys.stderr)} {error}")

    def turn(self, text: str) -> None:
        """Say something and show the answer. Without an answer the message is taken back."""
        self.session.say(text)
        try:
            answered = self._answer()
        except BaseException:
            self.session.take_back()
            raise
        if not answered:
            self.session.take_back()
            note("(your message was taken back)")

    def _answer(self) -> bool:
        """Show the answer to the last message; False where there is none."""
        from jaxinfer.cli.session import ContextFullError
        from jaxinfer.errors import TokenLimitError

        dropped = 0
        try:
            ids = self.session.check_room()
        except ContextFullError as full:
            if full.cut is None:
                raise
            if not (self._drop_oldest or self._person):
                raise TokenLimitError(f"{full}; --drop-oldest drops them, --max-length makes room") from full
            note(str(full) if self._drop_oldest else f"{paint('context:', 'yellow', sys.stderr)} {full}")
            if not self._drop_oldest and not agrees("Drop them?"):
                return False
            self.session.drop(full.cut)
            dropped = full.cut.messages
            ids = self.session.check_room()
        with _Writer(silent=self._as_json) as writer:
            answer = self.session.answer(ids, writer.write)
        interrupted = answer.finish_reason == "interrupted"
        if interrupted and not self._person:
            raise KeyboardInterrupt
        if interrupted and not answer.text:
            return False
        self._turns += 1
        if self._as_json:
            messages = {"turn": self._turns, "user": self.session.messages[-2]["content"], "assistant": answer.text}
            print_json(
                messages | {"dropped_messages": dropped} | {k: v for k, v in answer.to_dict().items() if k != "text"},
                pretty=False,
            )
        if interrupted:
            note("(stopped; /regenerate asks again)")
        if self.stats:
            note(paint(self._summary(answer), "dim", sys.stderr))
        return True

    def _summary(self, answer) -> str:
        rate = f", {answer.rate:.1f} tokens/s" if answer.rate else ""
        cut = ", cut at its token limit" if answer.finish_reason == "length" else ""
        return (
            f"[{len(answer.token_ids)} tokens{cut}{rate}, first after {answer.first_seconds:.2f} s; "
            f"{answer.used} of {self.session.limit} in use]"
        )

    # --- commands

    def _command(self, line: str) -> bool:
        """Run a command; whether to go on."""
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit", "bye"):
            return False
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            note(f"there is no /{name}" + (f"; did you mean /{near[0]}?" if near else "; /help lists what there is"))
            return True
        COMMANDS[name].run(self, rest.strip())
        return True

    def help(self, rest: str) -> None:
        print_fields({f"  /{name} {c.arguments}".rstrip(): c.help for name, c in COMMANDS.items()}, sys.stderr)
        note('\nSeveral lines: begin and end with """, or end a line with \\. A line that begins with / is said with //.')

    def reset(self, rest: str) -> None:
        self.session.reset()
        note("(a new conversation)")

    def system(self, rest: str) -> None:
        if rest:
            self.session.system = None if rest == "none" else rest
            note("(set for the answers from here on)")
        else:
            note(
                "(what the template has by itself)" if self.session.system is None else visible(self.session.system, sys.stderr)
            )

    def save(self, rest: str) -> None:
        path = self._path(rest, "save")
        if path and (not path.exists() or agrees(f"{path} exists. Overwrite it?")):
            self.session.save(path)
            note(f"({len(self.session.conversation())} messages are in {path})")

    def load(self, rest: str) -> None:
        from jaxinfer.cli.session import read_conversation

        if path := self._path(rest, "load"):
            self.session.continue_with(read_conversation(path))
            note(f"({len(self.session.conversation())} messages; /show prints them)")

    def _path(self, rest: str, command: str) -> Path | None:
        if not rest:
            note(f"say which file: /{command} FILE")
        return Path(rest).expanduser() if rest else None

    def show(self, rest: str) -> None:
        for message in self.session.conversation():
            note(f"{paint(message['role'] + ':', 'bold', sys.stderr)} {visible(message.get('content') or '', sys.stderr)}")

    def params(self, rest: str) -> None:
        """Show the sampling parameters, or set some: name=value, values as JSON or plain text."""
        from jaxinfer.errors import SamplingParamsError
        from jaxinfer.sampling_params import SamplingParams

        values = {k: v for k, v in self.session.params.to_dict().items() if k not in WITHOUT}
        if rest == "reset":
            self.session.params = SamplingParams()
        elif rest:
            for part in rest.split():
                name, separator, text = part.partition("=")
                if not separator or name in WITHOUT:
                    raise SamplingParamsError(f"{part!r} sets nothing in a conversation; write it like temperature=0.7")
                values[name] = _value(text)
            self.session.params = SamplingParams.from_dict(values)
        shown = {k: v for k, v in self.session.params.to_dict().items() if k not in WITHOUT}
        print_fields({f"  {name}": json.dumps(value) for name, value in shown.items()}, sys.stderr)

    def regenerate(self, rest: str) -> None:
        last = self.session.messages[-1:]
        if not self.session.again():
            note("there is nothing to answer yet")
            return
        if self.session.params.temperature == 0:
            note("(temperature is 0: the answer will be the same; /params temperature=0.8 changes that)")
        answered = False
        try:
            answered = self._answer()
        finally:
            if not answered and last[0]["role"] == "assistant":
                self.session.messages += last  # the answer that there was

    def undo(self, rest: str) -> None:
        text = self.session.take_back()
        note("there is nothing to take back" if text is None else f"(taken back: {visible(text, sys.stderr)[:60]!r})")

    def quit(self, rest: str) -> None:
        """In the table for /help; `_command` sees it first."""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Writer:
    """Text on stdout as it comes; a bar on a terminal's stderr until the first of it is there."""

    def __init__(self, *, silent: bool):
        self._silent, self._begun, self._last = silent, False, "\n"
        self._waiting = work("thinking")

    def __enter__(self):
        self._waiting.__enter__()
        return self

    def write(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            self._waiting.__exit__(None, None, None)
        if text and not self._silent:
            print(visible(text, sys.stdout), end="", flush=True)
            self._last = text

    def __exit__(self, *raised) -> None:
        if not self._begun:
            self._waiting.__exit__(*raised)
        elif not self._silent and not self._last.endswith("\n"):
            print(flush=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    help: str
    run: Callable[[Shell, str], None]
    arguments: str = ""


COMMANDS = {
    "help": Command(help="this list", run=Shell.help),
    "regenerate": Command(help="another answer to your last message", run=Shell.regenerate),
    "undo": Command(help="take your last message and its answer back", run=Shell.undo),
    "reset": Command(help="forget the conversation; the system message stays", run=Shell.reset),
    "system": Command(arguments="[TEXT | none]", help="show or set the system message", run=Shell.system),
    "params": Command(arguments="[NAME=VALUE ... | reset]", help="show or set how answers are sampled", run=Shell.params),
    "show": Command(help="print the conversation", run=Shell.show),
    "save": Command(arguments="FILE", help="write the conversation as JSON", run=Shell.save),
    "load": Command(arguments="FILE", help="go on with one that was saved", run=Shell.load),
    "quit": Command(help="leave, as Ctrl-D does", run=Shell.quit),
}
