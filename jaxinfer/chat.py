"""Conversations as text: messages are checked and made plain JSON, then the checkpoint's chat template writes them."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2

from jaxinfer.errors import ChatTemplateError, NoChatTemplateError
from jaxinfer.sandbox import compile_template, render

type Template = str | Sequence[Mapping[str, str]]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_DEPTH = 64  # of values inside values
MAX_NUMBER = 1 << 4096
_EXAMPLE = '[{"role": "user", "content": "Hi"}]'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Checked messages and tools: plain JSON values, the content of each message text."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None

    def texts(self) -> Iterator[str]:
        """Every text in it but roles and what templates look up: the words of other people."""
        yield from _texts(self.tools)
        for message in self.messages:
            yield from _texts({key: value for key, value in message.items() if key != "role"})

    def rewritten(self, change: Callable[[str], str]) -> "Conversation":
        """The same with all of `texts` changed."""
        messages = [{"role": message["role"]} | _mapped(message, change, without="role") for message in self.messages]
        return Conversation(messages=messages, tools=_mapped(self.tools, change))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (key for key in value if not key.isidentifier())
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _mapped(value: Any, change: Callable[[str], str], without: str | None = None) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        name = lambda key: key if key.isidentifier() else change(key)  # what templates look up stays as it is
        return {name(key): _mapped(item, change) for key, item in value.items() if key != without}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


class ChatTemplate:
    """One or several named templates with the special tokens they may name.

    source: the template, or a list of {"name", "template"} of which "default" and "tool_use" are used; None where the
    checkpoint has none, which only rendering refuses. variables: e.g. {"bos_token": "<s>"}.
    """

    def __init__(self, source: Template | None, variables: Mapping[str, str]):
        if source is None or isinstance(source, str):
            self._sources = {"default": source} if source else {}
        else:
            self._sources = {entry["name"]: entry["template"] for entry in source}
        self._variables = dict(variables)
        self._compiled: dict[str, jinja2.Template] = {}

    def checked(self, messages: Any, tools: Any = None) -> "Conversation":
        """Messages and tools as plain JSON values.

        messages: each a mapping with a "role" (system, developer, user, assistant, tool, function, or one that the template names) and
        a "content": text, or OpenAI's list of {"type": "text", "text": ...}, which are joined as they are. An assistant's may be missing
        beside "tool_calls", whose arguments may be JSON text. Other keys reach the template as they are; all are JSON values.
        tools: JSON schemas of functions that the model may call. Raises NoChatTemplateError, or ChatTemplateError naming the message.
        """
        source = self._sources[self._named(tools is not None)]
        known = lambda role: role in ROLES or f"'{role}'" in source or f'"{role}"' in source
        return Conversation(messages=checked_messages(messages, known=known), tools=checked_tools(tools))

    def render(self, conversation: "Conversation", *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation. add_generation_prompt: end with the opening of the assistant's turn.

        The template runs in a sandbox with a budget, see jaxinfer.sandbox. Raises NoChatTemplateError, or ChatTemplateError with the
        template's own message.
        """
        template = self._template(self._named(conversation.tools is not None))
        variables = {
            "messages": conversation.messages,
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render(template, variables | self._variables)
        except Exception as error:  # the template is a program of its own and may raise anything
            roles = [message["role"] for message in conversation.messages]
            named = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
            raise ChatTemplateError(
                f"the chat template refuses {len(roles)} messages ({named}): {_explained(error)}"
            ) from error

    def _named(self, with_tools: bool) -> str:
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            have = f"only templates named {sorted(self._sources)}" if self._sources else "no chat template"
            raise NoChatTemplateError(f"this checkpoint has {have}; pass the prompt as plain text instead of messages")
        return name

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            try:
                self._compiled[name] = compile_template(self._sources[name])
            except Exception as error:  # a SyntaxError, or a RecursionError or MemoryError of Python's compiler
                raise ChatTemplateError(f"the chat template {name!r} does not compile: {_explained(error)}") from error
        return self._compiled[name]


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except Exception:  # somebody's own __repr__, or a number of more digits than Python writes
        return f"a {type(value).__name__}"


def _explained(error: Exception) -> str:
    text = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 500 else text[:500] + " ..."


def checked_messages(messages: Any, *, known: Callable[[str], bool] = ROLES.__contains__) -> list[dict[str, Any]]:
    """The messages as plain JSON values with text for content. Raises ChatTemplateError naming the message and what is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ChatTemplateError(f"messages must be a list like {_EXAMPLE}, not {_shown(messages)}")
    return [_checked_message(f"message {i}", message, known) for i, message in enumerate(messages)]


def _checked_message(where: str, message: Any, known: Callable[[str], bool]) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ChatTemplateError(f'{where} must be a mapping with a "role", not {_shown(message)}')
    if not re.fullmatch(r"[A-Za-z][\w.-]{0,63}", role) or not known(role):
        raise ChatTemplateError(
            f"{where} has the role {_shown(role)}; give one of {', '.join(ROLES)}, or one that the template names"
        )
    out = {"role": role} | _plain({key: value for key, value in message.items() if key != "role"}, where)
    calls = out.get("tool_calls")
    if calls is not None:
        out["tool_calls"] = _checked_calls(where, role, calls)
    if out.get("content") is not None:
        out["content"] = _text_of(where, out["content"])
    elif not (role == "assistant" and (calls or out.get("function_call"))):
        raise ChatTemplateError(f'{where} ({role}) has no "content"; only an assistant\'s with "tool_calls" may be without')
    for key in ("name", "tool_call_id"):
        if not isinstance(out.get(key), str | None):
            raise ChatTemplateError(f'the "{key}" of {where} must be text, not {_shown(out[key])}')
    return out


def _text_of(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ChatTemplateError(f'the "content" of {where} must be text or a list of parts of text, not {_shown(content)}')
    texts = []
    for i, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise ChatTemplateError(
                f'part {i} of {where} must be {{"type": "text", "text": ...}}, not {_shown(part)}; models here read text only'
            )
        texts.append(text)
    return "".join(texts)


def _checked_calls(where: str, role: str, calls: Any) -> list[dict[str, Any]]:
    if role != "assistant" or not isinstance(calls, list):
        raise ChatTemplateError(f'"tool_calls" are a list in a message of the assistant; {where} ({role}) has {_shown(calls)}')
    out = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatTemplateError(
                f'tool call {i} of {where} must be {{"function": {{"name": ..., "arguments": ...}}}}, not {_shown(call)}'
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # as the OpenAI API has them; templates are written for the object itself
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise ChatTemplateError(f"the arguments of tool call {i} of {where} are not JSON: {error}") from error
            function = function | {"arguments": arguments}
        out.append(call | {"function": function} if "function" in call else function)
    return out


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools as plain JSON values. Raises ChatTemplateError."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ChatTemplateError(f"tools must be a list of JSON schemas of functions, not {_shown(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ChatTemplateError(f"tool {i} must be the JSON schema of a function as a mapping, not {_shown(tool)}")
    return [_plain(tool, f"tool {i}") for i, tool in enumerate(tools)]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in lists, dicts, text, numbers, bools and None alone, so that a template meets nothing with a behaviour of its own."""
    if depth > MAX_DEPTH:
        raise ChatTemplateError(f"{where} holds values that are nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and -MAX_NUMBER < value < MAX_NUMBER:
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise ChatTemplateError(
        f"{where} holds {_shown(value)}; give JSON values: text, numbers, lists and mappings with text as keys"
    )
