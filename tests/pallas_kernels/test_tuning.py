"""Tiles: explicit over tuned over heuristic; GPUs by name; kernels' files, each of which may be missing."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels import gpus, tuning
from pallas_kernels.deviceless import topology_mesh
from pallas_kernels.errors import BackendError
from pallas_kernels.launch import gpu_refusal
from pallas_kernels.target import Target, current_target, interpreted, interpreting
from pallas_kernels.tuning import device_folder, tile_for, tiles

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    rows: int = 1
    warps: int = 4


H100 = gpus.GPUS["h100"].device_kind


def entry(width: int, rows: int) -> tuning.Entry:
    return tuning.Entry(key={"width": width, "dtype": "float32"}, tile={"rows": rows}, seconds=1e-6, default_seconds=2e-6)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A table of a GPU for the operation `twice`, as the package might bring one; the user has none."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.save(tmp_path / "shipped", H100, "twice", [entry(64, 8)])
    tuning._log_miss.cache_clear()
    yield
    tuning.forget()


def test_explicit_then_tuned_then_heuristic(tuned, caplog):
    with interpreting(), caplog.at_level(logging.INFO):
        assert tile_for("twice", Tile(), width=64, dtype="float32") == Tile(rows=8)
        with tiles({"twice": {"rows": 2}}):
            assert tile_for("twice", Tile(), width=64, dtype="float32") == Tile(rows=2)
            with tiles({"twice": {"warps": 1}, "other": {"rows": 5}}):
                assert tile_for("twice", Tile(), width=64, dtype="float32") == Tile(rows=8, warps=1)
        assert not caplog.records
        for _ in range(2):
            assert tile_for("twice", Tile(rows=3), width=65, dtype="float32") == Tile(rows=3)
        assert [r.getMessage() for r in caplog.records] == [
            "no tuned tile of twice for dtype=float32, width=65 on this device: its heuristic is used"
        ]
    assert tile_for("twice", Tile(), width=64, dtype="float32") == Tile()  # another device
    with pytest.raises(BackendError, match="its tile has no columns; it has rows, warps"), tiles({"twice": {"columns": 1}}):
        tile_for("twice", Tile())


def test_what_the_user_tuned_comes_before_what_the_package_brings(tuned):
    path = tuning.save(tuning.user_folder(), H100, "twice", [entry(64, 16), entry(32, 4)])
    assert path == tuning.user_folder() / "v1" / "nvidia_h100_80gb_hbm3" / "twice.json"
    tuning.save(tuning.user_folder(), H100, "twice", [entry(32, 2)])
    table = json.loads(path.read_text())
    assert (table["op"], table["device"], table["jax"]) == ("twice", H100, jax.__version__)
    assert [e["tile"] for e in table["entries"]] == [{"rows": 2}, {"rows": 16}]
    ask = lambda width: tile_for("twice", Tile(), width=width, dtype="float32")
    with interpreting():
        assert [ask(64), ask(32)] == [Tile(rows=16), Tile(rows=2)]
        with tiles({"twice": {"rows": 3}}, key={"width": 32, "dtype": "float32"}):
            assert [ask(64), ask(32)] == [Tile(rows=16), Tile(rows=3)]
    for text, reason in (("{", "cannot be read"), ('{"entries": [{"key": 1, "tile": {}}]}', "have no keys")):
        path.write_text(text)
        tuning.forget()
        with interpreting(), pytest.raises(BackendError, match=f"{path}.*{reason}|{reason}.*"):
            ask(64)
    path.write_text(json.dumps({"entries": [{"key": {"width": 64, "dtype": "float32"}, "tile": {"columns": 1}}]}))
    tuning.forget()
    with interpreting(), pytest.raises(BackendError, match=f"{path}.*its tile has no columns"):
        ask(64)


def test_devices():
    assert device_folder("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"
    for gpu in gpus.GPUS.values():
        assert Target(platform="gpu", device_kind=gpu.device_kind).capability == gpu.capability
    kinds = {
        "NVIDIA GH200 480GB": (9, 0),
        "NVIDIA L40S": (8, 9),
        "NVIDIA GeForce RTX 3090": (8, 6),
        "Tesla T4": (7, 5),
        "?": None,
    }
    assert {kind: gpus.capability(kind) for kind in kinds} == kinds
    for gpu in gpus.KNOWN.values():
        assert gpus.describe(gpu.device_kind) == gpu
    alike = {
        "NVIDIA GeForce RTX 3090": "a10",
        "NVIDIA L4": "l40s",
        "NVIDIA GH200 480GB": "h100",
        "NVIDIA A800": "a100",
        "?": "a10",
    }
    assert {kind: gpus.describe(kind) for kind in alike} == {kind: gpus.KNOWN[name] for kind, name in alike.items()}
    assert Target(platform="cpu", device_kind="cpu").capability is None
    with pytest.raises(BackendError, match="GPU 'k80' is not one of a100, h100, b200, a10, l40s, h200"):
        topology_mesh("k80", (1,), ("x",))


def test_interpreting():
    assert not interpreted() and current_target().platform != "gpu"
    with interpreting(gpus.GPUS["a100"].device_kind):
        assert interpreted() and current_target() == Target(platform="gpu", device_kind=gpus.GPUS["a100"].device_kind)


FILES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "pallas_kernels").glob("*/*.py")
    if path.name.startswith(("pallas", "mosaic", "jax_triton", "cudnn"))
)
WITHOUT = """
import importlib.abc, sys, warnings

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import jax, jax.numpy as jnp
from pallas_kernels.target import interpreting
from pallas_kernels.activation import activation
from pallas_kernels.attention import attention
from pallas_kernels.cross_entropy import log_probs
from pallas_kernels.latent_attention import latent_attention
from pallas_kernels.layer_cache import LayerCache
from pallas_kernels.moe import grouped_matmul, route, sort_tokens
from pallas_kernels.norm import fused_norm, layer_norm
from pallas_kernels.qtensor import ActivationQuant
from pallas_kernels.quantize import quantize_activations, quantize_weights
from pallas_kernels.rope_cache import rope, rope_cache
from pallas_kernels.softmax import softmax
from pallas_kernels.triangle_attention import triangle_attention
from pallas_kernels.attention_block import AttentionSpec, AttentionWeights, attention_block
from pallas_kernels.mlp_block import MLPSpec, MLPWeights, mlp_block
from pallas_kernels.sampling import argmax

