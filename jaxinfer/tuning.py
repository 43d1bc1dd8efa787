"""Tiles for the kernels of a model: which ones its programs ask for, found by tracing them, and the fastest of each on this GPU.

No weight is read. Without a model, the shapes of Llama-3.1-8B are taken: one layer of it, since all are alike.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.ahead import Traffic
from jaxinfer.api import open_model
from jaxinfer.config import EngineConfig, QuantizationConfig
from jaxinfer.engine import SCORE_ROWS
from jaxinfer.errors import BackendError, ConfigError
from pallas_kernels import tuner, tuning
from pallas_kernels.cases import cases
from pallas_kernels.deviceless import topology_mesh, trace_for
from pallas_kernels.gpus import KNOWN
from pallas_kernels.gpus import capability as gpu_capability
from pallas_kernels.launch import gpu_refusal
from pallas_kernels.target import Target
from pallas_kernels.tuner import Candidate, Task, Timer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
FORMS: tuple[dict[str, Any], ...] = (
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "quantization": QuantizationConfig(weight_bits=8, activation_bits=16)},
    {"dtype": "bfloat16", "quantization": QuantizationConfig(weight_bits=4, activation_bits=16, group_size=128)},
)

type Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """A task and what was tried for it: measured, the fastest first; or compiled only, the default tile first."""

    task: Task
    candidates: Sequence[Candidate]


def tasks(
    model: str | Path | None, config: EngineConfig, traffic: Traffic, *, ops: Sequence[str] = (), gpu: str | None = None
) -> list[Task]:
    """The tiles that an engine's programs ask for.

    model: see `init_inference`; None takes Llama-3.1-8B's shapes, with bfloat16, INT8 and INT4 weights unless the config says which. gpu: a
    GPU that is not here, one of `gpus.KNOWN`; else those that are. ops: only tiles of these operations, or of tiles by these names; those
    that the programs have none of as in `pallas_kernels.cases`. Raises ConfigError for one that does not occur there either, and what
    `init_inference` raises before it reads weights.
    """
    devices = None if gpu is None else list(topology_mesh(gpu, (config.engine.devices,), ("x",)).devices)

    def trace() -> None:
        with contextlib.nullcontext(model) if model is not None else shapes_of_llama() as source:
            forms = [config]
            if model is None and config.dtype is None and config.quantization is None:
                forms = [dataclasses.replace(config, **form) for form in FORMS]
            for form in forms:
                engine = open_model(source, form, devices=devices).engine()
                engine.walk(lambda need: None).traffic(traffic, score_rows=SCORE_ROWS)

    names = lambda tasks: {name for task in tasks for name in (task.op, task.call.implementation.op)}
    found = tuner.record(trace)
    if others := set(ops) - names(found):
        more = tuner.record(lambda: _trace_cases(gpu))
        if unknown := sorted(others - names(more)):
            known = ", ".join(sorted(names(found) | names(more)))
            raise ConfigError(f"{', '.join(unknown)}: no tile of that operation is asked for; there are {known or 'none'}")
        found += [task for task in more if names([task]) & others]
    return [task for task in found if not ops or names([task]) & set(ops)]


def _trace_cases(gpu: str | None) -> None:
    """Operations at the sizes of real models, as far as the GPU has kernels for them. gpu: one that is not here, else the one that is."""
    capability = KNOWN[gpu].capability if gpu else gpu_capability(jax.local_devices()[0].device_kind)
    for case in cases():
        if capability is not None and capability >= case.since:
            if gpu is None:
                jax.eval_shape(lambda *args, case=case: case.run(*args), *case.args)
            else:
                trace_for(gpu, case.run, *case.args)


@contextlib.contextmanager
def shapes_of_llama(layers: int = 1, shape: Mapping[str, Any] = LLAMA) -> Iterator[Path]:
    """A checkpoint of Llama-3.1-8B's shapes whose file has a beginning that describes it, and a hole in place of the weights. shape: a
    config.json of its kind with other sizes."""
    width, mlp, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer: dict[str, tuple[int, ...]] = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    layer |= {f"self_attn.{name}_proj": (width, width) for name in "qo"}
    layer |= {f"self_attn.{name}_proj": (heads, width) for name in "kv"}
    layer |= {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocab, width),
        "model.norm": (width,),
        "lm_head": (vocab, width),
    }
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    header, end = {}, 0
    for name, size in shapes.items():
        begin, end = end, end + 2 * int(np.prod(size))
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + end)
        (Path(folder) / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": layers}))
        yield Path(folder)


def check_gpu() -> jax.Device:
    """The GPU to measure on. Raises BackendError where there is none that the kernels are made for."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        raise BackendError(
            f"tiles are measured on an NVIDIA GPU, and the device here is a {device.platform}; "
            "--compile-only CARD lists the legal ones of a GPU that is not here"
        )
    if reason := gpu_refusal(Target(platform="gpu", device_kind=device.device_kind)):
        raise BackendError(f"there is nothing to tune: {reason}")
    return device


def measure(
    found: Sequence[Task],
    folder: Path,
    *,
    timer: Timer = tuner.clock,
    repeats: int = tuner.REPEATS,
    progress: Progress | None = None,
) -> list[Tuned]:
    """Measure every task on the GPU that is here, and store each result in `folder` at once. timer, repeats: see `tuner.best`. Raises
    BackendError."""
    device = check_gpu()
    done = []
    for number, task in enumerate(found):
        if progress:
            progress(number, len(found), task.op)
        measured = tuner.best(task, timer=timer, repeats=repeats)
        tuning.save(folder, device.device_kind, task.op, [tuner.entry(task, measured)])
        done.append(Tuned(task=task, candidates=measured))
    return done


def compile_only(found: Sequence[Task], gpu: str, *, progress: Progress | None = None) -> list[Tuned]:
    """What the default tiles and their neighbours take of a GPU that need not be here."""
    done = []
    for number, task in enumerate(found):
        if progress:
            progress(number, len(found), task.op)
        done.append(Tuned(task=task, candidates=tuner.candidates(task, gpu)))
    return done


def to_dict(tuned: Tuned) -> dict[str, Any]:
    """JSON values."""
    task = tuned.task
    rows = []
    for c in tuned.candidates:
        row: dict[str, Any] = {"tile": dataclasses.asdict(c.tile), "refusal": c.refusal, "seconds": c.seconds}
        row["kernels"] = [dataclasses.asdict(kernel) for kernel in c.kernels]
        rows.append(row)
    operation = {"op": task.op, "operation": task.call.implementation.op, "key": dict(task.key)}
    return operation | {"default": dataclasses.asdict(task.default), "candidates": rows}
