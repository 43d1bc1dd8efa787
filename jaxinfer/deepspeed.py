"""DeepSpeed's inference configuration in terms of EngineConfig: every key as data, and what it means here.

A key sets a key of EngineConfig, or is accepted at the values at which it means what happens here anyway, or is refused with what to
use instead; none is ignored. Source of names and defaults: deepspeed/inference/config.py of DeepSpeed 0.19.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.errors import ConfigError
from jaxinfer.values import check_keys, dtype_name

type Sets = Callable[[Any], dict[str, Any]]  # a value -> {dotted key of EngineConfig: value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One key of DeepSpeed's configuration.

    name: its section, if it lies in one, and itself, joined by a dot. aliases: other names for it at the same place. default: as JSON;
    None means that it is absent. target: the key here that it sets; sets: where more is to be done than to hand the value on. same: the
    values that are accepted because they change nothing here. at_most: the key here that it may not be above. section: its value is a dict
    of further keys. here: what it means here, and for a key with `same`, or with none of these, what to use instead of other values.
    """

    name: str
    aliases: tuple[str, ...] = ()
    default: Any = None
    target: str | None = None
    same: tuple[Any, ...] = ()
    sets: Sets | None = None
    at_most: str | None = None
    section: bool = False
    here: str


def _dtype(value: Any) -> dict[str, Any]:
    name = dtype_name(value)
    return {"quantization.enabled": True, "quantization.weight_bits": 8} if name == "int8" else {"dtype": name}


def _training_dtype(name: str) -> Sets:
    def sets(value: Any) -> dict[str, Any]:
        enabled = value.get("enabled") if isinstance(value, Mapping) and set(value) == {"enabled"} else value
        if not isinstance(enabled, bool):
            raise ConfigError(f"it is {value!r}; give True, False or {{'enabled': True}}: the rest is for training")
        return {"dtype": name} if enabled else {}

    return sets


def _symmetric(value: Any) -> dict[str, Any]:
    known = {"symmetric": True, "sym": True, "asymmetric": False, "asym": False}
    if value not in known:
        raise ConfigError(f"it is {value!r}; choose symmetric or asymmetric")
    return {"quantization.symmetric": known[value]}


def _activation(enabled: Any) -> dict[str, Any]:
    if not isinstance(enabled, bool):
        raise ConfigError(f"it is {enabled!r}; give True or False")
    return {"quantization.activation_bits": 8 if enabled else 16}


BOTH = (True, False)
_GROUPS = "process groups are not set up by hand: give init_inference(devices=...) and the sizes in engine"
_EXPERTS = "experts are spread over devices by engine.expert_parallel_size; leave it out"
_HALF = "{} of DeepSpeed's training configuration: True, or {{'enabled': True}}, is the dtype {}"
_FINER = "a scale per output channel (INT8) or per quantization.group_size inputs (INT4) is finer than {} of one group; for other sizes"
_WRITTEN_ONCE = (
    "`jaxinfer convert` writes a form that restores on any mesh, so that nothing is cut for one degree; leave it out"
)