ones = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
spec = AttentionSpec(head_dim=8, group=2, scale=1.0, eps=1e-5)
half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
w = AttentionWeights(norm=ones(16), qkv=(half(32, 16),), qkv_bias=(), out=half(16, 16), out_bias=None)
m = MLPWeights(norm=ones(16), up=(half(48, 16),), up_bias=(), down=half(16, 24), down_bias=None)
cache = jax.eval_shape(lambda: LayerCache.zeros(rows=1, kv_heads=1, tokens=9, head_dim=8, dtype=jnp.float32))

def step(x, w, m, cache, at):
    x, cache = attention_block(x, w, cache, spec=spec, angles=None, positions=at)
    x = mlp_block(x, m, spec=MLPSpec(activation="silu", gated=True, eps=1e-5))
    return argmax(x[:, 0])

def others(x, heads, at, bias):
    # the operations that stand alone; x is float32 [2, 16], heads [2, 3, 2, 8]
    quant = ActivationQuant()
    own = LayerCache(k=bias, v=bias)
    yield fused_norm(x, x[0], kind="rms", eps=1e-5, residual=x).y, layer_norm(x, x[0], None, eps=1e-5)
    yield activation(x, kind="silu", gated=True).y
    yield softmax(x), log_probs(x, at[:, 0])
    yield quantize_activations(x, quant), quantize_weights(x, format="int8", group=None)
    yield attention(heads, own, rows=None, positions=at, scale=1.0)
    yield latent_attention(heads, heads[:, :, 0], values=6, positions=at, scale=1.0)
    yield rope(heads, heads[:, :, 0, :4], heads[:, :, 0, :4])
    yield rope_cache(heads, heads, heads, None, None, own, rows=None, positions=at)
    yield triangle_attention(heads[None], heads[None], heads[None], bias[:1, :, :3, :3], scale=1.0)
    yield grouped_matmul(x, heads.reshape(3, 2, 16), at[0]), route(x, experts_per_token=2), sort_tokens(at, 5)

with interpreting(), warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    jaxpr = jax.make_jaxpr(step)(ones(1, 1, 16), w, m, cache, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    more = jax.make_jaxpr(lambda *a: list(others(*a)))
    more = more(ones(2, 16), ones(2, 3, 2, 8), jax.ShapeDtypeStruct((2, 3), jnp.int32), ones(2, 2, 8, 8))
kernels = str(jaxpr).count("pallas_call") + str(more).count("pallas_call")
ours = [str(w.message) for w in seen if "kernels are left out" in str(w.message)]
print(kernels, len(ours), *ours, sep="\\n")
"""


def traced_without(*modules: str) -> tuple[int, list[str]]:
    """How many kernels a layer has, and what it warns of, in a process in which these modules do not exist."""
    command = [sys.executable, "-c", WITHOUT, ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    kernels, count, *warnings = done.stdout.splitlines()
    assert len(warnings) == int(count)
    return int(kernels), warnings


def test_every_file_of_kernels_may_be_missing():
    assert FILES
    whole, warned = traced_without("no.such.module")
    assert whole >= 20 and warned == []
    nothing, warned = traced_without("jax.experimental.pallas.triton")
    assert nothing == 0 and len(warned) == 1


@pytest.mark.parametrize("module", [pytest.param(name, marks=pytest.mark.slow) for name in FILES])
def test_one_file_of_kernels_may_be_missing(module):
    _, warned = traced_without(module)
    room, _, name = module.rpartition(".")
    assert len(warned) == (1 if name.startswith("pallas") else 0)  # the others are asked for by name only
    if warned:
        assert module in warned[0] or f"cannot import name '{name}' from '{room}'" in warned[0]


def test_which_gpus_there_are_kernels_for():
    refused = {
        "AMD Instinct MI300X": "NVIDIA GPUs, not for AMD",
        "NVIDIA Tesla V100-SXM2": "8.0, NVIDIA Tesla V100-SXM2 has 7.0",
    }
    for kind, reason in refused.items():
        assert reason in gpu_refusal(Target(platform="gpu", device_kind=kind))
    for kind in ("NVIDIA GeForce RTX 3090", "NVIDIA of another year"):
        assert gpu_refusal(Target(platform="gpu", device_kind=kind)) is None
