"""The logits that transformers gives of a folder in compressed-tensors: runs with the Python of scripts/quantizers_env.sh.

    python tests/peer_readers.py FOLDER

Writes prompt.npy and logits.npy into it; ends with status 3 and the reason where the package is not there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main() -> int:
    folder = Path(sys.argv[1])
    try:
        import compressed_tensors  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        print(f"compressed-tensors cannot be had here: {error}")
        return 3
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 24))
    with torch.no_grad():
        found = model(torch.tensor(prompt)).logits
    np.save(folder / "prompt.npy", prompt)
    np.save(folder / "logits.npy", found.float().numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main())
