"""A small random Llama that has a tokenizer and a chat template, and commands of it as processes, in pipes and in terminals."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import golden_weights
import tokenizers
from tiny_llama import TINY, tensor_shapes
from tokenizers import decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[1]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG: dict[str, Any] = TINY | {"vocab_size": 258, "num_hidden_layers": 1, "max_position_embeddings": 8192}
QUICK = ("--max-length", 160, "--micro-batch-size", 1)  # few slots, so that little is compiled


def write_model(folder: Path, *, template: str | None = CHATML) -> Path:
    """The folder, with a token for each byte, <|im_start|> and <|im_end|>, which ends a text."""
    golden_weights.write_folder(folder, CONFIG, golden_weights.make_tensors(tensor_shapes(CONFIG), seed=7))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|im_start|>": 0, "<|im_end|>": 1} | {letter: i for i, letter in enumerate(letters, 2)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "jaxinfer", *map(str, arguments)]


TIMEOUT = 120


class Terminal:
    """A command in a terminal of its own: `type` presses keys, `expect` waits for text on the screen."""

    def __init__(self, *arguments: Any, **env: str):
        self._master, slave = pty.openpty()
        self.screen, self._read_to = "", 0
        # it makes the terminal its own, so that Ctrl-C reaches it as it reaches a shell's command
        begin = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        line = [sys.executable, "-c", begin, *command(*arguments)]
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(line, env=environment(TERM="xterm", **env), start_new_session=True, **streams)
        os.close(slave)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, text: str) -> str:
        """What came since the last expectation, up to this text."""
        end = time.monotonic() + TIMEOUT
        while (at := self.screen.find(text, self._read_to)) < 0:
            assert time.monotonic() < end and self._more(end - time.monotonic()), (
                f"{text!r} does not come: {self.screen[self._read_to :]!r}"
            )
        before, self._read_to = self.screen[self._read_to : at], at + len(text)
        return before

    def at_prompt(self) -> None:
        """Wait until a line is being edited: keys that come before that are the terminal's own to interpret."""
        while self._more(0.3) or not self.screen.endswith("> "):
            if not self.screen.endswith("> "):
                assert self._more(TIMEOUT), f"no prompt comes: {self.screen[self._read_to :]!r}"

    def _more(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)

    def ends(self) -> int:
        """The exit status, after all has been read."""
        while self._more(TIMEOUT):
            pass
        return self.process.wait(TIMEOUT)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._master)


__all__ = ["CHATML", "CONFIG", "QUICK", "ROOT", "Terminal", "command", "environment", "write_model"]
