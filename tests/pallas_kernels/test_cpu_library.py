"""The native library that is not there, or cannot be built."""

import jax.numpy as jnp
import pytest

from pallas_kernels.cpu import build, library
from pallas_kernels.errors import BackendError
from pallas_kernels.registry import choose


def test_without_a_library(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(library, "PATH", tmp_path / "none.so")
    library._load.cache_clear()
    library._say_once.cache_clear()
    try:
        monkeypatch.setenv("JAXINFER_REQUIRE_NATIVE", "1")
        with pytest.raises(BackendError, match=r"JAXINFER_REQUIRE_NATIVE is set.*pallas_kernels\.cpu\.build"):
            library.load()
        monkeypatch.delenv("JAXINFER_REQUIRE_NATIVE")
        for _ in range(2):
            assert choose("argmax", shape=(1, 2), dtype=jnp.dtype("float32")).name == "reference"
        assert [r.message for r in caplog.records] == [f"running on XLA: {library.load()}"]
    finally:
        library._load.cache_clear()


def test_without_a_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main(["--output", str(tmp_path / "library.so")]) == 1
    assert "no C++ compiler" in capsys.readouterr().err
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(build.BuildError, match="cannot be run"):
        build.build(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())
