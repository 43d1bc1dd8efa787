"""The memory report counts what lies on the devices, by kind and form."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxinfer.config import QuantizationConfig
from jaxinfer.loading import open_source
from jaxinfer.placement import place
from jaxinfer.quantization import memory_report
from sharding.mesh import make_mesh


@pytest.mark.parametrize("tp", [1, 2])
def test_bytes_by_kind(tiny, tp):
    source = open_source(tiny.folder)
    tensors = source.stored_as(dtype="bfloat16", quantization=None)
    quantised = source.stored_as(dtype=None, quantization=QuantizationConfig.parse("w8a8-g24"))
    tensors |= {path: t for path, t in quantised.items() if path.endswith(("mlp.down", "attention.o"))}
    placed = place(tensors, make_mesh(tensor=tp), config=source.config)
    report = memory_report(placed.weights)
    rows = {row.kind: row for row in report.rows}
    assert set(rows) == {
        "attention.qkv", "attention.out", "mlp.up", "mlp.down", "embedding", "head", "norms and biases",
    }  # fmt: skip
    assert report.total == placed.nbytes == sum(row.nbytes for row in report.rows)
    assert report.rows[0].nbytes == max(row.nbytes for row in report.rows)
    assert report.device == max(
        sum(s.data.nbytes for a in jax.tree.leaves(placed.weights) for s in a.addressable_shards if s.device == device)
        for device in placed.mesh.devices.flat
    )
    layers, embed, width = 3, 72, 96
    assert rows["norms and biases"].values == tp * (2 * layers + 1) * embed * 4 and rows["norms and biases"].scales == 0
    assert rows["mlp.up"].form == "bfloat16"
    down = rows["mlp.down"]
    assert down.form == "int8, group 24, int8 inputs per 48" and down.device == down.nbytes // tp
    if tp == 1:  # on two devices zeros fill up what does not divide
        assert rows["mlp.up"].values == 2 * layers * width * embed * 2
        assert (down.values, down.scales) == (layers * embed * width, layers * embed * width // 24 * 4)
        assert rows["attention.out"].values == layers * embed * embed
    assert report.to_dict()["bytes"] == report.total
    np.testing.assert_array_equal([row["bytes"] for row in report.to_dict()["rows"]], [row.nbytes for row in report.rows])
