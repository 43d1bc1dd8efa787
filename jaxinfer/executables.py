"""Compiled programs in a folder: written once, loaded at a start that then compiles nothing.

    FOLDER/<mesh>-<digest>/       one folder for each model, form of its weights and mesh
        executables.json          what they were made for, and what each of them is
        0000-prefill.bin ...      the executables, compressed

An executable is machine code: whoever may write it decides what runs. So a folder that is found beside a checkpoint is only taken when
this user made it, by a signature with a key in the user's cache folder; a folder that the user names is taken by that. Executables
are never run by another version of anything that they were compiled with, nor on another kind of device.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import hmac
import importlib
import importlib.metadata
import io
import json
import os
import pickle
import platform
import secrets
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from jaxinfer.ahead import Need, workers
from jaxinfer.code_digest import code_digest, is_plain
from jaxinfer.demo import cache_dir
from jaxinfer.errors import ExecutablesError
from jaxinfer.programs import Program, Programs, settings
from pallas_kernels import registry
from pallas_kernels.cpu import library
from pallas_kernels.uncached import without_compilation_cache

FORMAT_VERSION = 1
FOLDER = "executables"  # beside a checkpoint
MANIFEST = "executables.json"

type Progress = Callable[[int, int, str], None]

_AGAIN = "run `jaxinfer compile` again, or start without them (executables=False)"
_PACKAGES = ("jaxinfer", "pallas_kernels", "sharding")  # that programs are made of


# --- what executables are for


def identity(programs: Programs) -> dict[str, Any]:
    """What the user chose: model, form of the weights, mesh, cache. Another one is in another folder. JSON values."""
    weights = {
        jax.tree_util.keystr(path).lstrip("."): f"{a.dtype}{list(a.shape)} {a.sharding.spec}"
        for path, a in jax.tree_util.tree_leaves_with_path(programs.shapes)
    }
    weights["tree"] = hashlib.sha256(str(jax.tree.structure(programs.shapes)).encode()).hexdigest()
    return {
        "platform": programs.mesh.devices.flat[0].platform,
        "mesh": dict(programs.mesh.shape),
        "devices": [device.id for device in programs.mesh.devices.flat],
        "model": json.loads(json.dumps(programs.plan.config.to_dict())),  # tuples as lists
        "plan": {f.name: repr(getattr(programs.plan, f.name)) for f in dataclasses.fields(programs.plan) if f.name != "config"},
        "weights": weights,
        "cache_dtype": str(programs.cache_dtype),
        "matmul_precision": programs.matmul_precision,
        "kernels": programs.kernels,
        "prefill_chunk": programs.prefill_chunk,
    }


def environment(programs: Programs) -> dict[str, Any]:
    """What an executable was compiled with and for; all of it must be the same where it runs. JSON values."""
    device = programs.mesh.devices.flat[0]
    facts: dict[str, Any] = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jaxinfer": _version(),
        "sources": _sources_digest(),
        "platform_version": device.client.platform_version,
        "device_kind": device.device_kind,
        "machine": platform.machine(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "operations": {op: [_named(i) for i in registry.implementations(op)] for op in registry.operations()},
        **settings(),
    }
    if device.platform == "cpu":
        facts["cpu_features"] = list(cpu_features())
        native = library.load()  # its calls are part of the programs
        if not isinstance(native, str):
            digest = hashlib.sha256(native.path.read_bytes()).hexdigest()
            facts["native_kernels"] = {"library": digest, "set": library.instruction_set(), "threads": library.threads()}
    return facts


def _named(implementation: registry.Implementation) -> str:
    """The name of an implementation; with a digest of its code where a user registered it, since the name may be that of another one."""
    roots = {name: _root(name) for name in _PACKAGES}
    parts = implementation.function, implementation.supports
    foreign = [part for part in parts if not is_plain(part, roots)]
    return f"{implementation.name} ({code_digest(*foreign)[:16]})" if foreign else implementation.name


def _root(package: str) -> Path:
    return Path(sys.modules[package].__path__[0])


def cpu_features() -> tuple[str, ...]:
    """Names of what this CPU can do, sorted; where the system does not tell, its name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(sorted(value.split()))
    return (platform.processor() or platform.machine(),)


