"""Back into other systems' forms: GPTQ, compressed-tensors and GGUF, out of tensors that are quantised as they are to be written.

Nothing is rounded here: a QTensor that the form has no place for is refused, and what was written reads back as the same QTensor.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.atomic import publish, remove_stale, temporary, terminable
from convert.errors import DestinationExistsError, UnsupportedFormatError
from convert.formats import compressed_tensors, gptq
from convert.load import Progress, QuantSpec, as_float, checked, quantized
from convert.native import save_assets
from convert.readers.base import Checkpoint, LazyTensor, TokenizerAssets
from convert.rules import Rows, parts_of, transformed
from pallas_kernels.qtensor import QTensor, levels

FORMS = ("gptq", "compressed-tensors", "gguf")
FILE_BYTES = 2 << 30  # of a safetensors file, at least
SAME_IN_GGUF = ("llama", "qwen2", "qwen3")  # model types whose tensors have the same numbers in GGUF files
# names every matrix that is quantised for export: those of attention, of MLPs and of experts
MATRIX = re.compile(r".*(_proj|\.experts\.\d+\.w[123])\.weight")
MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_STACK = re.compile(r"(?P<block>.*\.experts)\.(?P<part>w[123]|gate_proj|up_proj|down_proj)\.weight")
_FUSED = re.compile(r"(?P<block>.*\.experts)\.(?P<part>gate_up_proj|down_proj)")

type Module = Callable[[str, QTensor], dict[str, np.ndarray]]  # module name, its matrix -> its tensors


def quantized_for(
    form: str, tensors: Mapping[str, LazyTensor], spec: QuantSpec | None, model_type: str | None = None
) -> dict[str, LazyTensor]:
    """Tensors by canonical name as `form` holds them: matrices of attention and MLP rounded as `spec` says, or kept with None.

    New scales are float16, which is what the other systems read. A packed embedding or head stays so in GGUF only. Raises
    UnsupportedFormatError for an unknown form and a model whose matrices are not named as Llama's are.
    """
    _check_form(form)
    tensors = experts_apart(tensors, model_type)
    if not any(MATRIX.fullmatch(name) for name in tensors):
        raise UnsupportedFormatError(f"no tensor is named *_proj.weight: this family's matrices are not exported to {form}")
    half = spec and dataclasses.replace(spec, scale_dtype="float16")
    out = {}
    for name, tensor in tensors.items():
        if MATRIX.fullmatch(name):
            out[name] = quantized(as_float(tensor), half) if half else checked(tensor)
        else:
            out[name] = checked(tensor) if form == "gguf" else as_float(tensor)
    return out


def experts_apart(tensors: Mapping[str, LazyTensor], model_type: str | None) -> dict[str, LazyTensor]:
    """The same with a tensor for each matrix of each expert, where a file has those of all in one; under the names that other systems
    know, where transformers 5 has changed those of a Mixtral."""
    out: dict[str, LazyTensor] = {}
    own: dict[str, str] = MIXTRAL if model_type == "mixtral" else {}
    if own:
        tensors = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        found = (_STACK.fullmatch(name) or _FUSED.fullmatch(name)) if len(tensor.shape) == 3 else None
        if found is None:
            out[name] = tensor
            continue
        experts, rows = tensor.shape[:2]
        pieces = {found["part"]: tensor}
        if found["part"] == "gate_up_proj":
            half = rows // 2
            pieces = {p: transformed(tensor, (Rows(at, half, axis=1),)) for p, at in (("gate_proj", 0), ("up_proj", half))}
        for part, stack in pieces.items():
            out |= parts_of(stack, [f"{found['block']}.{e}.{own.get(part, part)}.weight" for e in range(experts)])
    return out


def export(
    dst: str | Path,
    form: str,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    assets: TokenizerAssets,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint in another form: a folder, or for gguf a file; it is complete when this returns.

    config: keys of Hugging Face's config.json. tensors: by canonical name, in the form to be written. metadata: of the GGUF file that
    the tokenizer came from, whose tokenizer a GGUF file gets. progress(done, total, name): bytes written.
    Raises DestinationExistsError where `dst` holds something, UnsupportedFormatError for what the form cannot hold.
    """
    _check_form(form)
    dst = Path(dst).expanduser().absolute()
    dst.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(dst)
    _check_destination(dst)
    with terminable(), temporary(dst) as folder:
        if form == "gguf":
            from convert.gguf_writer import write_gguf

            made = folder / "model.gguf"
            write_gguf(made, config=config, tensors=tensors, metadata=metadata or {}, progress=progress)
        else:
            if (config.get("rope_scaling") or {}).get("rope_type") == "factors":
                raise UnsupportedFormatError(
                    f"the rotary factors of a GGUF file have no key in config.json; write gguf, not {form}"
                )
            made = folder
            module, settings = _gptq(tensors) if form == "gptq" else _compressed(tensors)
            _write_safetensors(folder, tensors, module, progress)
            described = {**config, "quantization_config": settings}
            (folder / "config.json").write_text(json.dumps(described, indent=1), "utf-8")
            save_assets(folder, assets)
        publish(made, dst, _check_destination)


