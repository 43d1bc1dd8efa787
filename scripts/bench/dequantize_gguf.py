"""Writes a GGUF file anew with float32 tensors: the form that other formats are made from, with everything else as it is.

    python scripts/bench/dequantize_gguf.py MODEL.gguf FLOAT32.gguf

What was rounded stays rounded: the new file holds exactly the numbers that the old one stands for.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import numpy as np


def dequantize(source: Path, target: Path) -> None:
    """`target` appears under its name only when it is complete."""
    reader = gguf.GGUFReader(source)
    unfinished = target.with_name(f"{target.name}.part{os.getpid()}")
    writer = gguf.GGUFWriter(unfinished, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        # the writer states the format's own fields and the architecture itself
        if field.name.startswith("GGUF.") or field.name in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE):
            continue
        kind, *of = field.types
        writer.add_key_value(field.name, field.contents(), kind, of[-1] if of else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    dequantize(args.source, args.target)


if __name__ == "__main__":
    main()
