"""Write the tables of docs/ that are made from the code: docs/support.md and docs/errors.md.

python scripts/make_docs.py            # writes them
python scripts/make_docs.py --check    # exit status 1 where one is not what the code says
python scripts/make_docs.py --reference build/reference    # the API reference, from the docstrings, by pdoc
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import unittest.mock
import warnings
from pathlib import Path

import jaxinfer
import pallas_kernels
from jaxinfer import errors
from jaxinfer.models import families
from pallas_kernels import registry

DOCS = Path(__file__).parents[1] / "docs"
NOTE = "<!-- written by scripts/make_docs.py -->\n\n"


def paragraph(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def support() -> str:
    """The support matrix: families by architecture, operations by implementation."""
    for module in pkgutil.iter_modules(pallas_kernels.__path__, "pallas_kernels."):
        if module.ispkg:
            importlib.import_module(module.name)
    lines = [
        "# What is supported",
        "",
        "## Families",
        "",
        "| architecture in config.json | what it is | file |",
        "|---|---|---|",
    ]
    for architecture, family in sorted(families.FAMILIES.items()):
        module = sys.modules[family.config.__module__]
        name = module.__name__.rpartition(".")[2]
        lines.append(f"| `{architecture}` | {paragraph(module)} | [{name}.py](../jaxinfer/models/families/{name}.py) |")
    lines += [
        "",
        "Every family is compared with transformers on random configurations, alone, in a padded batch, with a cache, and on meshes; any",
        "family runs under tensor, pipeline and data parallelism and with every quantisation. Another architecture is refused by name.",
        "",
        "## Operations",
        "",
        "Which implementations an operation has, the most preferred first. The one that runs is chosen when a program is traced, by the",
        "device and by shapes and formats; `jaxinfer info --system` prints the choice and its reasons for the machine at hand.",
        "",
        "| operation | implementations |",
        "|---|---|",
    ]
    for op in registry.operations():
        names = ", ".join(f"`{i.name}`" for i in registry.implementations(op))
        lines.append(f"| `{op}` | {names} |")
    return NOTE + "\n".join(lines) + "\n"


def error_classes() -> str:
    """Every error class with its base and what it says about itself."""
    lines = [
        "# Errors",
        "",
        "What jaxinfer refuses, it refuses with a class of its own, before anything is compiled or written; the message gives value, limit",
        "and what to do. All are in `jaxinfer.errors`; `jaxinfer.errors.EXPECTED` is the tuple of their bases, for one `except`.",
        "",
        "```python",
        "import jaxinfer",
        "",
        'engine = jaxinfer.init_inference("demo", {"inference_max_tokens": 64})',
        "try:",
        "    engine.generate([[1] * 100])",
        "except jaxinfer.errors.TokenLimitError as error:",
        "    print(error)",
        "```",
        "",
        "| class | base | when |",
        "|---|---|---|",
    ]
    for name in sorted(errors.__all__):
        cls = getattr(errors, name)
        if not inspect.isclass(cls):
            continue
        lines.append(f"| `{name}` | `{cls.__bases__[0].__name__}` | {paragraph(cls)} |")
    return NOTE + "\n".join(lines) + "\n"


PAGES = {"support.md": support, "errors.md": error_classes}


def write_reference(folder: Path) -> None:
    """The API reference as HTML. Warnings of pdoc, such as a name that leads nowhere, are errors."""
    import pdoc

    for name in jaxinfer.__all__:  # they are imported when first used, and pdoc looks at what is there
        vars(jaxinfer)[name] = getattr(jaxinfer, name)
    if importlib.util.find_spec("jax_triton") is None:  # optional: pdoc reads the file that imports it all the same
        for name in ("jax_triton", "triton", "triton.language"):
            sys.modules[name] = unittest.mock.MagicMock()
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc("jaxinfer", "convert", "pallas_kernels", "sharding", output_directory=folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say which pages are out of date")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="write the API reference there, and nothing else")
    args = parser.parse_args()
    if args.reference:
        write_reference(args.reference)
        return 0
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not args.check:
                path.write_text(text, encoding="utf-8")
                print(f"wrote {path}")
    if args.check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/make_docs.py", file=sys.stderr)
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
