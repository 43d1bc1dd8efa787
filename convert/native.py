"""The native form: an Orbax checkpoint with its description, model configuration and tokenizer, in one folder.

    params/                  Orbax: {path: array}; a QTensor's parts are path/values, path/scales, path/zeros, path/order
    jaxinfer.json            format_version, config, tensors: {path: shape, dtype, and for a QTensor its form}
    tokenizer.json, tokenizer_config.json, generation_config.json

The folder is written beside its place under a temporary name and renamed when it is complete.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.atomic import publish, remove_stale, temporary, terminable
from convert.errors import DestinationExistsError
from convert.load import Progress, materialize
from convert.readers import DESCRIPTION, FORMAT_VERSION, PARAMS
from convert.readers.base import LazyTensor, TokenizerAssets
from pallas_kernels.qtensor import QTensor, repack

CHUNK_BYTES = 8 << 20  # of a stored chunk: the least that a shard reads
FILE_BYTES = 256 << 20  # of a data file; a whole one of the default 2 GB is slower to write


def save_native(
    dst: str | Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    assets: TokenizerAssets,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> None:
    """Read every tensor in its target form and write a native checkpoint; it is complete when this returns.

    config: JSON values. tensors: by module path; what they read is stored. progress(done, total, name): bytes read and written.
    An exception, Ctrl-C or SIGTERM on the way removes what was written, once a write that is under way has ended, and leaves
    `dst` as it was; what a SIGKILL leaves behind is removed by the next conversion to the same `dst`. Raises
    DestinationExistsError where `dst` holds something, unless `overwrite` is given and it is a native checkpoint, which is then
    replaced once the new one is complete.
    """
    dst = Path(dst).expanduser().absolute()
    described = json.dumps(dict(config))  # a config that is no JSON fails before the work
    dst.parent.mkdir(parents=True, exist_ok=True)
    check = functools.partial(_check_destination, overwrite=overwrite)
    remove_stale(dst)
    check(dst)
    size = sum(t.nbytes for t in tensors.values())
    with terminable(), temporary(dst) as folder:
        reading = progress and (lambda done, _, name: progress(done, 2 * size, name))
        arrays = materialize(tensors, reading)
        entries = {path: _describe(value) for path, value in arrays.items()}
        _save_params(folder / PARAMS, arrays)
        description = {"format_version": FORMAT_VERSION, "config": json.loads(described), "tensors": entries}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), "utf-8")
        save_assets(folder, assets)
        publish(folder, dst, check)
        if progress:
            progress(2 * size, 2 * size, str(dst))


def _describe(value: np.ndarray | QTensor) -> dict[str, Any]:
    if not isinstance(value, QTensor):
        return {"shape": list(value.shape), "dtype": value.dtype.name}
    return {
        "shape": list(value.shape),
        "dtype": "float32",
        "format": value.format,
        "group": value.group,
        "scales": value.scales.dtype.name,
        "zeros": None if value.zeros is None else value.zeros.dtype.name,
        "activation": value.activation and dataclasses.asdict(value.activation),
    }


def _save_params(folder: Path, arrays: Mapping[str, np.ndarray | QTensor]) -> None:
    import orbax.checkpoint as ocp  # takes over a second to import

    tree: dict[str, Any] = {}
    for path, value in arrays.items():
        if isinstance(value, QTensor):
            q = repack(value, "canonical")
            # float8 goes as bytes: not every release of the array library knows its name
            values = q.values.view(np.uint8) if q.format == "fp8" else q.values
            parts = {"values": values, "scales": q.scales, "zeros": q.zeros, "order": q.order, "input_scale": q.input_scale}
            tree |= {f"{path}/{part}": array for part, array in parts.items() if array is not None}
        else:
            tree[path] = value
    # Orbax copies host arrays first, because a save may go on in the background; this one does not
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, numpy_handler), (jax.Array, ocp.type_handlers.ArrayHandler())
        ),
        use_ocdbt=True,
        use_zarr3=False,
        use_compression=False,  # weights hardly compress, and loading would wait for it
    )
    chunks = dict.fromkeys(tree, ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES))
    args = ocp.args.PyTreeSave(tree, save_args=chunks, ocdbt_target_data_file_size=FILE_BYTES)

    def write():
        with ocp.Checkpointer(handler) as checkpointer:  # the synchronous one
            checkpointer.save(folder, args=args)

    # an interruption waits here for Orbax to end: its writers cannot be stopped, and would make a removed folder again
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(write).result()


def save_assets(folder: Path, assets: TokenizerAssets) -> None:
    if assets.tokenizer_json is not None:
        (folder / "tokenizer.json").write_text(assets.tokenizer_json, "utf-8")
    elif assets.folder is not None:  # a slow tokenizer lives in files of its own
        for name in ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"):
            if (assets.folder / name).is_file():
                shutil.copy(assets.folder / name, folder / name)
    for name, value in (("tokenizer_config.json", assets.config), ("generation_config.json", assets.generation_config)):
        if value:
            (folder / name).write_text(json.dumps(dict(value), indent=1, ensure_ascii=False), "utf-8")


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not os.path.lexists(dst) or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not (dst / DESCRIPTION).is_file():
        raise DestinationExistsError(
            f"{dst} exists and is not a native checkpoint; it is never overwritten, choose another place"
        )
    if not overwrite:
        raise DestinationExistsError(
            f"{dst} holds a checkpoint already; pass overwrite=True to replace it, or choose another place"
        )