def export_checkpoint(
    dst: str | Path,
    form: str,
    checkpoint: Checkpoint,
    *,
    spec: QuantSpec | None = None,
    tensors: Mapping[str, LazyTensor] | None = None,
    progress: Progress | None = None,
) -> dict[str, LazyTensor]:
    """Export an opened checkpoint, its matrices rounded as `spec` says or as they are stored; returns the tensors as written.

    tensors: by canonical name, to write instead of the checkpoint's own, quantised already.
    Raises as `quantized_for` and `export` do, and UnsupportedFormatError for a native checkpoint, which has no names of other systems,
    and for a GGUF file of an architecture whose numbers differ from Hugging Face's.
    """
    if checkpoint.format == "native":
        raise UnsupportedFormatError(f"{checkpoint.path} is a native checkpoint; export the one that it was converted from")
    metadata = {}
    if checkpoint.format == "gguf":
        from convert.readers.gguf import MappedFile, read_header

        metadata = dict(read_header(MappedFile(checkpoint.path)).metadata)
        if (model_type := checkpoint.config.get("model_type")) not in SAME_IN_GGUF:
            raise UnsupportedFormatError(
                f"a GGUF file of a {model_type} is not exported; give the model's safetensors (exported are {', '.join(SAME_IN_GGUF)})"
            )
    tensors = (
        quantized_for(form, checkpoint.tensors, spec, checkpoint.config.get("model_type")) if tensors is None else dict(tensors)
    )
    assets = checkpoint.assets
    export(dst, form, config=checkpoint.config, tensors=tensors, assets=assets, metadata=metadata, progress=progress)
    return tensors


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise UnsupportedFormatError(f"format {form!r} is not written; choose one of {', '.join(FORMS)}")


def _check_destination(dst: Path) -> None:
    if os.path.lexists(dst) and not (dst.is_dir() and not any(dst.iterdir())):
        raise DestinationExistsError(f"{dst} exists; an export never overwrites, choose another place")


