"""The layout: which part may import which, and how long a file may be. Read from syntax trees, so nothing is imported."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "sharding", "convert", "jaxinfer")

# What each package may import of the others, itself aside.
MAY_IMPORT = {
    "pallas_kernels": set(),
    "sharding": set(),
    "convert": {"sharding", "pallas_kernels"},
    "jaxinfer": {"sharding", "pallas_kernels", "convert"},
}
# The two packages at the bottom need little more than jax itself.
ARRAYS_ONLY = {"jax", "jaxlib", "jaxtyping", "ml_dtypes", "numpy"}

# Inside jaxinfer a part imports its own row and the rows above it. A new module is given its row here.
ROWS = [
    {
        "bandwidth",
        "code_digest",
        "compilation",
        "config",
        "config_schema",
        "deepspeed",
        "demo",
        "errors",
        "hf_generate",
        "sampling_params",
        "values",
    },
    {"models", "cache", "sampling", "text", "chat", "disguise", "sandbox", "detokenize", "tokenizing"},
    {"layout"},
    {"placement"},
    {"quantization"},
    {"copying", "generation", "loading", "memory", "replacing", "requests", "stages"},
    {"programs", "scheduler"},
    {"slots"},
    {"ahead"},
    {"engine", "executables"},
    {"api", "measuring", "planning", "profiling", "quantizing", "tuning"},
    {"cli", "server", "__main__"},
]
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
WITHOUT_JAX = {"chat", "demo", "detokenize", "disguise", "sandbox", "scheduler", "text", "tokenizing"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of all that a module imports, wherever in it. `from a import b` gives a.b, b being a module or a name."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return list(imported(path.read_text(encoding="utf-8"), ".".join(parts[:-1] if is_package else parts), is_package))


def violation(path: Path, name: str) -> str | None:
    """Why the file may not import the name, or None."""
    package, *inner = path.relative_to(ROOT).with_suffix("").parts
    top, *rest = name.split(".")
    if top == "torch" or name.startswith("transformers.models"):
        return "the runtime reads checkpoints itself; torch and modelling code are for the oracle only"
    if top in PACKAGES and top != package and top not in MAY_IMPORT[package]:
        return f"{package} may import {sorted(MAY_IMPORT[package])} only"
    if package in ("pallas_kernels", "sharding") and top not in (*sys.stdlib_module_names, *ARRAYS_ONLY, package):
        in_its_file = package == "pallas_kernels" and path.name == "jax_triton.py"
        if not (in_its_file and top in ("jax_triton", "triton")):
            return f"{package} imports {sorted(ARRAYS_ONLY)} and the standard library; jax_triton in files of that name"
    if package != "jaxinfer" or inner == ["__init__"]:
        return None
    if inner[0] not in ROW_OF:
        return f"jaxinfer.{inner[0]} has no row yet: give it one in ROWS"
    if top in ("jax", "flax") and inner[0] in WITHOUT_JAX:
        return f"jaxinfer.{inner[0]} imports no jax"
    if top == "jaxinfer":
        # A name that is no part, as in `from jaxinfer import init_inference`, is one of the public names, which api has.
        target = rest[0] if rest and rest[0] in ROW_OF else "api"
        if ROW_OF[target] > ROW_OF[inner[0]]:
            return f"jaxinfer.{target} stands above jaxinfer.{inner[0]}"
    return None


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    problems = {name: why for name in imports_of(path) if (why := violation(path, name))}
    assert not problems


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("sharding/mesh.py", "import pallas_kernels.target", False),
        ("pallas_kernels/norm/pallas.py", "def f():\n    from sharding import rules", False),
        ("pallas_kernels/norm/pallas.py", "import jax_triton", False),
        ("pallas_kernels/norm/jax_triton.py", "import jax_triton, triton.language", True),
        ("pallas_kernels/norm/reference.py", "from . import pallas\nfrom .. import errors", True),
        ("sharding/mesh.py", "import flax.nnx", False),
        ("convert/load.py", "from jaxinfer.config import EngineConfig", False),
        ("convert/load.py", "import pallas_kernels.qtensor\nfrom sharding import partition", True),
        ("convert/readers/torch_zip.py", "import torch", False),
        ("jaxinfer/text.py", "import transformers\nfrom convert.readers.base import TokenizerAssets", True),
        ("jaxinfer/text.py", "from transformers.models.llama import modeling_llama", False),
        ("jaxinfer/models/attention.py", "from ..cache import dense", True),
        ("jaxinfer/models/attention.py", "from jaxinfer import engine", False),
        ("jaxinfer/models/attention.py", "from .. import engine", False),
        ("jaxinfer/models/attention.py", "from jaxinfer import init_inference", False),
        ("jaxinfer/cli/generate.py", "from jaxinfer import init_inference", True),
        ("jaxinfer/scheduler.py", "import jax.numpy", False),
        ("jaxinfer/brand_new.py", "import json", False),
    ],
)
def test_the_rule_itself(path, source, allowed):
    parts = Path(path).with_suffix("").parts
    names = imported(source, ".".join(parts), is_package=False)
    assert all(violation(ROOT / path, name) is None for name in names) == allowed


def limit(path: Path) -> int:
    """Lines that a file may have."""
    if path.parent.name == "families" and path.name not in ("__init__.py", "common.py"):  # those serve all families
        return 100
    if path == ROOT / "jaxinfer" / "__init__.py":
        return 40
    return 400 if path.name in ("pallas.py", "mosaic_gpu.py", "jax_triton.py") else 600


def test_files_are_short():
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sources(*PACKAGES, "scripts", "tests")}
    assert lengths
    assert not {str(p.relative_to(ROOT)): (n, limit(p)) for p, n in lengths.items() if n > limit(p)}
