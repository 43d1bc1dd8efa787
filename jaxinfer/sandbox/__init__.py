"""Jinja in bounded time and memory: a chat template is a program that a stranger wrote.

Two rules hold together. No value that a template can reach grows beyond a limit, so that no single operation takes long; and every
operation is paid for out of a budget, so that their sum ends. Both grow with what the caller gives, and neither knows a clock, a
signal or another thread: the same template and the same messages always end the same way.

How it is held: operators, calls, filters and tests go through the sandbox and are measured, growth before it happens
(`operations`). What Jinja compiles to plain Python (literals, comparisons, `~`, slices, loops) is rewritten to pass through filters
of our own, and each body that can run again begins by paying for its size (`environment`). What may be called is listed; what is not
on a list does not exist.
"""

from jaxinfer.sandbox.budget import BudgetError
from jaxinfer.sandbox.environment import compile_template, render

__all__ = ["BudgetError", "compile_template", "render"]
