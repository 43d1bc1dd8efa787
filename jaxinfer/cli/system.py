"""What `info --system` tells: versions, devices, and which implementation of each operation a model takes here, and why."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

import pallas_kernels
from jaxinfer.cli.output import format_bytes, print_fields
from jaxinfer.demo import cache_dir
from pallas_kernels import registry
from pallas_kernels.cpu import library

PACKAGES = (
    *("jaxinfer", "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "optax", "orbax-checkpoint", "tensorstore"),
    *("transformers", "tokenizers", "safetensors", "gguf", "huggingface_hub", "jinja2"),
)
EXTRAS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-triton", "triton")
# What a CPU may have of use to matrices, as Linux names it.
CPU_FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
FORMS = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}} | {
    name: {"dtype": "float32", "quantization": name} for name in ("w8a8", "w4a16-g32")
}
_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,  # whole groups of 64 inputs, as models have them
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def system_facts() -> dict[str, Any]:
    """All that `info --system` prints, as JSON values."""
    memory, native = psutil.virtual_memory(), library.load()
    return {
        "versions": {"python": platform.python_version()} | _versions(PACKAGES, absent=True) | _versions(EXTRAS, absent=False),
        "host": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": _cpu_name(),
            "instruction_sets": _instruction_sets(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": memory.total,
            "available_bytes": memory.available,
        },
        "native_kernels": {"missing": native}
        if isinstance(native, str)
        else {
            "path": str(native.path),
            "instruction_sets": list(native.instruction_sets),
            "used": library.instruction_set(),
            "threads": library.threads(),
            "read_bytes_per_second": library.read_bandwidth(),
        },
        "cache": _cache(),
        "backend": jax.default_backend(),
        "platform_version": jax.devices()[0].client.platform_version.splitlines()[0],
        "devices": [_device(device) for device in jax.devices()],
        "operations": operations(),
    }


def _versions(names: tuple[str, ...], *, absent: bool) -> dict[str, str | None]:
    out: dict[str, str | None] = {}
    for name in names:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if absent:
                out[name] = None
    return out


def _cpu_name() -> str:
    found = re.search(r"^model name\s*: (.*)$", _cpuinfo(), re.M)
    return found[1] if found else platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*: (.*)$", _cpuinfo(), re.M)
    has = set(found[1].split()) if found else set()
    return [name for name in CPU_FLAGS if name in has]


@functools.cache
def _cpuinfo() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(errors="replace")
    return ""


def _cache() -> dict[str, Any]:
    files = [path for path in cache_dir().rglob("*") if path.is_file()] if cache_dir().is_dir() else []
    programs = Path(jax.config.jax_compilation_cache_dir or cache_dir() / "xla")
    compiled = [path for path in programs.iterdir() if path.is_file()] if programs.is_dir() else []
    size = lambda paths: sum(path.stat().st_size for path in paths)
    return {"folder": str(cache_dir()), "bytes": size(files), "programs": str(programs), "programs_bytes": size(compiled)}


def _device(device: jax.Device) -> dict[str, Any]:
    stats = device.memory_stats() or {}
    return {
        "id": device.id,
        "process": device.process_index,
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "memory_in_use_bytes": stats.get("bytes_in_use"),
    }


# --- operations


def full_registry():
    """The registry after every operation of pallas_kernels is imported: a room registers its implementations."""
    for module in pkgutil.iter_modules(pallas_kernels.__path__, "pallas_kernels."):
        if module.ispkg:
            importlib.import_module(module.name)
    return registry


@functools.cache  # a second trace would find jax's own caches full, and choose nothing
def operations() -> dict[str, dict[str, Any]]:
    """For each operation {"implementations": names, the most preferred first, "used": {form of weights: names}, "refused": {name: why}}.

    used is what a small Llama takes whose weights have that form, traced and not run, for the devices of this machine; an operation that
    it does not ask for, for want of it or because a larger one is used in its place, lists none.
    """
    full_registry()
    out: dict[str, dict[str, Any]] = {
        op: {"implementations": [i.name for i in registry.implementations(op)], "used": {}, "refused": {}}
        for op in registry.operations()
    }
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder))
        for form, options in FORMS.items():
            with _watched() as seen:
                _trace(folder, options)
            for op, name, reason in seen:
                if reason is None:
                    names = out[op]["used"].setdefault(form, [])
                    names += [name] * (name not in names)
                else:
                    reasons = out[op]["refused"].setdefault(name, [])
                    reasons += [reason] * (reason not in reasons)
    return out


def _write_model(folder: Path) -> None:
    from safetensors.numpy import save_file

    embed, mlp, heads = _MODEL["hidden_size"], _MODEL["intermediate_size"], _MODEL["num_key_value_heads"] * _MODEL["head_dim"]
    layer = {"self_attn.q_proj": (embed, embed), "self_attn.k_proj": (heads, embed), "self_attn.v_proj": (heads, embed)}
    layer |= {
        "self_attn.o_proj": (embed, embed),
        "mlp.gate_proj": (mlp, embed),
        "mlp.up_proj": (mlp, embed),
        "mlp.down_proj": (embed, mlp),
    }
    norms = {
        name: (embed,) for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    }
    shapes = (
        {"model.embed_tokens": (_MODEL["vocab_size"], embed)} | {f"model.layers.0.{k}": v for k, v in layer.items()} | norms
    )
    save_file({f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_MODEL))


def _trace(folder: str, options: Mapping[str, Any]) -> None:
    """Prefill, decode and sample with the model, and a greedy step of an engine, as far as jax traces them."""
    from jaxinfer.api import generate, open_model
    from jaxinfer.loading import load_model

    model = load_model(folder, **options)
    cache = options["dtype"]
    run = lambda ids: generate(model, ids, max_new_tokens=3, temperature=1.0, top_k=5, cache_dtype=cache)
    jax.eval_shape(run, jax.ShapeDtypeStruct((2, 8), np.int32))
    with contextlib.closing(open_model(folder, {"inference_max_tokens": 16, **options})) as opened:
        programs = opened.engine().programs
        programs.decode(0).trace(programs.shapes, jax.eval_shape(programs.state(1, 16)), jax.ShapeDtypeStruct((), np.int32))


@contextlib.contextmanager
def _watched() -> Iterator[list[tuple[str, str, str | None]]]:
    """A list that grows by (operation, implementation, why it cannot run or None) each time that one is considered."""
    seen: list[tuple[str, str, str | None]] = []

    def watching(implementation: registry.Implementation) -> Callable[..., bool | str]:
        def supports(target, facts) -> bool | str:
            reason = implementation.refusal(target, facts)
            seen.append((implementation.op, implementation.name, reason))
            return True if reason is None else reason

        return supports

    before = [i for op in registry.operations() for i in registry.implementations(op)]
    put = lambda i: registry.register(i.op, i.name, i.function, supports=i.supports, priority=i.priority, replace=True)
    try:
        for implementation in before:
            put(dataclasses.replace(implementation, supports=watching(implementation)))
        yield seen
    finally:
        for implementation in before:
            put(implementation)


# --- printing


def print_system(facts: dict[str, Any]) -> None:
    host, cache, native = facts["host"], facts["cache"], facts["native_kernels"]
    devices = []
    for d in facts["devices"]:
        memory = (
            f", {format_bytes(d['memory_in_use_bytes'] or 0)} of {format_bytes(d['memory_bytes'])} in use"
            if d["memory_bytes"]
            else ""
        )
        devices.append(f"{d['platform']} {d['id']}: {d['kind']}{memory}")
    versions = [f"{name} {version or '(not installed)'}" for name, version in facts["versions"].items()]
    print_fields(
        {
            "versions": _folded(versions),
            "host": f"{host['system']}\n{host['cpu']}, {host['usable_cores']} of {host['cores']} cores usable",
            "instructions": _folded(host["instruction_sets"]) or "not known",
            "memory": f"{format_bytes(host['available_bytes'])} of {format_bytes(host['memory_bytes'])} available",
            "native kernels": native.get("missing")
            or f"{native['used']} of {' > '.join(native['instruction_sets'])}, {native['threads']} threads\n"
            f"all cores read {format_bytes(native['read_bytes_per_second'])}/s from memory\n{native['path']}",
            "cache": f"{cache['folder']}, {format_bytes(cache['bytes'])}\n"
            f"{cache['programs']}, {format_bytes(cache['programs_bytes'])} of compiled programs",
            "backend": f"{facts['backend']} ({facts['platform_version']})",
            "devices": "\n".join(devices),
        }
    )
    print("\noperations: what a model takes here, by the form of its weights")
    print_fields({f"  {op}": _operation(entry) for op, entry in facts["operations"].items()})


def _operation(entry: dict[str, Any]) -> str:
    forms: dict[str, list[str]] = {}
    for form, names in entry["used"].items():
        forms.setdefault(" and ".join(names), []).append(form)
    if len(forms) == 1 and len(entry["used"]) == len(FORMS):
        lines = [next(iter(forms))]
    else:
        lines = [f"{names} for {', '.join(where)}" for names, where in forms.items()] or [
            " > ".join(entry["implementations"]) + " (a Llama asks for none here)"
        ]
    lines += [f"not {name}: {reason}" for name, reasons in entry["refused"].items() for reason in reasons]
    return "\n".join(lines)


def _folded(words: list[str], width: int = 100) -> str:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return ",\n".join(lines)