KEYS = (
    Key(
        name="replace_with_kernel_inject",
        aliases=("kernel_inject",),
        default=False,
        same=BOTH,
        here="every hot operation always goes through the kernel that is chosen for the device; `jaxinfer info --system` lists them",
    ),
    Key(
        name="dtype",
        default="fp16",
        target="dtype",
        sets=_dtype,
        here="`int8` is INT8 quantisation; without it the checkpoint's dtype is kept, where DeepSpeed takes float16",
    ),
    Key(name="fp16", target="dtype", sets=_training_dtype("float16"), here=_HALF.format("fp16", "float16")),
    Key(name="bf16", target="dtype", sets=_training_dtype("bfloat16"), here=_HALF.format("bf16", "bfloat16")),
    Key(name="tensor_parallel", aliases=("tp",), default={}, section=True, here="the keys below"),
    Key(
        name="tensor_parallel.enabled",
        default=True,
        same=(True,),
        here="DeepSpeed does not read it; for one device set tp_size to 1",
    ),
    Key(name="tensor_parallel.tp_size", default=1, target="engine.tensor_parallel_size", here="any number: heads are padded"),
    Key(
        name="tensor_parallel.tp_grain_size",
        default=64,
        same=(64,),
        here="shards are whole heads, quantisation groups and blocks of 32; leave it out",
    ),
    Key(name="tensor_parallel.mpu", here=_GROUPS),
    Key(name="tensor_parallel.tp_group", here=_GROUPS),
    Key(
        name="enable_cuda_graph",
        default=False,
        same=BOTH,
        here="the decode loop is one compiled program on the device: Python launches nothing token by token, on any mesh",
    ),
    Key(
        name="use_triton",
        default=False,
        same=(False,),
        here="which kernel runs is decided for each operation and device; leave it out",
    ),
    Key(name="triton_autotune", default=False, same=(False,), here="nothing is tuned at the first call; leave it out"),
    Key(
        name="zero",
        default={},
        same=({}, {"stage": 0}),
        here="weights stay on the devices; to fit a larger model use quantization or more devices",
    ),
    Key(
        name="triangular_masking", aliases=("tm",), default=True, same=(True,), here="a decoder's mask is causal; leave it out"
    ),
    Key(
        name="moe",
        default={},
        section=True,
        here="the keys below; or True or False, as moe.enabled",
    ),
    Key(name="moe.enabled", default=True, same=BOTH, here="the checkpoint says whether there are experts"),
    Key(name="moe.ep_size", default=1, target="engine.expert_parallel_size", here="any number: experts need not divide by it"),
    Key(
        name="moe.moe_experts",
        aliases=("num_experts",),
        default=[1],
        same=([1], 1),
        here="the checkpoint says how many experts there are; leave it out",
    ),
    Key(
        name="moe.type",
        default="standard",
        same=("standard",),
        here="residual experts are not supported; there is no other setting for them",
    ),
    Key(name="moe.ep_mp_group", here=_EXPERTS),
    Key(name="moe.ep_group", aliases=("expert_group",), here=_EXPERTS),
    Key(
        name="keep_module_on_host",
        default=False,
        same=(False,),
        here="weights go from the file to the devices piece by piece and are quantised on the way; leave it out",
    ),
    Key(name="quant", default={}, section=True, here="the keys below; DeepSpeed reads them with the dtype int8 only"),
    Key(
        name="quant.enabled",
        default=True,
        target="quantization.enabled",
        here="here it quantises with every dtype, so that it is never without effect",
    ),
    Key(name="quant.activation", default={}, section=True, here="the keys below"),
    Key(
        name="quant.activation.enabled",
        default=True,
        target="quantization.activation_bits",
        sets=_activation,
        here="True is 8 bits, False 16",
    ),
    Key(name="quant.activation.num_bits", default=8, target="quantization.activation_bits", here="8 or 16"),
    Key(
        name="quant.activation.q_type",
        default="symmetric",
        same=("symmetric", "sym"),
        here="activations are quantised symmetrically; leave it out",
    ),
    Key(
        name="quant.activation.q_groups",
        default=1,
        same=(1,),
        here="a scale per quantization.activation_group_size inputs (64) is finer than one group; for other sizes set that key",
    ),
    Key(name="quant.weight", default={}, section=True, here="the keys below"),
    Key(
        name="quant.weight.enabled",
        default=True,
        target="quantization.enabled",
        here="activations are quantised together with weights only",
    ),
    Key(name="quant.weight.num_bits", default=8, target="quantization.weight_bits", here="8 or 4"),
    Key(
        name="quant.weight.q_type",
        default="symmetric",
        target="quantization.symmetric",
        sets=_symmetric,
        here="asymmetric exists for 4 bits",
    ),
    Key(
        name="quant.weight.q_groups",
        default=1,
        same=(1,),
        here=_FINER.format("a weight") + " set that key",
    ),
    Key(name="quant.weight.quantized_initialization", default={}, section=True, here="the keys below"),
    Key(name="quant.weight.quantized_initialization.num_bits", target="quantization.weight_bits", here="8 or 4"),
    Key(name="quant.weight.quantized_initialization.group_size", target="quantization.group_size", here="inputs per scale"),
    Key(
        name="quant.weight.quantized_initialization.group_dim",
        same=(1,),
        here="groups lie along the inputs, axis 1 of a weight [outputs, inputs]; set it to 1",
    ),
    Key(
        name="quant.weight.quantized_initialization.symmetric",
        target="quantization.symmetric",
        here="False exists for 4 bits",
    ),
    Key(
        name="quant.weight.post_init_quant",
        default={},
        same=({},),
        here="layers that differ are named by quantization.rules and quantization.skip; or use quantized_initialization",
    ),
    Key(name="quant.qkv", default={}, section=True, here="the key below"),
    Key(
        name="quant.qkv.enabled",
        default=True,
        same=(True,),
        here="to leave them as they are, name them in quantization.skip: *.attention.q, *.attention.k, *.attention.v",
    ),
    Key(
        name="checkpoint",
        target="checkpoint",
        here="a path, a hub id or 'demo'; or a load policy, a dict or a JSON file, whose files are safetensors in one folder",
    ),
    Key(name="base_dir", default="", target="checkpoint", here="the folder that checkpoint is relative to"),
    Key(
        name="set_empty_params",
        default=False,
        same=BOTH,
        here="no weight exists before it is read from the checkpoint",
    ),
    Key(name="save_mp_checkpoint_path", here=_WRITTEN_ONCE),
    Key(name="checkpoint_config", aliases=("ckpt_config",), default={}, section=True, here="the keys below"),
    Key(name="checkpoint_config.checkpoint_dir", target="checkpoint", here="as checkpoint"),
    Key(name="checkpoint_config.save_mp_checkpoint_path", here=_WRITTEN_ONCE),
    Key(name="checkpoint_config.base_dir", target="checkpoint", here="as base_dir"),
    Key(
        name="training_mp_size",
        default=1,
        same=(1,),
        here="checkpoints that were cut for training are not merged; convert to Hugging Face's layout first",
    ),
    Key(
        name="injection_policy",
        aliases=("injection_dict",),
        here="layers are cut along the axes that the model declares, on any mesh; leave it out",
    ),
    Key(name="injection_policy_tuple", here="see injection_policy; leave it out"),
    Key(
        name="max_out_tokens",
        aliases=("max_tokens",),
        default=1024,
        target="inference_max_tokens",
        here="prompt and new tokens together, as in DeepSpeed; a longer request is refused before anything runs",
    ),
    Key(
        name="min_out_tokens",
        aliases=("min_tokens",),
        default=1,
        at_most="inference_max_tokens",
        here="memory for all of these is reserved at the start, or the start fails",
    ),
    Key(name="return_tuple", default=True, same=(True,), here="it is about the layers of a torch module; leave it out"),
    Key(name="transposed_mode", default=False, same=(False,), here="the layout of weights is decided here; leave it out"),
    Key(name="config", aliases=("args",), here="the checkpoint's own config.json is read; leave it out"),
    Key(name="replace_method", default="auto", same=("auto",), here="deprecated in DeepSpeed too; leave it out"),
    Key(name="mp_size", default=1, target="engine.tensor_parallel_size", here="as tensor_parallel.tp_size"),
    Key(name="mpu", here=_GROUPS),
    Key(name="ep_size", default=1, target="engine.expert_parallel_size", here="as moe.ep_size"),
    Key(name="ep_group", aliases=("expert_group",), here=_EXPERTS),
    Key(name="ep_mp_group", aliases=("expert_mp_group",), here=_EXPERTS),
    Key(name="moe_experts", default=[1], same=([1], 1), here="as moe.moe_experts; leave it out"),
    Key(name="moe_type", default="standard", same=("standard",), here="as moe.type; leave it out"),
)