def _write_safetensors(folder: Path, tensors: Mapping[str, LazyTensor], module: Module, progress: Progress | None) -> None:
    """Files of at least FILE_BYTES, with an index where there are several; one of them is in memory at a time."""
    total, done = sum(t.nbytes for t in tensors.values()), 0
    held: dict[str, np.ndarray] = {}
    files: list[list[str]] = []

    def flush():
        save_file(held, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in tensors.items():
        value = tensor.read()
        parts = module(name.removesuffix(".weight"), value) if isinstance(value, QTensor) else {name: value}
        held |= {n: np.ascontiguousarray(a) for n, a in parts.items()}
        done += tensor.nbytes
        if progress:
            progress(done, total, name)
        if sum(a.nbytes for a in held.values()) >= FILE_BYTES:
            flush()
    if held or not files:
        flush()
    if len(files) == 1:
        os.rename(folder / "0.safetensors", folder / "model.safetensors")
        return
    final = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for i, file in enumerate(final):
        os.rename(folder / f"{i}.safetensors", folder / file)
    index = {"metadata": {"total_size": done}, "weight_map": {n: final[i] for i, names in enumerate(files) for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")


def _packed(tensors: Mapping[str, LazyTensor], form: str, formats: tuple[str, ...]) -> dict[str, LazyTensor]:
    """The quantised ones. Raises UnsupportedFormatError where there are none, or where one has a form that is not written."""
    packed = {name: tensor for name, tensor in tensors.items() if tensor.packed}
    if not packed:
        raise UnsupportedFormatError(f"no tensor is quantised, and {form} holds quantised matrices; say how to quantise")
    for name, tensor in packed.items():
        p = tensor.packed
        assert p is not None
        if p.format not in formats or (p.zeros_dtype is not None and p.zeros_dtype.kind == "f"):
            stored = f"{p.format} with a minimum per group" if p.zeros else p.format
            raise UnsupportedFormatError(f"{name} is {stored}, which {form} cannot hold; it holds {', '.join(formats)}")
        if not name.endswith(".weight") or len(tensor.shape) != 2:
            raise UnsupportedFormatError(f"{name} {tensor.shape} is quantised, and only matrices *.weight are in {form}")
    return packed


def _gptq(tensors: Mapping[str, LazyTensor]) -> tuple[Module, dict[str, Any]]:
    packed = _packed(tensors, "gptq", ("int4", "int8", "uint8"))
    kinds = {(t.packed.kind.bits, t.packed.group, t.packed.zeros) for t in packed.values() if t.packed}
    if len(kinds) > 1:
        raise UnsupportedFormatError(f"gptq has one form for all of its matrices, not {len(kinds)}: {sorted(map(str, kinds))}")
    ((bits, group, zeros),) = kinds
    for name, tensor in packed.items():
        if any(size % 32 for size in tensor.shape):
            raise UnsupportedFormatError(f"{name} {tensor.shape}: gptq packs outputs and inputs in multiples of 32")
        if tensor.packed and tensor.packed.activation:
            raise UnsupportedFormatError(f"{name} has quantised inputs, which gptq does not say; use compressed-tensors")

    def module(name: str, q: QTensor) -> dict[str, np.ndarray]:
        n, middle = np.asarray(levels(q)), 1 << bits - 1
        n = n.view(np.uint8) ^ 0x80 if q.format == "int8" else n
        points = np.full(q.scales.shape, middle, np.uint8) if q.zeros is None else np.asarray(q.zeros)
        return gptq.write(name, n, np.asarray(q.scales), points, group=group or n.shape[1], bits=bits)

    return module, {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group or -1,
        "sym": not zeros,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }


def _compressed(tensors: Mapping[str, LazyTensor]) -> tuple[Module, dict[str, Any]]:
    packed = _packed(tensors, "compressed-tensors", ("int4", "int8", "uint8", "fp8"))
    schemes: dict[str, dict[str, Any]] = {}
    for name, tensor in packed.items():
        p = tensor.packed
        assert p is not None
        if p.kind.bits == 4 and tensor.shape[1] % 8:
            raise UnsupportedFormatError(f"{name} {tensor.shape}: pack-quantized has inputs in multiples of 8")
        scale = {"strategy": "group" if p.group else "channel", "group_size": p.group}
        floats = p.format == "fp8"
        scheme: dict[str, Any] = {
            "format": compressed_tensors.PACKED
            if p.kind.bits == 4
            else compressed_tensors.FLOAT
            if floats
            else compressed_tensors.INT,
            "weights": {
                "num_bits": p.kind.bits,
                "type": "float" if floats else "int",
                "symmetric": not p.zeros,
                "dynamic": False,
                **scale,
            },
            "input_activations": None,
            "output_activations": None,
        }
        if p.activation:
            strategy = "tensor" if p.activation.static else "group" if p.activation.group else "token"
            scheme["input_activations"] = {
                "num_bits": 8,
                "type": "float" if p.activation.format == "fp8" else "int",
                "symmetric": True,
                "dynamic": not p.activation.static,
                "strategy": strategy,
                "group_size": p.activation.group,
            }
        key = json.dumps(scheme)
        schemes.setdefault(key, {"targets": [], **scheme})["targets"].append(name.removesuffix(".weight"))
    if len(schemes) == 1:
        next(iter(schemes.values()))["targets"] = ["Linear"]
    plain = [n.removesuffix(".weight") for n, t in tensors.items() if not t.packed and len(t.shape) == 2 and "embed" not in n]
    formats = {scheme["format"] for scheme in schemes.values()}
    return _compressed_module, {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": plain,
        "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(schemes.values())},
    }


def _compressed_module(name: str, q: QTensor) -> dict[str, np.ndarray]:
    bits, n = q.kind.bits, np.asarray(levels(q))
    offset = 1 << bits - 1
    signed = n if q.format in ("int8", "fp8") else (n.astype(np.int16) - offset).astype(np.int8)
    zeros = None if q.zeros is None else (np.asarray(q.zeros).astype(np.int16) - offset).astype(np.int8)
    out = compressed_tensors.write(name, signed, np.asarray(q.scales), zeros, bits=bits)
    return out if q.input_scale is None else out | {f"{name}.input_scale": np.asarray(q.input_scale).reshape(1)}
