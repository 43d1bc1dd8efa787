"""The sandboxed environment: templates are rewritten, compiled and rendered within a budget."""

import datetime
import functools
import itertools
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.utils
from jinja2 import nodes, pass_context
from jinja2.runtime import BlockReference, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from jaxinfer.sandbox.budget import CONTAINER, ITEM, Budget, BudgetError, budget, current, few_bits
from jaxinfer.sandbox.operations import (
    BRIEF_FILTERS,
    BRIEF_TESTS,
    FILTERS,
    METHOD_GROWTH,
    METHODS,
    Format,
    formatted,
    interleaved,
    measured,
)

MAX_SOURCE = 1 << 16  # characters of a template; the longest in use have about a third
MAX_NESTING = 60  # of statements; Python has a limit of its own, which takes Jinja long to come to
NODE = 16  # what a node of a syntax tree costs, where a body runs once more

# --- what compiled templates would do in plain Python. The names are such that no template can write them.

_MADE, _SLICED, _JOINED, _COMPARED, _EACH, _PAID = "a value", "a slice", "a text", "a comparison", "a loop", "a body"


@pass_context
def _checked(context, value):
    return budget().made(value)


@pass_context
def _sliced(context, value, start, stop, step):
    account, part = budget(), value[start:stop:step]
    if isinstance(part, str) or len(part) <= 64:
        return account.made(part)
    account.pay(CONTAINER + 8 * len(part))
    account.weighs(part, account.weight(value))  # at most; a conversation that is cut at every message is not weighed as often
    return part


@pass_context
def _concatenated(context, values):
    return budget().joined(map(str, values))


@pass_context
def _compared(context, value):
    account = budget()
    account.pay(account.weight(value))
    return value


@pass_context
def _each(context, values, cost):
    """What a loop goes through; cost: of its `if`, which runs once for every item."""
    budget().pay(operator.length_hint(values) * cost)
    return values


@pass_context
def _paid(context, cost):
    budget().pay(cost)


@pass_context
def _finalize(context, value):
    """What is printed: written to text without passing through anything else."""
    return _compared(context, value)


def _size(body: Iterable[nodes.Node]) -> int:
    return NODE * sum(1 for node in body for _ in itertools.chain((node,), node.find_all(nodes.Node)))


