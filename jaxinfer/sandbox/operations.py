"""What a template may call and filter with, and how large the result will be."""

import itertools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.filters
import jinja2.utils
import markupsafe
from jinja2 import pass_context
from jinja2.sandbox import SandboxedFormatter

from jaxinfer.sandbox.budget import BudgetError, budget

MAX_WIDTH = 1000  # of a formatted field

# --- what grows, refused before it is made: functions of the arguments that give the size of the result


def _padded(text, width=80, *rest) -> int:
    return max(len(text), int(width))


def _replaced(text, old, new, *rest) -> int:
    return len(text) + text.count(old) * len(new)


def interleaved(between: str, texts: Iterable[str]) -> Iterable[str]:
    return itertools.islice(itertools.chain.from_iterable((between, text) for text in texts), 1, None)


def formatted(text, values) -> int:
    """Size of text % values. Raises BudgetError for wide fields."""
    if _WIDE_PERCENT.search(text):
        raise BudgetError(f"it formats a field of more than {MAX_WIDTH} characters, or of a width that it computes")
    weigh, fields = budget().weight, text.count("%")
    largest = max(map(weigh, values.values()), default=0) * fields if isinstance(values, dict) else weigh(values)
    return len(text) + largest + MAX_WIDTH * fields


_WIDE_PERCENT = re.compile(r"[%)][-+ #0]*(?:\d{4}|\*|\d{0,3}\.(?:\d{4}|\*))")
_WIDE_FIELD = re.compile(r"\d{4}")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


METHODS: dict[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier "
        "islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase "
        "title upper zfill"
    ),
    list: _names("copy count index"),
    tuple: _names("count index"),
    dict: _names("copy get items keys values"),
}
METHOD_GROWTH: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    "replace": _replaced,
}


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if _WIDE_FIELD.search(format_spec):
            raise BudgetError(f"it formats a field of more than {MAX_WIDTH} characters")
        return budget().made(super().format_field(value, format_spec))


class Format:
    """`text.format` as a template gets it."""

    def __init__(self, environment: jinja2.Environment, text: str):
        self._environment, self._text = environment, text

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return _Formatter(self._environment).vformat(self._text, args, kwargs)


# --- filters


def _safe(value: Any) -> str:
    return str(value)  # a model reads text: there is no markup to mark


def _escape(value: Any) -> str:
    return str(markupsafe.escape(str(value)))


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes < > & ' for HTML; a model must read the characters themselves.
    signs = (*(separators or ()), indent if isinstance(indent, str) else "")
    if max(map(len, signs)) > 16 or (isinstance(indent, int) and indent > 16):
        raise BudgetError("it writes JSON with an indent or separators of more than 16 characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return budget().joined(encoder.iterencode(value))


@jinja2.pass_environment
def _join(environment, value, d="", attribute=None) -> str:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return budget().joined(interleaved(str(d), map(str, value)))


def _indent(value, width=4, first=False, blank=False) -> str:
    text = str(value)
    budget().room((text.count("\n") + 2) * (len(width) if isinstance(width, str) else width))
    return jinja2.filters.do_indent(text, width, first, blank)


@jinja2.pass_environment
def _sum(environment, iterable, attribute=None, start=0):
    if attribute is not None:
        iterable = map(jinja2.filters.make_attrgetter(environment, attribute), iterable)
    for item in iterable:
        start = environment.call_binop(None, "+", start, item)
    return start


def _round(value, precision=0, method="common"):
    if not -20 <= precision <= 20:
        raise BudgetError(f"it rounds to {precision} places; 20 are possible")
    return jinja2.filters.do_round(value, precision, method)


def _format(value, *args, **kwargs) -> str:
    budget().room(formatted(str(value), kwargs or args))
    return jinja2.filters.do_format(str(value), *args, **kwargs)


def _center(value, width=80) -> str:
    budget().room(_padded(str(value), width))
    return jinja2.filters.do_center(str(value), width)


def _replace(value, old, new, count=-1) -> str:
    text, old, new = str(value), str(old), str(new)
    budget().room(_replaced(text, old, new))
    return text.replace(old, new, -1 if count is None else count)


def _batch(value, linecount, fill_with=None):
    budget().room(linecount)
    return jinja2.filters.do_batch(value, linecount, fill_with)


def _slice(value, slices, fill_with=None):
    budget().room(slices)
    return list(jinja2.filters.sync_do_slice(value, slices, fill_with))


# What jinja2 has beyond these is for HTML, or searches in more than linear time.
FILTERS: dict[str, Callable[..., Any]] = {
    name: jinja2.filters.FILTERS[name]
    for name in _names(
        "abs capitalize count d default dictsort first float groupby int items last length list lower map max min reject "
        "rejectattr reverse select selectattr sort string title trim truncate unique upper wordcount"
    )
} | {
    "batch": _batch,
    "center": _center,
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "indent": _indent,
    "join": _join,
    "replace": _replace,
    "round": _round,
    "safe": _safe,
    "slice": _slice,
    "sum": _sum,
    "tojson": _tojson,
}


# What looks at no more than the outside of its argument.
BRIEF_FILTERS = _names("count d default first last length")
BRIEF_TESTS = _names(
    "boolean callable defined divisibleby even false filter float integer iterable mapping none number odd sameas "
    "sequence string test true undefined"
)


def measured(function: Callable[..., Any], *, brief: bool) -> Callable[..., Any]:
    """A filter or test that pays for what it reads and for what it gives. With the context, so that Jinja computes none early."""
    wants = jinja2.utils._PassArg.from_obj(function)
    get = {
        None: lambda context: (),
        jinja2.utils._PassArg.context: lambda context: (context,),
        jinja2.utils._PassArg.eval_context: lambda context: (context.eval_ctx,),
        jinja2.utils._PassArg.environment: lambda context: (context.environment,),
    }[wants]

    @pass_context
    def run(context, *args, **kwargs):
        account = budget()
        account.pay(0 if brief else sum(map(account.weight, (*args, *kwargs.values()))))
        return account.made(function(*get(context), *args, **kwargs))

    return run
