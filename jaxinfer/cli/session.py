"""A conversation with an engine: its messages, what of them fits, and the answers. Knows no terminal. Imports no jax."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxinfer.chat import checked_messages
from jaxinfer.errors import ChatTemplateError, TokenLimitError

LEAST = 64  # tokens that an answer should have room for, where max_tokens says nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One turn of the assistant. finish_reason: "stop", "length", or "interrupted". used: tokens of the conversation with it."""

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    first_seconds: float
    seconds: float
    used: int
    logprobs: list | None

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one, or None where there were none."""
        later, seconds = len(self.token_ids) - 1, self.seconds - self.first_seconds
        return later / seconds if later > 0 and seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {"logprobs": self.logprobs and [dataclasses.asdict(token) for token in self.logprobs]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """What would have to go for the next answer to have room: the oldest `messages` messages, in `turns` turns; `tokens` would be left."""

    messages: int
    turns: int
    tokens: int


class ContextFullError(TokenLimitError):
    """A conversation that leaves no room for an answer. cut: what dropping the oldest turns would do, None where it does not help."""

    def __init__(self, message: str, cut: Cut | None):
        super().__init__(message)
        self.cut = cut


def read_conversation(path: Path) -> list[dict[str, Any]]:
    """The messages of a file that /save wrote: {"messages": [...]}, or the list alone. Raises ChatTemplateError."""
    try:
        values = json.loads(path.expanduser().read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChatTemplateError(f"{path} holds no conversation: {error}; give JSON such as /save writes") from error
    return checked_messages(values.get("messages") if isinstance(values, dict) else values, known=lambda role: True)


class Session:
    """system: text of the system message, None for what the template has by itself. messages: the others, in their order."""

    def __init__(self, engine, params):
        self.engine, self.params = engine, params
        self.system: str | None = None
        self.messages: list[dict[str, Any]] = []
        self._attempts = 0  # answers to the last message that were thrown away

    @property
    def limit(self) -> int:
        return self.engine.config.inference_max_tokens

    def conversation(self, without: int = 0) -> list[dict[str, Any]]:
        """All messages as a template takes them, but the oldest `without`."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return system + self.messages[without:]

    def prompt(self, without: int = 0) -> list[int]:
        return self.engine.chat_prompt(self.conversation(without))

    # --- what changes the conversation

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        self._attempts = 0

    def take_back(self) -> str | None:
        """Remove the last message of the user and all after it; its text, or None where there is none."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            return None
        text = self.messages[users[-1]]["content"]
        del self.messages[users[-1] :]
        self._attempts = 0
        return text

    def again(self) -> bool:
        """Throw the last answer away; whether there is something to answer then."""
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        self._attempts += 1
        return bool(self.messages)

    def drop(self, cut: Cut) -> None:
        del self.messages[: cut.messages]

    def reset(self) -> None:
        self.messages.clear()

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"messages": self.conversation()}, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def continue_with(self, messages: list[dict[str, Any]]) -> None:
        """Go on with these instead; a system message at their beginning becomes the session's."""
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        self.system = first["content"] if first else None
        self.messages = messages[1:] if first else list(messages)
        self._attempts = 0

    # --- answers

    def check_room(self) -> list[int]:
        """The prompt for the next answer. Raises ContextFullError where it leaves no room."""
        ids = self.prompt()
        wanted = self.params.max_tokens or min(LEAST, self.limit // 4)
        if len(ids) + wanted <= self.limit:
            return ids
        cut = self._cut(wanted)
        raise ContextFullError(
            f"the conversation has {len(ids)} tokens and an answer takes up to {wanted}, more than the {self.limit} that the engine "
            f"was started for; {self._advice(cut)}",
            cut,
        )

    def _advice(self, cut: Cut | None) -> str:
        if cut is None:
            return (
                "no older turns are left to drop: say it in fewer words, lower max_tokens, or start with a larger --max-length"
            )
        return f"without its oldest {_count(cut.turns, 'turn')} ({_count(cut.messages, 'message')}) it would have {cut.tokens}"

    def _cut(self, wanted: int) -> Cut | None:
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        for turns, messages in enumerate(users[1:], 1):
            tokens = len(self.prompt(messages))
            if tokens + wanted <= self.limit:
                return Cut(messages=messages, turns=turns, tokens=tokens)
        return None

    def answer(self, ids: list[int], show: Callable[[str], None]) -> Answer:
        """Let the model answer the prompt of `check_room`. show: gets the text as it comes, "" for a token without new text.

        KeyboardInterrupt ends the answer; what came before it is kept as the answer, unless it is nothing.
        """
        seed = (self.params.seed + self._attempts) % 2**32
        start, first, reason, tokens, pieces, logprobs = time.perf_counter(), 0.0, "interrupted", [], [], None
        deltas = self.engine.stream(ids, dataclasses.replace(self.params, seed=seed))
        try:
            for delta in deltas:
                first = first or time.perf_counter() - start
                tokens += delta.token_ids
                pieces.append(delta.text)
                if delta.result is not None:
                    reason, logprobs = delta.result.finish_reason, delta.result.logprobs
                show(delta.text)
        except KeyboardInterrupt:
            reason = "interrupted"
        finally:
            deltas.close()
        answer = Answer(
            text="".join(pieces),
            token_ids=tokens,
            finish_reason=reason,
            prompt_tokens=len(ids),
            first_seconds=first,
            seconds=time.perf_counter() - start,
            used=len(ids) + len(tokens),
            logprobs=logprobs,
        )
        if answer.text or reason != "interrupted":
            self.messages.append({"role": "assistant", "content": answer.text})
        return answer


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"
