"""Fixtures that several rooms of tests share."""

import os
from pathlib import Path

import pytest

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_addoption(parser):
    parser.addoption("--golden", metavar="DIR", help="golden cases of this folder instead of tests/golden")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model: from JAXINFER_TEST_GGUF, or as scripts/demo.sh leaves it in the user's cache folder."""
    if given := os.environ.get("JAXINFER_TEST_GGUF"):
        path = Path(given)
        assert path.is_file(), f"JAXINFER_TEST_GGUF={given} is not a file"
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxinfer"
    found = sorted(cache.rglob(SMOLLM2)) if cache.is_dir() else []
    assert found, f"{SMOLLM2} is not under {cache}: run scripts/demo.sh once, or point JAXINFER_TEST_GGUF to the file"
    return found[0]
