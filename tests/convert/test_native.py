"""The native form: round trip, lazy shards, nothing half-written whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import native
from convert.errors import DestinationExistsError, NativeFormatError
from convert.load import QuantSpec, cast, materialize, quantized, with_activation
from convert.native import save_native
from convert.readers import TokenizerAssets, open_checkpoint
from pallas_kernels.qtensor import ActivationQuant, dequantize
from sharding.partition import Units, gather

RNG = np.random.default_rng(4)
CONFIG = {"hidden": 64, "name": "näme"}
ASSETS = TokenizerAssets(tokenizer_json='{"version": "é"}', config={"eos_token": "</s>"}, generation_config={"eos_token_id": 2})


@pytest.fixture
def tensors(lazy):
    array = RNG.standard_normal((12, 128)).astype(np.float32)
    quantize = lambda **spec: quantized(lazy("w", array), QuantSpec(**spec))
    return {
        "norm": cast(lazy("n", array[0]), "bfloat16"),
        "scalar": cast(lazy("s", np.array(0.5, np.float32)), "float32"),
        "blocks.0.f16": cast(lazy("h", array), "float16"),
        "blocks.0.int8": quantize(format="int8", activation=ActivationQuant(group=None)),
        "blocks.0.int8g": quantize(format="int8", group=32),
        "blocks.0.int4": with_activation(quantize(format="int4", group=64), ActivationQuant()),
        "blocks.0.zeros": quantize(format="int4", group=32, symmetric=False),
    }


def save(dst, tensors, **options):
    save_native(dst, **{"config": CONFIG, "tensors": tensors, "assets": ASSETS, **options})


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip(tmp_path, tensors):
    seen = []
    save(tmp_path / "deep" / "model", tensors, progress=lambda *call: seen.append(call))
    assert os.listdir(tmp_path / "deep") == ["model"]
    checkpoint = open_checkpoint(tmp_path / "deep" / "model")
    assert (checkpoint.format, checkpoint.config) == ("native", CONFIG)
    assert checkpoint.assets.tokenizer_json == ASSETS.tokenizer_json
    assert (checkpoint.assets.config, checkpoint.assets.generation_config) == (ASSETS.config, ASSETS.generation_config)
    for path, tensor in tensors.items():
        stored = checkpoint.tensors[path]
        assert (stored.shape, stored.packed, stored.dtype, stored.nbytes) == (
            tensor.shape,
            tensor.packed,
            tensor.dtype,
            tensor.nbytes,
        )
    same(materialize(checkpoint.tensors), materialize(tensors))
    assert checkpoint.tensors["norm"].read().dtype == ml_dtypes.bfloat16
    assert seen[-1][0] == seen[-1][1] and [call[2] for call in seen[:-1]] == list(tensors)


SHARDS = [
    (Units(4, (2, 0)), None),
    (None, Units(32, (1,))),
    (Units(1, (3, -1)), Units(64, (-1, 1))),
    (None, Units(16, (7, -1, 2))),
    (Units(6, (-1,)), Units(64, (0,))),
]


@pytest.mark.parametrize("units", SHARDS)
def test_shards(tmp_path, tensors, units, monkeypatch):
    monkeypatch.setattr(native, "CHUNK_BYTES", 512)  # several chunks an array
    save(tmp_path / "m", tensors)
    stored = open_checkpoint(tmp_path / "m").tensors
    for path, tensor in tensors.items():
        if tensor.packed:
            same(stored[path].read(units), tensor.read(units))
            np.testing.assert_array_equal(dequantize(stored[path].read(units)), gather(dequantize(tensor.read()), units))
        elif len(tensor.shape) == 2:
            np.testing.assert_array_equal(stored[path].read(units), tensor.read(units))
    np.testing.assert_array_equal(stored["norm"].read((Units(4, (9, -1)),)), tensors["norm"].read((Units(4, (9, -1)),)))


def test_a_shard_reads_chunks_not_files(tmp_path, lazy):
    array = RNG.standard_normal((8192, 1024)).astype(np.float32)  # 32 MiB in 4 chunks
    save(tmp_path / "m", {"w": cast(lazy("w", array), "float32")})
    tensor = open_checkpoint(tmp_path / "m").tensors["w"]
    count = lambda: int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    before = count()
    np.testing.assert_array_equal(tensor.read((Units(8, (1,)), None)), array[8:16])
    assert count() - before < 20 << 20


def test_orbax_reads_it(tmp_path, tensors):
    import orbax.checkpoint as ocp

    save(tmp_path / "m", tensors)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "m" / "params")
    np.testing.assert_array_equal(restored["blocks.0.f16"], tensors["blocks.0.f16"].read())
    np.testing.assert_array_equal(restored["blocks.0.zeros/zeros"], tensors["blocks.0.zeros"].read().zeros)


def test_destination(tmp_path, tensors):
    dst = tmp_path / "m"
    dst.mkdir()  # empty: as good as absent
    save(dst, {"norm": tensors["norm"]})
    with pytest.raises(DestinationExistsError, match="overwrite=True"):
        save(dst, tensors)
    assert list(open_checkpoint(dst).tensors) == ["norm"]
    save(dst, tensors, overwrite=True)
    assert open_checkpoint(dst).tensors.keys() == tensors.keys()
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(DestinationExistsError, match="is never overwritten"):
        save(other, tensors, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["documents", "m"]


def test_slow_tokenizer_files_come_along(tmp_path, tensors):
    (tmp_path / "tokenizer.model").write_bytes(b"spm")
    save(tmp_path / "m", {"norm": tensors["norm"]}, assets=TokenizerAssets(folder=tmp_path))
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == b"spm"


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["read", "_save_params", "save_assets", "publish"])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_on_the_way_leaves_everything_as_it_was(tmp_path, tensors, monkeypatch, where, error, existing):
    dst = tmp_path / "m"
    if existing:
        save(dst, {"norm": tensors["norm"]})

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        if where == "read":
            patch.setattr(tensors["blocks.0.int4"], "read", fail)
        else:
            whole = getattr(native, where)
            patch.setattr(native, where, lambda *a: (whole(*a) if where == "_save_params" else None, fail()))
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(error):
            save(dst, tensors, overwrite=True)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert os.listdir(tmp_path) == (["m"] if existing else [])
    if existing:
        assert list(open_checkpoint(dst).tensors) == ["norm"]


def test_ctrl_c_while_orbax_writes(tmp_path, tensors, monkeypatch):
    import orbax.checkpoint as ocp

    whole = ocp.Checkpointer.save

    def slow(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # the main thread has its KeyboardInterrupt, and this one goes on writing
        whole(*args, **options)

    monkeypatch.setattr(ocp.Checkpointer, "save", slow)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "m", tensors)
    assert os.listdir(tmp_path) == []


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path, tensors, monkeypatch):
    save(tmp_path / "m", {"norm": tensors["norm"]})
    rename = os.rename

    def fail(source, target):
        if ".partial-" in str(source) and target == tmp_path / "m":
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(native.os, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "m", tensors, overwrite=True)
    assert os.listdir(tmp_path) == ["m"] and list(open_checkpoint(tmp_path / "m").tensors) == ["norm"]


CONVERSION = """
    import sys, time
    import numpy as np
    from convert.native import save_native
    from convert.readers import TokenizerAssets
    from convert.readers.base import LazyTensor

    class Slow(LazyTensor):
        name, shape, dtype = "w", (4,), np.dtype(np.float32)
        def read(self, units=None):
            print("reading", flush=True)
            time.sleep(60)

    save_native(sys.argv[1], config={}, tensors={"w": Slow()}, assets=TokenizerAssets(), overwrite=True)
