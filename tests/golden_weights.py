"""What both sides of the golden tests share: the weights of a case, made again from its seed, and its files.

`scripts/make_golden.py` (beside torch and transformers) and the tests (beside jax) import this module, so it needs
numpy alone. Nothing large is committed: a case stores the names and shapes of its tensors and one seed.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"

# Small embeddings and small contributions to the residual keep its mean square near 1e-3, so that rms_norm_eps shows
# in the logits; q and k are larger than usual, so that attention is far from uniform and every rotary angle shows.
_GAINS = {
    "q_proj": 1.6,
    "k_proj": 1.6,
    "o_proj": 0.05,
    "down_proj": 0.08,
    "qkv_proj": 1.6,
    "c_attn": 1.6,
    "c_proj": 0.4,
    "w2": 0.08,
}
_BIASES = {"c_proj": 0.02, "ln_f": 0.05}  # larger ones would be all that a GPT-2 says, whatever it is given
_TRANSPOSED = ("c_attn", "c_proj", "c_fc")  # stored as [inputs, outputs]


def _near_normal(name: str, size: int, seed: int) -> np.ndarray:
    """`size` float32 values of mean 0 and variance 1: sums of three uniforms, from the raw bits of PCG64.

    numpy promises the raw bits of a bit generator, but not the stream of `Generator.normal`; and sums of integers
    come out the same on every machine, where logarithms and cosines do not.
    """
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(size).astype(np.uint64)
    mask = np.uint64((1 << 21) - 1)
    total = (raw & mask) + ((raw >> np.uint64(21)) & mask) + ((raw >> np.uint64(42)) & mask)
    return ((total.astype(np.float64) / 2**21 - 1.5) * 2).astype(np.float32)


def make_tensor(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """The float32 tensor `name` of the case `seed`; its scale follows from what the name says it is."""
    noise = _near_normal(name, int(np.prod(shape)), seed).reshape(shape)
    layer, kind = name.split(".")[-2:]
    if kind == "bias":
        return noise * np.float32(_BIASES.get(layer, 0.2))
    if "norm" in layer or layer.startswith("ln_"):
        return 1 + noise * np.float32(0.2)
    if layer in ("embed_tokens", "wte", "wpe"):
        return noise * np.float32(0.03)
    inputs = 1 if not shape else shape[0] if layer in _TRANSPOSED else shape[-1]
    return noise * np.float32(_GAINS.get(layer, 1.0) / np.sqrt(inputs))


def make_tensors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """All tensors of a case, float32, by their Hugging Face names."""
    return {name: make_tensor(name, shape, seed) for name, shape in shapes.items()}


def make_prompts(lengths: Sequence[int], vocab: int, seed: int) -> list[list[int]]:
    """Random token ids, one list for each length."""
    raw = np.random.PCG64([seed, zlib.crc32(b"prompts")]).random_raw(sum(lengths)).astype(np.uint64)
    ids = (raw >> np.uint64(32)) % np.uint64(vocab)
    return [part.tolist() for part in np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])]


def checksum(tensors: Mapping[str, np.ndarray]) -> int:
    """CRC-32 over all bytes in the order of the names; tells a changed generator from a wrong model."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).tobytes(), crc)
    return crc


def write_folder(folder: Path, config: Mapping[str, object], tensors: Mapping[str, np.ndarray]) -> Path:
    """Writes config.json and model.safetensors (float32) into `folder`, as Hugging Face lays a model out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, dtype="<f4").tobytes())
    return folder


def case_names(folder: Path = GOLDEN) -> list[str]:
    """The random cases that lie in `folder`: those with stored logits."""
    return sorted(path.stem for path in folder.glob("*.npz"))


def load_case(name: str, folder: Path = GOLDEN) -> dict:
    """A random case: the JSON file's content, and `logits`, one float32 array [T, V] for each prompt."""
    case = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as stored:
        case["logits"] = [stored[f"logits_{i}"] for i in range(len(case["prompts"]))]
    return case


def write_case_folder(case: Mapping, folder: Path) -> Path:
    """Makes the weights of a loaded case again, checks them and writes the model folder."""
    tensors = make_tensors(case["tensors"], case["seed"])
    if (found := checksum(tensors)) != case["weights_crc32"]:
        raise ValueError(
            f"the weights made from seed {case['seed']} have CRC-32 {found}, but the golden file was written with "
            f"{case['weights_crc32']}: golden_weights.py has changed since; run scripts/make_golden.py again"
        )
    return write_folder(folder, case["config"], tensors)


def first_difference(
    found: Sequence[int], expected: Sequence[int], gaps: Sequence[float], runner_up: Sequence[int], tie: float = 1e-4
) -> int | None:
    """Where `found` leaves `expected` without the excuse of a tie, or None.

    At a step whose two best logits lie within `tie` the second best may be taken instead; from there on the texts
    are different texts and are not compared.
    """
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours != theirs:
            return None if gaps[step] < tie and ours == runner_up[step] else step
    return None if len(found) == len(expected) else min(len(found), len(expected))
