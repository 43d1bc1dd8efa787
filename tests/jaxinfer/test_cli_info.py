"""`jaxinfer info --system`: what the machine has, and which implementation of each operation is taken, and why."""

import json

import jax
import pytest

from jaxinfer import cli
from jaxinfer.cli import system
from pallas_kernels import registry
from pallas_kernels.cpu import library


@pytest.fixture(scope="module")
def facts() -> dict:
    return system.system_facts()


def test_versions_devices_and_the_host(facts):
    assert facts["versions"]["jax"] == jax.__version__ and {"python", "jaxlib", "flax", "tokenizers"} <= set(facts["versions"])
    assert [d["id"] for d in facts["devices"]] == [d.id for d in jax.devices()]
    assert facts["devices"][0]["platform"] == facts["backend"] == "cpu" and facts["devices"][0]["kind"]
    host = facts["host"]
    assert 0 < host["usable_cores"] <= host["cores"] and 0 < host["available_bytes"] < host["memory_bytes"]
    assert facts["cache"]["folder"].endswith("jaxinfer") and facts["cache"]["programs"] == jax.config.jax_compilation_cache_dir


def test_instruction_sets_are_those_that_linux_names(monkeypatch):
    monkeypatch.setattr(system, "_cpuinfo", lambda: "model name\t: Some CPU\nflags\t\t: fpu sse4_2 avx2 rdtscp avx512f\n")
    assert system._instruction_sets() == ["sse4_2", "avx2", "avx512f"] and system._cpu_name() == "Some CPU"
    monkeypatch.setattr(system, "_cpuinfo", lambda: "Features\t: fp asimd asimddp\n")
    assert system._instruction_sets() == ["asimd", "asimddp"]
    monkeypatch.setattr(system, "_cpuinfo", lambda: "")
    assert system._instruction_sets() == [] and system._cpu_name()


def test_every_operation_tells_what_is_used(facts):
    operations = facts["operations"]
    assert set(operations) == set(registry.operations())
    for op, entry in operations.items():
        assert entry["implementations"] == [i.name for i in registry.implementations(op)]
        assert {name for names in entry["used"].values() for name in names} <= set(entry["implementations"])
    assert set(operations["fused_matmul"]["used"]) == set(system.FORMS)  # of the head, with the last norm
    assert set(operations["quantize_activations"]["used"]) <= {"w8a8"}
    assert operations["layer_norm"]["used"] == {}, "a Llama has none"
    if not isinstance(library.load(), str):  # as in a model of usual sizes
        natively = {form: ["native"] for form in system.FORMS}
        assert operations["attention_block"]["used"] == operations["mlp_block"]["used"] == natively
        assert operations["fused_matmul"]["used"] == natively and operations["quant_matmul"]["used"] == {}
        assert operations["head_argmax"]["used"] == natively or library.instruction_set() == "plain"
        assert facts["native_kernels"]["read_bytes_per_second"] > 1e8
    else:
        assert set(operations["quant_matmul"]["used"]) == set(system.FORMS)


def test_what_is_not_used_says_why(monkeypatch):
    """An implementation that nothing fits, above all others, and one that fits and is never asked."""
    system.full_registry()
    refused = registry.register(
        "embedding", "for nobody", print, supports=lambda target, facts: "it is for nobody", priority=1000
    )
    never = registry.register("embedding", "never", print, priority=-1)
    try:
        monkeypatch.setattr(system, "FORMS", {"float16": {"dtype": "float16"}})
        entry = system.operations.__wrapped__()["embedding"]
    finally:
        for added in (refused, never):
            registry.unregister(added.op, added.name)
    assert entry == {
        "implementations": ["for nobody", "reference", "never"],
        "used": {"float16": ["reference"]},
        "refused": {"for nobody": ["it is for nobody"]},
    }
    assert "not for nobody: it is for nobody" in system._operation(entry)


def test_looking_leaves_the_registry_as_it_was(facts):
    before = {op: registry.implementations(op) for op in registry.operations()}
    with system._watched() as seen:
        assert {op: registry.implementations(op) for op in registry.operations()} != before
    assert seen == [] and {op: registry.implementations(op) for op in registry.operations()} == before


def test_the_command_prints_them(facts, capsys):
    assert cli.main(["info", "--system", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == facts.keys() and printed["operations"] == facts["operations"]
    assert cli.main(["info", "--system"]) == 0
    out = capsys.readouterr().out
    assert f"jax {jax.__version__}" in out and "quant_matmul" in out and "cores usable" in out and "\033" not in out
    assert "layer_norm" in out and "(a Llama asks for none here)" in out
    assert "missing" in facts["native_kernels"] or "/s from memory" in out
