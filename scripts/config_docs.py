"""Write what the configuration's code says about itself: jaxinfer/config.schema.json, and the tables in docs/configuration.md and
docs/from_deepspeed.md between the lines `<!-- begin NAME -->` and `<!-- end NAME -->`.

    python scripts/config_docs.py            # writes them
    python scripts/config_docs.py --check    # exit status 1 where one is not what the code says
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from jaxinfer import deepspeed
from jaxinfer.config_schema import PARTS, schema
from jaxinfer.values import ALIASES

ROOT = Path(__file__).parents[1]


def written(value: Any) -> str:
    """A value as JSON in a cell of a table."""
    return f"`{json.dumps(value)}`"


def values_of(rule: dict[str, Any]) -> str:
    """The values that a rule of the schema allows."""
    if "anyOf" in rule:
        return ", ".join(values_of(option) for option in rule["anyOf"])
    if "$ref" in rule:
        return "an object"
    if "enum" in rule:
        return ", ".join(written(value) for value in rule["enum"] if value not in ALIASES)
    if "pattern" in rule:
        return "a short form"
    kinds = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    names |= {"array": "a list of texts", "object": "an object"}
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "multipleOf": "multiple of"}
    bounds = " ".join(f"{word} {rule[key]}" for key, word in limits.items() if key in rule)
    return ", ".join(f"{names[kind]} {bounds}".strip() if kind in ("integer", "number") else names[kind] for kind in kinds)


def table(rules: dict[str, Any], prefix: str = "") -> list[str]:
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, rule in rules["properties"].items():
        default = written(rule["default"])
        lines.append(f"| `{prefix}{name}` | {default} | {values_of(rule)} | {rule['description']} |")
    return lines


def keys() -> str:
    """The tables of all keys: of EngineConfig, then of each of its parts."""
    root = schema()
    lines = table(root)
    for part, name in zip(PARTS, ("quantization", "engine", "kv_cache"), strict=True):
        lines += ["", f"### {name}", "", root["$defs"][part.__name__]["description"], ""]
        lines += table(root["$defs"][part.__name__], f"{name}.")
    return "\n".join(lines)


SECTIONS = {
    "docs/configuration.md": {"keys": keys},
    "docs/from_deepspeed.md": {"keys": lambda: deepspeed.markdown_table().rstrip()},
}


def texts() -> dict[Path, str]:
    """Every file that is written, with its text."""
    out = {ROOT / "jaxinfer" / "config.schema.json": json.dumps(schema(), indent=2) + "\n"}
    for page, sections in SECTIONS.items():
        text = (ROOT / page).read_text("utf-8")
        for name, make in sections.items():
            begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
            if begin not in text or end not in text:
                raise SystemExit(f"{page} has no section {name}: lines {begin.strip()!r} and {end.strip()!r}")
            body = f"{begin}\n{make()}\n\n{end}"
            text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, body=body: body, text, count=1, flags=re.S)
        out[ROOT / page] = text
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are out of date")
    args = parser.parse_args()
    stale = [path for path, text in texts().items() if not path.is_file() or path.read_text("utf-8") != text]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run python scripts/config_docs.py", file=sys.stderr)
        return int(bool(stale))
    for path, text in texts().items():
        if path in stale:
            path.write_text(text, "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
