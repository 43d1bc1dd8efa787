"""Implementations of operations by name: how an operation finds its kernel, and how users add their own.

    register("rms_norm", "mine", my_function, supports=lambda target, facts: target.platform == "gpu", priority=50)

An operation asks for the facts of its arguments to be judged while it is traced; a compiled program keeps what was chosen then.
`using` says for a stretch of tracing which implementations are taken, or left out.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import jax

from pallas_kernels.errors import BackendError
from pallas_kernels.target import Target, current_target

Supports = Callable[[Target, Mapping[str, Any]], bool | str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an operation.

    supports(target, facts): True where it can run, else False or, better, a sentence that says why not.
    priority: among those that can run, the highest is taken; a reference has 0.
    """

    op: str
    name: str
    function: Callable[..., Any]
    supports: Supports
    priority: int

    def refusal(self, target: Target, facts: Mapping[str, Any]) -> str | None:
        """Why it cannot run here, or None where it can."""
        answer = self.supports(target, facts)
        if isinstance(answer, str):
            return answer
        return None if answer else f"it does not support {target.platform} ({target.device_kind}) with {_written(facts)}"


_OPERATIONS: dict[str, dict[str, Implementation]] = {}


@dataclasses.dataclass(frozen=True)
class _Wish:
    """What `using` asked for: implementations by operation, and names that are not to be chosen."""

    named: tuple[tuple[str, str], ...] = ()
    without: frozenset[str] = frozenset()


# part of the key of jax's caches of traces, so that a function traced under one wish does not serve another
_WISH = jax.make_user_context(_Wish())


@contextlib.contextmanager
def using(named: Mapping[str, str] | None = None, *, without: Sequence[str] = ()) -> Iterator[None]:
    """While inside, operations that are not told an implementation take these.

    named: implementation by operation, which runs or raises, as if it were given to the call. without: names that are not chosen for
    any operation. Nests: the inner one wins for an operation that both name. Raises BackendError for an unknown operation or name.
    """
    for op, name in (named or {}).items():
        _named(op, name)
    outer = _WISH.value
    wish = _Wish(tuple(sorted((dict(outer.named) | dict(named or {})).items())), outer.without | frozenset(without))
    with _WISH(wish):
        yield


class Observer(Protocol):
    """Is told of every call of an implementation while a trace is made; the call happens inside what `call` gives."""

    def call(
        self, implementation: Implementation, args: tuple, kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]: ...


# part of the key of jax's caches of traces, so that nothing is missed because it was traced before
_OBSERVER = jax.make_user_context(None)


@contextlib.contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """While inside, the observer is told of the calls of implementations that operations choose."""
    with _OBSERVER(observer):
        yield


def _observed(chosen: Implementation) -> Implementation:
    observer = _OBSERVER.value
    if observer is None:
        return chosen

    def function(*args: Any, **kwargs: Any) -> Any:
        with observer.call(chosen, args, kwargs):
            return chosen.function(*args, **kwargs)

    return dataclasses.replace(chosen, function=function)


def _everywhere(target: Target, facts: Mapping[str, Any]) -> bool:
    return True


def register(
    op: str,
    name: str,
    function: Callable[..., Any],
    *,
    supports: Supports = _everywhere,
    priority: int = 0,
    replace: bool = False,
) -> Implementation:
    """Add an implementation of an operation, new or known. Raises BackendError for a name that is taken, unless `replace`."""
    known = _OPERATIONS.setdefault(op, {})
    if name in known and not replace:
        raise BackendError(f"{op} has an implementation {name!r} already; choose another name, or pass replace=True")
    known[name] = Implementation(op=op, name=name, function=function, supports=supports, priority=priority)
    return known[name]


def register_file(
    op: str, name: str, module: str, *, platform: str = "gpu", priority: int = 30, needs: str | None = None
) -> Implementation:
    """Add an implementation that lives in a file of its own, imported when a trace for its platform first asks for it.

    module: such as "pallas_kernels.norm.pallas"; it has the function `<op>` and the predicate `supports_<op>(target, facts)`. Where the
    file, or what it imports, is not there, the other implementations serve and one RuntimeWarning says so: any such file may be deleted.
    needs: a package that is optional, whose absence is no cause for a warning.
    """

    def supports(target: Target, facts: Mapping[str, Any]) -> bool | str:
        if target.platform != platform:
            return f"it is made for {platform}, not for {target.platform}"
        if needs is not None and importlib.util.find_spec(needs) is None:
            return f"the package {needs} is not installed"
        loaded = _loaded(module)
        return f"{module} cannot be imported" if loaded is None else getattr(loaded, f"supports_{op}")(target, facts)

    def function(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*args, **kwargs)

    supports.__module__ = function.__module__ = module  # where their code is, which may be a user's
    return register(op, name, function, supports=supports, priority=priority)


@functools.cache
def _loaded(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        _warn_of_missing(error.name or module, str(error))
        return None


@functools.cache  # once, however many files import the one that is missing
def _warn_of_missing(name: str, reason: str) -> None:
    warnings.warn(f"kernels are left out, other implementations serve: {reason} ({name})", RuntimeWarning, stacklevel=2)


def unregister(op: str, name: str) -> None:
    """Remove an implementation. Raises BackendError where there is none of that name."""
    _named(op, name)
    del _OPERATIONS[op][name]
    if not _OPERATIONS[op]:
        del _OPERATIONS[op]


def operations() -> tuple[str, ...]:
    """Names of the operations that have an implementation, sorted."""
    return tuple(sorted(_OPERATIONS))


def implementations(op: str) -> tuple[Implementation, ...]:
    """What can run an operation, the most preferred first. Raises BackendError for an unknown operation."""
    if op not in _OPERATIONS:
        raise BackendError(f"there is no operation {op!r}; known are {', '.join(operations()) or 'none'}")
    return tuple(sorted(_OPERATIONS[op].values(), key=lambda i: (-i.priority, i.name)))


def choose(op: str, implementation: str | None = None, target: Target | None = None, **facts: Any) -> Implementation:
    """The implementation to run.

    implementation: None takes what `using` says, else the most preferred one that can run; a named one runs or raises. target:
    `current_target()` by default. facts: what the predicates judge (sizes, dtypes, formats). Raises BackendError saying what
    exists and why it does not fit.
    """
    target, wish = target or current_target(), _WISH.value
    if implementation is None:
        implementation = dict(wish.named).get(op)
    if implementation is not None:
        named = _named(op, implementation)
        reason = named.refusal(target, facts)
        if reason is not None:
            raise BackendError(
                f"{op}: {implementation!r} cannot run here: {reason}; leave implementation=None to let one be chosen"
            )
        return _observed(named)
    refusals = []
    for candidate in implementations(op):
        reason = "left out by `using`" if candidate.name in wish.without else candidate.refusal(target, facts)
        if reason is None:
            return _observed(candidate)
        refusals.append(f"{candidate.name}: {reason}")
    raise BackendError(f"{op}: nothing can run on {target.platform} ({target.device_kind}): {'; '.join(refusals)}")


def _named(op: str, name: str) -> Implementation:
    known = implementations(op)
    for candidate in known:
        if candidate.name == name:
            return candidate
    raise BackendError(f"{op} has no implementation {name!r}; there are {', '.join(i.name for i in known)}")


def _written(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in facts.items()) or "these arguments"
