"""`jaxinfer score`: how likely a model finds texts: perplexity, and the log-probability of each token."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer.cli.options import SOURCE_HELP, add_engine, engine_config, load_engine, start, token_ids
from jaxinfer.cli.output import paint, print_fields, print_json, work

STDIN = Path("-")
SCORED_TOGETHER = 4  # windows between two steps of the progress bar
PROTOCOL = """A text that fits in one window is scored as a prompt is read, with the model's own first token; its first token has no
probability. A longer one is tokenised in one go without special tokens and cut into windows of --window tokens without overlap, of
which the last, partial one is left out; in each window all tokens but the first are scored. Perplexity is exp of the mean negative
log-likelihood of the scored tokens, of all texts together for the total."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "score",
        help="perplexity and log-probabilities of texts",
        description=f"Print how likely a model finds texts.\n\n{PROTOCOL}",
        epilog="""examples:
  jaxinfer score demo --text "The capital of France is Paris." --tokens
  jaxinfer score model.gguf --file wikitext2_valid.txt --window 1024 --windows 40
  cat essay.txt | jaxinfer score path/to/hf-folder --dtype bfloat16 --json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    texts = parser.add_argument_group("texts (each may be given several times; without any, stdin is read where it is piped)")
    add: dict[str, Any] = {"action": "append", "dest": "texts"}
    texts.add_argument("--text", metavar="TEXT", **add)
    texts.add_argument("--file", metavar="FILE", type=Path, **add, help="as it is, its last newline included")
    texts.add_argument("--ids", metavar="1,2,3", type=token_ids, **add, help="token ids, which need no tokenizer")
    texts.add_argument("--window", metavar="N", type=int, help="tokens that are read together; by default --max-length")
    texts.add_argument("--windows", metavar="N", type=int, help="score at most the first N windows of each text")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--tokens", action="store_true", help="tell every token: its log-probability, and what was expected instead"
    )
    output.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_engine(parser)
    parser.set_defaults(run=run, parser=parser)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """A text and its windows. tokens: of the whole text; left_out: those at its end that were not read."""

    name: str
    tokens: int
    left_out: int
    windows: list  # of ScoreResult

    @property
    def scored(self) -> int:
        return sum(len(window.token_ids) - 1 for window in self.windows)

    @property
    def total_logprob(self) -> float:
        return sum(window.total_logprob for window in self.windows)

    def to_dict(self) -> dict[str, Any]:
        counts = {
            "tokens": self.tokens,
            "scored_tokens": self.scored,
            "left_out_tokens": self.left_out,
            "windows": len(self.windows),
        }
        return {"name": self.name} | counts | summary([self])


def summary(texts: Sequence[Scored]) -> dict[str, Any]:
    """Sums and means over the scored tokens of texts."""
    count, total = sum(text.scored for text in texts), sum(text.total_logprob for text in texts)
    nll = -total / count
    # beyond what a float holds there is no such number in JSON either
    return {"total_logprob": total, "nll": nll, "perplexity": math.exp(nll) if nll < 700 else None}


def run(args: argparse.Namespace) -> int:
    texts = _texts(args)
    for name in ("window", "windows"):
        value = getattr(args, name)
        if value is not None and value < (least := 2 if name == "window" else 1):
            args.parser.error(f"--{name} is {value}; give at least {least}")
    start(args)
    from jaxinfer.errors import ConfigError

    config = engine_config(args)
    window = config.inference_max_tokens if args.window is None else args.window
    if window > config.inference_max_tokens:
        raise ConfigError(
            f"--window is {window}, the engine reads {config.inference_max_tokens} tokens; raise --max-length with it"
        )
    engine = load_engine(args.source, config)
    parts = [_windows(engine, name, text, window, args.windows) for name, text in texts]
    scored = _score(engine, parts)
    if args.json:
        tell = lambda text: text.to_dict() | ({"scores": _listed(engine, text)} if args.tokens else {})
        print_json({"source": args.source, "window": window, "texts": [tell(t) for t in scored], "total": summary(scored)})
    else:
        _print(engine, scored, args.tokens)
    return 0


def _texts(args: argparse.Namespace) -> list[tuple[str, str | list[int]]]:
    """Names and texts as the command line gives them. Raises PromptError for a file that cannot be read."""
    from jaxinfer.errors import PromptError

    given = args.texts
    if not given:
        if sys.stdin is None or sys.stdin.isatty():
            args.parser.error("give a text with --text, --file or --ids, or pipe one in")
        given = [STDIN]
    out: list[tuple[str, str | list[int]]] = []
    for number, text in enumerate(given, 1):
        if not isinstance(text, Path):
            out.append((f"text {number}", text))
            continue
        try:
            out.append(
                ("stdin" if text == STDIN else str(text), sys.stdin.read() if text == STDIN else text.read_text("utf-8"))
            )
        except OSError as error:
            raise PromptError(f"the file {text} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise PromptError(f"{text} is not UTF-8 text: {error}") from error
    return out


def _windows(engine, name: str, text: str | list[int], window: int, most: int | None) -> tuple[str, int, list[list[int]]]:
    """(name, tokens of the text, its windows), see PROTOCOL. Raises PromptError where there is nothing to score."""
    from jaxinfer.errors import PromptError

    if isinstance(text, str) and engine.tokenizer is None:
        raise PromptError(f"{name} is text, and the checkpoint has no tokenizer; give token ids with --ids")
    ids = engine.tokenizer.encode(text) if isinstance(text, str) else text
    if len(ids) < 2:
        raise PromptError(f"{name} has {len(ids)} tokens; from the second one on there is something to score")
    if len(ids) <= window:
        return name, len(ids), [ids]
    if isinstance(text, str):
        ids = engine.tokenizer.encode(text, add_special=False)
    cut = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]
    return name, len(ids), cut[:most]


def _score(engine, parts: list[tuple[str, int, list[list[int]]]]) -> list[Scored]:
    waiting = [window for _, _, windows in parts for window in windows]
    results: list[Any] = []
    with work("scoring") as progress:
        for at in range(0, len(waiting), SCORED_TOGETHER):
            progress(at, len(waiting), "windows")
            results += engine.score(waiting[at : at + SCORED_TOGETHER])
    out = []
    for name, tokens, windows in parts:
        own, results = results[: len(windows)], results[len(windows) :]
        out.append(Scored(name=name, tokens=tokens, left_out=tokens - sum(map(len, windows)), windows=own))
    return out


def _listed(engine, text: Scored) -> list[dict[str, Any]]:
    """Each token of each window as JSON values. logprob and greedy_token_id are None for the first token of a window."""
    return [
        {"window": number, "token_id": token, "text": _piece(engine, token), "logprob": logprob, "greedy_token_id": greedy}
        for number, window in enumerate(text.windows)
        for token, logprob, greedy in zip(window.token_ids, window.logprobs, window.greedy_token_ids, strict=True)
    ]


def _piece(engine, token: int) -> str | None:
    return None if engine.tokenizer is None else engine.tokenizer.decode([token], skip_special=False)


def _print(engine, scored: list[Scored], tokens: bool) -> None:
    for number, text in enumerate(scored):
        if number:
            print()
        print(paint(text.name, "bold", sys.stdout))
        if tokens:
            for window, result in enumerate(text.windows):
                if len(text.windows) > 1:
                    print(f"  window {window + 1}")
                _print_table(engine, result)
        print_fields(_fields(text, text.scored, text.left_out))
    if len(scored) > 1:
        print(paint("\nall together", "bold", sys.stdout))
        print_fields(_fields(scored, sum(t.scored for t in scored), sum(t.left_out for t in scored)))


def _fields(texts: Scored | list[Scored], scored: int, left_out: int) -> dict[str, str]:
    values = summary([texts] if isinstance(texts, Scored) else texts)
    perplexity = "beyond 1e304" if values["perplexity"] is None else f"{values['perplexity']:.4f}"
    rest = f", {left_out} at the end left out" if left_out else ""
    return {
        "  scored": f"{scored} tokens{rest}",
        "  log-probability": f"{values['total_logprob']:.4f} in all, {-values['nll']:.5f} a token",
        "  perplexity": perplexity,
    }


def _print_table(engine, result) -> None:
    """A row for each token; those that the model would not have chosen say what it expected."""
    from rich.cells import cell_len, set_cell_size  # columns of a terminal, of which some characters take two

    shown = lambda token: str(token) if engine.tokenizer is None else _visible(_piece(engine, token) or "", token)
    width = min(28, max(5, *(cell_len(shown(token)) for token in set(result.token_ids))))
    row = lambda *cells: "  {:>5}  {}  {:>8}  {:>7}  {:<10}  {}".format(*cells).rstrip()
    print(paint(row("", set_cell_size("token", width), "log-p", "p", "", "expected"), "dim", sys.stdout))
    for position, token in enumerate(result.token_ids):
        logprob, greedy = result.logprobs[position], result.greedy_token_ids[position]
        cell = set_cell_size(shown(token), width)
        if logprob is None:
            print(row(position, cell, "-", "", "", ""))
            continue
        expected = "" if greedy == token else shown(greedy)
        line = row(position, cell, f"{logprob:.3f}", _probability(math.exp(logprob)), _bar(logprob), expected)
        print(paint(line, "red" if logprob < -6 else "yellow" if logprob < -3 else "green", sys.stdout))


def _probability(p: float) -> str:
    return f"{p:.2%}" if p >= 1e-4 else f"{p:.0e}"


def _bar(logprob: float) -> str:
    """How surprising a token is: a block for each nat below 0, ten at most."""
    return "█" * min(10, round(-logprob))


def _visible(text: str, token: int) -> str:
    """A piece of text on one line, spaces shown; bytes that are no text by themselves as the token's number."""
    if not text or "\ufffd" in text:
        return f"<{token}>"
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