def _version() -> str:
    try:
        return importlib.metadata.version("jaxinfer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _sources_digest() -> str:
    """Of the files that programs are made of: a source tree changes without its version."""
    digest = hashlib.sha256()
    for name in _PACKAGES:
        root = _root(name)
        wanted = [root / "models", *(root / f"{m}.py" for m in ("generation", "placement", "programs", "sampling"))]
        for top in wanted if name == "jaxinfer" else [root]:
            for path in sorted([*top.rglob("*.py"), *top.rglob("*.json")]) if top.is_dir() else [top]:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def differences(wanted: Any, found: Any, name: str = "") -> list[str]:
    """What of `found` is not as `wanted`, in words; dicts by their keys, lists by what is missing."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = dict.fromkeys([*wanted, *found])
        return [d for k in keys for d in differences(wanted.get(k), found.get(k), f"{name}.{k}" if name else k)]
    if wanted == found:
        return []
    if isinstance(wanted, list) and isinstance(found, list):
        more, less = [x for x in found if x not in wanted], [x for x in wanted if x not in found]
        parts = [f"{word} {', '.join(map(str, part))}" for word, part in (("without", less), ("with", more)) if part]
        return [f"{name}: made {' and '.join(parts)}"] if parts else [f"{name}: made with {found}, here it is {wanted}"]
    return [f"{name}: made with {_short(found)}, here it is {_short(wanted)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def folder_name(programs: Programs) -> str:
    """Of the folder for these programs: the mesh for people, and a digest of all that tells them apart."""
    facts = identity(programs)
    sizes = "-".join(f"{name}{size}" for name, size in facts["mesh"].items() if size > 1) or "single"
    return f"{facts['platform']}-{sizes}-{_digest(facts)[:16]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def beside(checkpoint: Path) -> Path:
    """The folder for a checkpoint's executables: in the folder that it is, or beside its file."""
    return checkpoint / FOLDER if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{FOLDER}")


# --- writing


def save(
    programs: Programs, needs: Sequence[Need], folder: Path, *, config: Mapping[str, Any], progress: Progress | None = None
) -> Path:
    """Compile programs, and write them into a folder of their own in `folder`, which replaces one for the same. It is complete when it
    appears. config: how they were chosen, for the reader. Gives that folder.

    Raises ExecutablesError for a mesh over several processes, and for an executable that could not be read back.
    """
    if len({device.process_index for device in programs.mesh.devices.flat}) > 1:
        raise ExecutablesError(
            "executables of a mesh over several processes cannot be kept; start without them, the compilation cache serves these"
        )
    target = folder / folder_name(programs)
    entries: list[dict[str, Any]] = []
    with _appearing(target) as partial:
        # an executable that came out of the persistent cache cannot be serialised again on CPUs: its code would be missing
        with without_compilation_cache():
            for done, need in enumerate(needs):
                if progress:
                    progress(done, len(needs), need.program.name)
                entries.append(_write(need, partial, len(entries)))
        manifest = {
            "format_version": FORMAT_VERSION,
            "identity": identity(programs),
            "environment": environment(programs),
            "config": dict(config),
            "programs": entries,
        }
        manifest["signature"] = _sign(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    if progress:
        progress(len(needs), len(needs), str(target))
    return target


def _write(need: Need, folder: Path, number: int) -> dict[str, Any]:
    program = need.program
    data, _, _ = serialize_executable.serialize(need.compile())
    _load(data, program)  # what could not be read back is no use
    name, packed = f"{number:04d}-{program.name}.bin", zlib.compress(data, 1)
    (folder / name).write_bytes(packed)
    return {
        "name": program.name,
        "static": {key: value for key, value in program.static.items() if value != ()},
        "arguments": [[str(dtype), list(shape)] for shape, dtype in need.signature],
        "result": _described(need.traced.out_info),
        "file": name,
        "sha256": hashlib.sha256(packed).hexdigest(),
    }


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of `target` when the block ends well, and is removed when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sibling = lambda role: target.with_name(f".{target.name}.{role}-{os.getpid()}-{secrets.token_hex(4)}")
    for left in target.parent.glob(f".{target.name}.*"):  # by a process that was killed
        if not _is_alive(left.name):
            shutil.rmtree(left, ignore_errors=True)
    partial = sibling("partial")
    partial.mkdir()
    try:
        yield partial
        old = sibling("replaced")
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(name: str) -> bool:
    """Whether the process that named a temporary folder still runs."""
    with contextlib.suppress(ValueError, ProcessLookupError, IndexError):
        os.kill(int(name.split("-")[-2]), 0)
        return True
    return False


def _sign(manifest: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in manifest.items() if key != "signature"}, sort_keys=True)
    return hmac.new(_key(), text.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's secret, made at first use and readable by nobody else."""
    path = cache_dir() / "executables.key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        made.touch(mode=0o600)
        made.write_bytes(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(made, path)  # another process may have been first
        made.unlink()
    return path.read_bytes()


# --- loading


def use(programs: Programs, wanted: str | Path | bool | None, checkpoint: Path | None) -> int:
    """Let programs run executables, as EngineConfig.executables says; how many there are.

    wanted: a folder; None for the one beside the checkpoint, where it has some for these programs; True for that one, which must have
    some; False for none. Raises ExecutablesError, see `attach`.
    """
    if wanted is False or (checkpoint is None and not isinstance(wanted, str | Path)):
        return 0
    if isinstance(wanted, str | Path):
        return attach(programs, Path(wanted).expanduser(), trusted=True)
    assert checkpoint is not None
    return attach(programs, beside(checkpoint), trusted=False, required=bool(wanted))


def attach(programs: Programs, folder: Path, *, trusted: bool, required: bool = True) -> int:
    """Let programs run the executables of a folder; how many there are.

    trusted: whether the user named the folder, and answers for what is in it; else this user must have signed it. required: whether it is
    an error when the folder has none for these programs. Files are read when they are first called for, those of the first shapes of each
    program in the background at once. Raises ExecutablesError for a folder of another format or version, for another kind of device, of
    another user, and for a damaged one.
    """
    own = folder / folder_name(programs)
    if not (own / MANIFEST).is_file():
        if required:
            raise ExecutablesError(_none_fits(programs, folder))
        return 0
    manifest = _read_manifest(own)
    if not trusted and not hmac.compare_digest(str(manifest.get("signature")), _sign(manifest)):
        raise ExecutablesError(
            f"{own} was not made by this user on this machine, and executables are code; name the folder (executables={str(folder)!r}) if "
            f"you trust who made it, or {_AGAIN}"
        )
    here, there = environment(programs), dict(manifest["environment"])
    # a room of kernels that only one of the two processes has imported says nothing about the programs
    both = here["operations"].keys() & there.get("operations", {}).keys()
    for facts in (here, there):
        facts["operations"] = {op: names for op, names in facts.get("operations", {}).items() if op in both}
    if wrong := differences(here, there):
        raise ExecutablesError(f"the executables in {own} do not fit: {'; '.join(wrong)}; {_AGAIN}")
    first: dict[tuple, _Stored] = {}
    for entry in manifest["programs"]:
        program, signature = _called(programs, entry, own)
        stored = program.ready.setdefault(signature, _Stored(own, entry, program))
        if isinstance(stored, _Stored):
            first.setdefault((program.name, *map(str, program.static.values())), stored)
    pool = concurrent.futures.ThreadPoolExecutor(workers(), thread_name_prefix="executables")
    for stored in first.values():
        pool.submit(stored.result)
    pool.shutdown(wait=False)
    return len(manifest["programs"])


def _none_fits(programs: Programs, folder: Path) -> str:
    known = [_read_manifest(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    if not known:
        return f"{folder} holds no executables; make some with `jaxinfer compile`, or start without them (executables=False)"
    wanted = identity(programs)
    nearest = min((differences(wanted, manifest["identity"]) for manifest in known), key=len)
    more = f"; and {len(nearest) - 3} more" if len(nearest) > 3 else ""
    return (
        f"{folder} holds no executables for this model and mesh, the nearest differ: {'; '.join(nearest[:3])}{more}; {_AGAIN}"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExecutablesError(f"{path} cannot be read ({error!r}); {_AGAIN}") from error
    if version != FORMAT_VERSION:
        raise ExecutablesError(f"{path} has format_version {version!r}, not {FORMAT_VERSION}; {_AGAIN}")
    if missing := {"identity", "environment", "programs"} - manifest.keys():
        raise ExecutablesError(f"{path} has no {', '.join(sorted(missing))}; {_AGAIN}")
    return manifest


def _called(programs: Programs, entry: Mapping[str, Any], folder: Path) -> tuple[Program, tuple]:
    """The program of an entry, and the shapes of its arguments."""
    try:
        program = getattr(programs, entry["name"])(**entry["static"])
        signature = tuple((tuple(shape), np.dtype(dtype)) for dtype, shape in entry["arguments"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExecutablesError(f"{folder / MANIFEST} is damaged ({error!r}); {_AGAIN}") from error
    return program, signature


class _Stored:
    """An executable in a file, read at its first use."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], program: Program):
        self._path, self._entry, self._program = folder / entry["file"], entry, program
        self.shapes = _built(entry["result"])
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None
        self._compiled: jax.stages.Compiled | None = None

    def result(self) -> Callable:
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self._read(), self._program)
        return self._call

    def _call(self, *arguments):
        if self._compiled is None:
            assert self._loaded is not None  # result() came before
            information = jax.tree.unflatten(jax.tree.structure((arguments, {})), self._loaded.arguments)
            result = jax.tree.structure(self.shapes)
            self._compiled = jax.stages.Compiled(
                self._loaded.executable, [], information, result, no_kwargs=self._loaded.no_keywords
            )
        return self._compiled(*arguments)

    def _read(self) -> bytes:
        try:
            packed = self._path.read_bytes()
            if hashlib.sha256(packed).hexdigest() != self._entry["sha256"]:
                raise ExecutablesError(f"{self._path} is not what was written; {_AGAIN}")
            return zlib.decompress(packed)
        except (OSError, zlib.error) as error:
            raise ExecutablesError(f"{self._path} cannot be read ({error}); {_AGAIN}") from error


# What the pickle around an executable may name: classes of jax that describe arrays. jax offers no other form.
_NAMES = {
    "jax": {"P"},
    "jax._src.core": {"ManualAxisType", "MemorySpace", "ShapedArray"},
    "jax._src.interpreters.pxla": {"AllArgsInfo", "UnloadedMeshExecutable"},
    "jax._src.layout": {"AutoLayoutSingleton", "Layout"},
    "jax._src.linear_util": {"DebugInfo"},
    "jax._src.mesh": {"AbstractDevice", "AbstractMesh", "AxisType", "Mesh"},
    "jax._src.named_sharding": {"_unpickle_named_sharding"},
    "jax._src.stages": {"ArgInfo"},
    "jaxlib._jax": {"DeviceList"},
    "ml_dtypes": {"bfloat16"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct"},
}


class _Unpickler(serialize_executable._JaxPjrtUnpickler):
    def find_class(self, module: str, name: str):
        if name not in _NAMES.get(module, ()):
            raise ExecutablesError(f"an executable names {module}.{name}, which is none of those that jax writes; {_AGAIN}")
        return super().find_class(module, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    """An executable on devices, and jax's descriptions of its arguments."""

    executable: Any
    arguments: Sequence[Any]
    no_keywords: bool


def _load(data: bytes, program: Program) -> _Loaded:
    """An executable on the devices of a program."""
    devices = list(program.mesh.devices.flat)
    try:
        unloaded, arguments, no_keywords = _Unpickler(io.BytesIO(data), devices[0].client, devices).load()
        return _Loaded(executable=unloaded.load(), arguments=arguments, no_keywords=no_keywords)
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, jax.errors.JaxRuntimeError) as error:
        raise ExecutablesError(f"an executable of {program.name} cannot be loaded ({error}); {_AGAIN}") from error


# --- results: trees of dataclasses, described by the names of their classes


def _described(tree: Any) -> Any:
    """A pytree of ShapeDtypeStructs, as JSON values."""
    if tree is None:
        return None
    if isinstance(tree, jax.ShapeDtypeStruct):
        return {"dtype": str(tree.dtype), "shape": list(tree.shape)}
    if isinstance(tree, tuple):
        return [_described(part) for part in tree]
    fields = {field.name: _described(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    return {"class": f"{type(tree).__module__}:{type(tree).__qualname__}", "fields": fields}


def _built(described: Any) -> Any:
    """The pytree of a description. Its classes are dataclasses of the packages that programs are made of."""
    if described is None:
        return None
    if "dtype" in described:
        return jax.ShapeDtypeStruct(described["shape"], np.dtype(described["dtype"]))
    if isinstance(described, list):
        return tuple(_built(part) for part in described)
    module, _, name = described["class"].partition(":")
    if module.partition(".")[0] not in _PACKAGES:
        raise ExecutablesError(f"{described['class']} is no result of a program; {_AGAIN}")
    found: Any = getattr(importlib.import_module(module), name)
    if not hasattr(found, "__dataclass_fields__"):
        raise ExecutablesError(f"{described['class']} is no result of a program; {_AGAIN}")
    return found(**{key: _built(value) for key, value in described["fields"].items()})
