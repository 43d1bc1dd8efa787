"""scripts/bench/kernel_report.py: its floors, its occupancy, and a report of a kernel that is compiled for a GPU that is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import deviceless
from pallas_kernels.deviceless import Kernel
from pallas_kernels.errors import BackendError
from pallas_kernels.gpus import GPUS

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import kernel_report

    return kernel_report


def kernel(**given) -> Kernel:
    whole = {"name": "k", "registers": 32, "spilled": 0, "shared": 0, "threads": 128, "widest_load": 16, "tensor_cores": ""}
    return Kernel(**(whole | given))


def test_a_floor_is_the_longer_of_bytes_and_operations(report):
    gpu, args = GPUS["h100"], (jax.ShapeDtypeStruct((4,), jnp.float32),)
    case = lambda **given: report.Case(op="o", name="n", run=jnp.sin, args=args, **given)
    assert report.floor(case(moved=3_352_000), gpu) == pytest.approx(1e-6)
    assert report.floor(case(moved=1, operations=989e6, matrix=True), gpu) == pytest.approx(1e-6)
    assert report.floor(case(moved=1, operations=66.9e6), gpu) == pytest.approx(1e-6)


def test_occupancy_is_bounded_by_each_resource(report):
    gpu = GPUS["h100"]
    assert report.occupancy(kernel(), gpu) == 1
    assert report.occupancy(kernel(registers=128), gpu) == 4 * 4 / 64
    assert report.occupancy(kernel(registers=33), gpu) == 12 * 4 / 64  # registers come in eights: 40
    assert report.occupancy(kernel(shared=70 * 1024), gpu) == 3 * 4 / 64
    assert report.occupancy(kernel(threads=32), gpu) == 0.5  # 32 blocks at most


def test_a_report(report, capsys):
    assert report.main(["--gpus", "a100", "--op", "fused_norm", "--json"]) == 0
    out, err = capsys.readouterr()
    row, dropped = json.loads(out)
    assert row["launches"] == ["norm"] and row["kernels"][0]["widest_load"] == 16
    assert "norm" in dropped["launches"]
    assert "a100  fused_norm" in err
    with pytest.raises(SystemExit):
        report.main(["--gpus", "k80"])
    assert "--gpus k80: there are a100, h100, b200, a10, l40s, h200" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["--measure"])
    assert "the device here is a cpu, not a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_hoppers_own_kernels_have_rows(report):
    case = next(case for case in report.cases() if case.name == "llama_3_1_8b.down, int8, 2048 rows")
    others = [c for c in report.cases() if c.op == "rms_norm" or c.name == "llama_3_1_8b.down, int8, 16 rows"]
    assert [report.takes(c, "mosaic", "h100") for c in (case, *others)] == [True, False, False, False]
    row = report.compiled(case, "h100", "mosaic")
    (kernel,) = row["kernels"]
    assert row["case"] == f"{case.name}, through Mosaic" and row["problems"] == []
    assert (
        kernel["tensor_cores"].startswith("wgmma")
        and kernel["spilled"] == 0
        and 100_000 < kernel["shared"] < GPUS["h100"].shared
    )


def test_what_cannot_be_derived_is_a_problem(report, monkeypatch):
    def reads(*_, **__):
        raise report.NotDerivable("a view of a view")

    monkeypatch.setattr(report, "reads", reads)
    report.reads_of.cache_clear()
    case = next(case for case in report.cases() if case.streams and report.size(case.args) < 1e7)
    assert report.compiled(case, "h100")["problems"] == ["what it reads cannot be derived: a view of a view"]
    report.reads_of.cache_clear()


def test_more_than_its_arguments_is_a_problem_unless_processors_hand_it_on(report):
    gpu = GPUS["h100"]
    found = lambda read, handed_on, per_processor: report.problems(
        {"kernels": [vars(kernel())], "argument_bytes": 1000, "read_bytes": read, "handed_on_bytes": handed_on},
        report.Case(op="o", name="n", run=jnp.sin, args=(), moved=1, streams=True, accumulators=per_processor),
        gpu,
    )
    assert found(1050, 0, 0) == found(1050, 50, 0) == found(1000 + 10 * gpu.processors, 10 * gpu.processors, 10) == []
    assert found(1051, 0, 0) == ["reads 1051 bytes of 1000, 0 of them handed on"]
    assert found(1100, 0, 10) == ["reads 1100 bytes of 1000, 0 of them handed on"]
    assert found(1051 + 10 * gpu.processors, 51 + 10 * gpu.processors, 10)
    assert found(1000 + gpu.l2, gpu.l2, gpu.l2) == [f"hands on {gpu.l2} bytes, and the L2 has {gpu.l2}"]


def test_every_case_can_be_traced(report):
    for case in report.cases():
        jax.eval_shape(case.run, *case.args)
        assert case.moved > 0


@pytest.mark.aot
def test_the_command_compiles_where_jax_may_look_for_a_gpu():
    """CUDA's plugin is dropped by a jax that looks for a GPU and finds none of its libraries."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, BENCH / "kernel_report.py", "--gpus", "h100", "--op", "rms_norm"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "h100  rms_norm" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.aot
def test_a_missing_plugin_is_named(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(deviceless.topologies, "get_topology_desc", missing)
    with pytest.raises(BackendError, match=r"install jax-cuda13-plugin==.* set JAX_PLATFORMS=cpu"):
        deviceless.topology_mesh("h100", (1,), ("x",))
