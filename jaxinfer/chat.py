"""Chat templates: the Jinja text that a checkpoint brings, rendered in a sandbox because it is somebody else's program."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxinfer.errors import ChatTemplateError, NoChatTemplateError

type Template = str | Sequence[Mapping[str, str]]


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (the type that jinja2 declares)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes < > & ' for HTML; a model must read the characters themselves.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> jinja2.Environment:
    # The block settings and the names below are what templates on the hub are written for.
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


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

    def render(
        self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, tools: Sequence[Mapping] | None = None
    ) -> str:
        """The text of a conversation.

        messages: each a mapping with a "role" (system, user, assistant, tool) and mostly a "content". tools: JSON schemas of
        functions that the model may call. add_generation_prompt: end with the opening of the assistant's turn.
        Raises NoChatTemplateError, or ChatTemplateError with the template's own message.
        """
        self._check(messages, tools)
        template = self._select(tools is not None)
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # the template is a program of its own and may raise anything
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ChatTemplateError(f"the chat template refuses {len(messages)} messages ({roles}): {error}") from error

    @staticmethod
    def _check(messages: Sequence[Mapping], tools: Sequence[Mapping] | None) -> None:
        if isinstance(messages, str | Mapping) or not messages:
            raise ChatTemplateError(f'messages must be a list like [{{"role": "user", "content": "Hi"}}], not {messages!r}')
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ChatTemplateError(f'message {i} must be a mapping with a "role", not {message!r}')
        for i, tool in enumerate(tools or ()):
            if not isinstance(tool, Mapping):
                raise ChatTemplateError(f"tool {i} must be the JSON schema of a function as a mapping, not {tool!r}")

    def _select(self, with_tools: bool) -> jinja2.Template:
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            have = f"only templates named {sorted(self._sources)}" if self._sources else "no chat template"
            raise NoChatTemplateError(f"this checkpoint has {have}; pass the prompt as plain text instead of messages")
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._sources[name])
            except jinja2.TemplateError as error:
                raise ChatTemplateError(f"the chat template {name!r} does not compile: {error}") from error
        return self._compiled[name]
