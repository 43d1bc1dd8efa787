"""The logits that other systems give of a folder that was exported: runs with the Python of scripts/quantizers_env.sh.

    python tests/peer_readers.py FOLDER

Writes prompt.npy and logits.npy into it, through transformers for compressed-tensors and GPTQModel for GPTQ; ends with status 3 and the
reason where these are not there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    folder = Path(sys.argv[1])
    try:
        from peer_quantizers import compressed_logits, gptq_logits, import_gptqmodel

        method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
        if method == "gptq":
            import_gptqmodel()
        else:
            import compressed_tensors  # noqa: F401
    except ImportError as error:
        print(f"what reads {folder.name} cannot be had here: {error}")
        return 3
    (gptq_logits if method == "gptq" else compressed_logits)(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