"""


def interrupted(dst, number):
    """A conversion in another process, stopped by a signal in the middle; its exit status."""
    command = [sys.executable, "-c", textwrap.dedent(CONVERSION), str(dst)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "reading\n"
        assert len(list(dst.parent.glob(".m.partial-*"))) == 1
        process.send_signal(number)
        return process.wait(20)


def test_sigterm_leaves_nothing(tmp_path, tensors):
    save(tmp_path / "m", {"norm": tensors["norm"]})
    assert interrupted(tmp_path / "m", signal.SIGTERM) == -signal.SIGTERM
    assert os.listdir(tmp_path) == ["m"] and list(open_checkpoint(tmp_path / "m").tensors) == ["norm"]


def test_sigkill_leaves_dst_absent_and_the_next_conversion_cleans_up(tmp_path, tensors):
    assert interrupted(tmp_path / "m", signal.SIGKILL) == -signal.SIGKILL
    assert [p.name.startswith(".m.partial-") for p in tmp_path.iterdir()] == [True]
    with native.temporary(tmp_path / "m") as living:  # another conversion that is still going on
        save(tmp_path / "m", tensors)
        assert {p.name for p in tmp_path.iterdir()} == {"m", living.name}
    assert os.listdir(tmp_path) == ["m"]


def test_a_kill_between_the_renames_is_repaired(tmp_path, tensors):
    save(tmp_path / "m", {"norm": tensors["norm"]})
    os.rename(tmp_path / "m", tmp_path / ".m.replaced-0123456789ab")
    with pytest.raises(DestinationExistsError):
        save(tmp_path / "m", tensors)
    assert os.listdir(tmp_path) == ["m"] and list(open_checkpoint(tmp_path / "m").tensors) == ["norm"]


def damage(folder, **changes):
    file = folder / "jaxinfer.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}))


def test_damaged_checkpoints(tmp_path, tensors):
    save(tmp_path / "m", tensors)
    text = (tmp_path / "m" / "jaxinfer.json").read_text()
    for changes, message in (
        ({"format_version": 2}, "has format_version 2, not 1"),
        ({"format_version": None}, "has format_version None"),
        ({"tensors": None}, "is damaged"),
        ({"tensors": {"w": {"shape": [2]}}}, "is damaged"),
        ({"tensors": {"w": {"shape": [2], "dtype": "float33"}}}, "is damaged"),
    ):
        damage(tmp_path / "m", **changes)
        with pytest.raises(NativeFormatError, match=message):
            open_checkpoint(tmp_path / "m")
        (tmp_path / "m" / "jaxinfer.json").write_text(text)
    damage(tmp_path / "m", tensors={"norm": {"shape": [3], "dtype": "float32"}, "gone": {"shape": [3], "dtype": "float32"}})
    damaged = open_checkpoint(tmp_path / "m").tensors
    with pytest.raises(NativeFormatError, match=r"norm is bfloat16 \(128,\), jaxinfer.json says float32 \(3,\)"):
        damaged["norm"].read()
    with pytest.raises(NativeFormatError, match="gone cannot be read"):
        damaged["gone"].read()
    (tmp_path / "m" / "jaxinfer.json").write_text("{")
    with pytest.raises(NativeFormatError, match="not valid JSON"):
        open_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "jaxinfer.json").write_text(text)
    for file in (tmp_path / "m" / "params" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(NativeFormatError, match="cannot be read; copy or convert"):
        materialize(open_checkpoint(tmp_path / "m").tensors)
    (tmp_path / "m" / "params").rename(tmp_path / "m" / "elsewhere")
    with pytest.raises(NativeFormatError, match="has no folder params"):
        open_checkpoint(tmp_path / "m")
