"""The documentation: its Python runs as it stands, its generated pages are up to date, and the reference can be built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# every block in a namespace of its own; JAX's settings are the process's, so a page that sets devices does it in its first block
RUN = """
import re, sys
text = open(sys.argv[1], encoding="utf-8").read()
for i, match in enumerate(re.finditer(r"^```python\\n(.*?)^```", text, re.M | re.S)):
    line = text[: match.start()].count(chr(10)) + 2
    print(f"-- block {i}, line {line}")
    exec(compile(chr(10) * (line - 1) + match[1], sys.argv[1], "exec"), {"__name__": "__main__"})
"""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def cache_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder with the demonstration model where the library looks for it."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "jaxinfer" / "models").mkdir(parents=True)
    shutil.copy(smollm2_gguf, folder / "jaxinfer" / "models" / smollm2_gguf.name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_examples_run(page: Path, cache_folder: Path, tmp_path: Path) -> None:
    """All blocks of a page, one after the other in a process of its own, in an empty folder."""
    env = os.environ | {"XDG_CACHE_HOME": str(cache_folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(page)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    said = done.stdout.split("-- block ")[1:]
    assert len(said) == len(blocks(page)) and all(len(part.splitlines()) > 1 for part in said), done.stdout


def test_there_are_examples() -> None:
    assert len(blocks(ROOT / "README.md")) >= 3 and sum(len(blocks(page)) for page in PAGES) >= 12


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--check"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.slow
def test_the_reference_can_be_built(tmp_path: Path) -> None:
    """pdoc reads every docstring of the public packages."""
    pytest.importorskip("pdoc")
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--reference", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "jaxinfer.html").read_text(encoding="utf-8")
    assert "micro_batch_size" in page and "init_inference" in page