class _Rewriter(NodeTransformer):
    """Puts the filters above into a syntax tree."""

    def __init__(self):
        self._depth = 0

    def visit(self, node, *args, **kwargs):
        self._depth += isinstance(node, nodes.Stmt)
        if self._depth > MAX_NESTING:
            raise jinja2.TemplateSyntaxError(f"its statements are nested more than {MAX_NESTING} deep", node.lineno)
        try:
            return super().visit(node, *args, **kwargs)
        finally:
            self._depth -= isinstance(node, nodes.Stmt)

    @staticmethod
    def _through(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)

    def _made(self, node):
        node = self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._through(_MADE, node)

    visit_List = visit_Tuple = visit_Dict = _made

    def visit_Getitem(self, node):
        node = self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)]
        return self._through(_SLICED, node.node, *bounds)

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        return self._through(_JOINED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        node.expr = self._through(_COMPARED, node.expr)
        return node

    def visit_Operand(self, node):
        node = self.generic_visit(node)
        node.expr = self._through(_COMPARED, node.expr)
        return node

    def _paying(self, node):
        cost = _size(node.body)
        node = self.generic_visit(node)
        pay = self._through(_PAID, nodes.Const(cost, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(pay, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _paying

    def visit_For(self, node):
        cost = _size([node.test]) if node.test else 1
        node = self._paying(node)
        node.iter = self._through(_EACH, node.iter, nodes.Const(cost))
        return node

    def visit_ScopedEvalContextModifier(self, node):
        raise jinja2.TemplateSyntaxError("autoescape is for HTML and is not available", node.lineno)

    visit_EvalContextModifier = visit_ScopedEvalContextModifier


# --- globals


class _Namespace(jinja2.utils.Namespace):
    """Held by a template and changed by it, so it must not be part of what is written or compared."""

    def __repr__(self) -> str:
        return "<namespace>"


def _raise_exception(message: Any):
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 256:
        raise BudgetError(f"it writes the time in a format of {len(format):,} characters; 256 are possible")
    return datetime.datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (the type that jinja2 declares)

    def filter_stream(self, stream):
        return list(stream)  # all at once: a lexer that is stopped deep inside of nested brackets complains on stderr

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self):
        # the block settings and the names below are what templates on the hub are written for
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=_finalize)
        own = {_MADE: _checked, _SLICED: _sliced, _JOINED: _concatenated, _COMPARED: _compared, _EACH: _each, _PAID: _paid}
        self.filters = {name: measured(run, brief=name in BRIEF_FILTERS) for name, run in FILTERS.items()} | own
        self.tests = {name: measured(run, brief=name in BRIEF_TESTS) for name, run in self.tests.items()}  # type: ignore[arg-type]
        self.globals = {name: self.globals[name] for name in ("range", "joiner", "cycler")} | {
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self._functions = tuple(self.globals.values())

    def compiled(self, source: str) -> jinja2.Template:
        tree = _Rewriter().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None), None)

    def concat(self, pieces: Iterable[str]) -> str:
        return budget().joined(pieces)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, int | str):
            budget().pay(budget().weight(argument))  # it is hashed
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if isinstance(value, types.BuiltinMethodType) and isinstance(value.__self__, str) and value.__name__ == "format":
            return Format(self, value.__self__)
        return None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        account = budget()
        size = lambda value: len(value) if isinstance(value, str) else account.weight(value)
        container = 0
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, type(left)):
            account.room(container := size(left) + size(right))
        elif operator == "*" and isinstance(right, int) and isinstance(left, str | list | tuple):
            account.room(container := size(left) * max(right, 0))
        elif operator == "*" and isinstance(left, int) and isinstance(right, str | list | tuple):
            account.room(container := size(right) * max(left, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            few_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            account.room(formatted(left, right))
        result = super().call_binop(context, operator, left, right)
        if container and not isinstance(result, str):
            account.weighs(result, ITEM + container)  # known without looking at each part again
        return account.made(result)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, Undefined):
            return obj(*args, **kwargs)  # raises what it is about
        account = budget()
        names = kwargs.keys() - {"_loop_vars", "_block_vars"}  # Jinja's own
        given = sum(map(account.weight, (*args, *(kwargs[name] for name in names))))
        account.room(given)
        account.pay(CONTAINER if isinstance(obj, Macro) else given)
        owner: Any = getattr(obj, "__self__", None)
        if isinstance(obj, types.BuiltinMethodType) and obj.__name__ in METHODS.get(type(owner), ()):
            account.pay(account.weight(owner))
            if obj.__name__ == "join" and args:
                return account.joined(interleaved(owner, args[0]))
            if growth := METHOD_GROWTH.get(obj.__name__):
                account.room(growth(owner, *args))
        elif not (
            isinstance(obj, Macro | LoopContext | BlockReference | jinja2.utils.Joiner | Format)
            or isinstance(owner, LoopContext | jinja2.utils.Cycler)
            or any(obj is function for function in self._functions)
        ):
            raise SecurityError(f"calling {obj!r:.80} is not possible in a chat template")
        return account.made(context.call(obj, *args, **kwargs))


@functools.cache
def _environment() -> _Environment:
    return _Environment()


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. Raises jinja2.TemplateError, RecursionError or MemoryError."""
    if len(source) > MAX_SOURCE:
        raise jinja2.TemplateSyntaxError(f"it has {len(source):,} characters; {MAX_SOURCE:,} are possible", 1)
    return _environment().compiled(source)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """What a compiled template makes of JSON values. Raises BudgetError, and whatever else a template may raise."""
    current.budget = Budget(variables)
    try:
        return budget().joined(template.generate(variables))
    finally:
        del current.budget