def _by_place() -> dict[str, dict[str, Key]]:
    """{section, "" for the top: {name or alias there: Key}}."""
    out: dict[str, dict[str, Key]] = {}
    for key in KEYS:
        section, _, name = key.name.rpartition(".")
        out.setdefault(section, {}).update({alias: key for alias in (name, *key.aliases)})
    return out


_PLACES = _by_place()
NAMES = tuple(_PLACES[""])  # of the top level, aliases included


class _Found:
    """What was set so far, by dotted key of EngineConfig, and under which name."""

    def __init__(self):
        self.values: dict[str, tuple[Any, str]] = {}
        self.at_most: dict[str, tuple[Any, str]] = {}

    def put(self, target: str, value: Any, written: str) -> None:
        other, by = self.values.setdefault(target, (value, written))
        if type(other) is not type(value) or other != value:
            raise ConfigError(f"{by} and {written} both set {target}, to {other!r} and {value!r}; leave one of them")

    def read(self, section: str, values: Mapping[str, Any], written: str = "") -> None:
        """The keys of one section; `written`: how the user wrote the way to it, with a dot at its end."""
        known = _PLACES[section]
        check_keys(values, known, written.removesuffix("."))
        off = section and values.get("enabled") is False  # what else stands in such a section means nothing
        for name, value in values.items():
            if value is not None and not (off and name != "enabled"):
                self.take(known[name], value, written + name)

    def take(self, key: Key, value: Any, written: str) -> None:
        if key.section:
            if key.name == "moe" and isinstance(value, bool):
                value = {"enabled": value}
            if not isinstance(value, Mapping):
                raise ConfigError(f"{written} is {value!r}; give a dict of {', '.join(_PLACES[key.name])}")
            self.read(key.name, value, f"{written}.")
            if key.name == "quant" and value:
                self.values.setdefault("quantization.enabled", (True, written))
        elif key.at_most:
            self.at_most[key.at_most] = value, written
        elif key.sets:
            try:
                found = key.sets(value)
            except ConfigError as error:
                raise ConfigError(f"{written}: {error}") from None
            for target, converted in found.items():
                self.put(target, converted, written)
        elif key.target == "checkpoint":
            self.put("base_dir" if key.name.endswith("base_dir") else "checkpoint", value, written)
        elif key.target:
            self.put(key.target, value, written)
        elif not any(type(value) is type(same) and value == same for same in key.same):
            same = " or ".join(map(repr, key.same))
            what = f"only {same} means the same here" if key.same else "there is nothing like it here"
            raise ConfigError(f"{written} is {value!r}, and {what}: {key.here}")


