"""What a golden case is: one random model, its config.json, its prompts, and what must show in its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

DROP = object()  # as a value in `config`: the key is not in config.json at all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One random model.

    Attributes:
      name: file name of the case.
      base: config.json of the family as some version of transformers writes it.
      config: changes against `base`; the value DROP leaves the key out.
      lengths: prompt lengths in tokens.
      misread: changes of the config under which the logits must come out different; None where nothing can be misread.
      without: the ending of tensor names that must matter: zeroed, they change the logits.
      own_head: the file holds an lm_head.weight that differs from the embedding although the config ties them.
      strip: a prefix of tensor names that the file leaves out.
      buffers: shapes of tensors that the file holds besides, and that mean nothing.
      stored: the tensors of a file, by name with their shapes, out of those of the module; by default the same.
    """

    name: str
    base: dict
    config: dict = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 6, 17)
    misread: dict | None = None
    without: str | None = None
    own_head: bool = False
    strip: str = ""
    buffers: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    stored: Callable[[dict[str, list[int]]], dict[str, list[int]]] | None = None

    def json_config(self, changes: dict | None = None) -> dict:
        """The content of config.json, optionally with more `changes`."""
        merged = self.base | self.config | (changes or {})
        return {key: value for key, value in sorted(merged.items()) if value is not DROP}