def translate(values: Mapping[str, Any], parts: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of EngineConfig's and of DeepSpeed's keys, by EngineConfig's keys only.

    parts: the names of EngineConfig's nested dicts. defaults: of its keys. Keys that nobody knows are handed on. Raises ConfigError for
    a key that is refused and for two that say different things.
    """
    found = _Found()
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name in _PLACES[""]:
            if value is not None:
                found.take(_PLACES[""][name], value, name)
        elif name in parts and isinstance(value, Mapping):
            out[name] = {inner: part for inner, part in value.items() if part is None}
            for inner, part in value.items():
                if part is not None:
                    found.put(f"{name}.{inner}", part, f"{name}.{inner}")
            if name == "quantization":
                found.values.setdefault("quantization.enabled", (True, name))
        elif name == "inference_max_tokens" and value is not None:
            found.put(name, value, name)
        else:
            out[name] = value
    checkpoint = _checkpoint(found)
    for target, (value, by) in found.values.items():
        part, _, inner = target.rpartition(".")
        if part not in parts:
            out[target] = value
            continue
        if out.get(part) is None:
            out[part] = {}
        if not isinstance(out[part], dict):
            raise ConfigError(f"{part} is {out[part]!r}, and {by} sets a part of it; give a dict")
        out[part][inner] = value
    if checkpoint is not None:
        out["checkpoint"] = checkpoint
    _check_limits(found, out, defaults)
    return out


def _check_limits(found: _Found, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Keys that only say how much another one has to hold. Raises ConfigError."""
    for target, (least, written) in found.at_most.items():
        most = values.get(target, defaults[target])
        if isinstance(least, bool) or not isinstance(least, int) or least < 1:
            raise ConfigError(f"{written} is {least!r}; give a whole number of at least 1")
        if isinstance(most, int) and least > most:
            raise ConfigError(f"{written} is {least}, {target} is {most}; raise {target}, or lower {written}")


def _checkpoint(found: _Found) -> str | None:
    """Where the model is, of checkpoint and base_dir."""
    base, base_name = found.values.pop("base_dir", ("", "base_dir"))
    value, written = found.values.pop("checkpoint", (None, "checkpoint"))
    if not isinstance(base, str | Path):
        raise ConfigError(f"{base_name} is {base!r}; give a folder")
    if value is None:
        if base:
            raise ConfigError(f"{base_name} is {str(base)!r}, and no checkpoint is given that lies in it; give checkpoint too")
        return None
    if isinstance(value, str | Path):
        path = Path(base) / value if base else value
        if Path(value).suffix != ".json":
            return str(path)
        try:
            value = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{written}: the load policy {path} cannot be read: {error}") from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{written} is {value!r}; give a path, a hub id, 'demo' or a load policy")
    return _policy_folder(value, str(base), written)


def _policy_folder(policy: Mapping[str, Any], base: str, written: str) -> str:
    """The folder that a load policy {type, checkpoints, version, base_dir, ...} points to."""
    files, base = policy.get("checkpoints"), base or policy.get("base_dir") or ""
    names = [files] if isinstance(files, str) else files
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{written}: the load policy has checkpoints {files!r}; give the folder of the model as checkpoint")
    paths = [Path(base) / name for name in names]
    if len(paths) == 1 and paths[0].is_dir():
        return str(paths[0])
    other = [path for path in paths if path.suffix != ".safetensors"]
    if other:
        raise ConfigError(
            f"{written}: the load policy lists {other[0]}; only safetensors are read that way: save the model as these, or give its folder"
        )
    folder = paths[0].parent
    if set(paths) != set(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{written}: the load policy lists {len(paths)} files that are not all safetensors of {folder}; give the folder"
        )
    return str(folder)


def markdown_table() -> str:
    """Every key as a row of a Markdown table: docs/from_deepspeed.md."""
    lines = ["| DeepSpeed's key | its default | here |", "|---|---|---|"]
    for key in KEYS:
        names = ", ".join(f"`{name}`" for name in (key.name, *key.aliases))
        if key.target:
            how = f"sets `{key.target}`"
        elif key.at_most:
            how = f"up to `{key.at_most}`"
        elif key.section:
            how = "a dict"
        elif key.same:
            how = f"accepted as {' or '.join(f'`{json.dumps(value)}`' for value in key.same)}"
        else:
            how = "refused"
        default = "" if key.default is None else f"`{json.dumps(key.default)}`"
        lines.append(f"| {names} | {default} | {how}: {key.here} |")
    return "\n".join(lines) + "\n"
