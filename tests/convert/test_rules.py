"""Rules: transforms of slices, and the account of every name."""

import numpy as np
import pytest

from convert.errors import (
    CheckpointMismatchError,
    ConversionError,
    MissingTensorError,
    TensorShapeError,
    UnexpectedTensorError,
)
from convert.load import QuantSpec, quantized
from convert.rules import PermuteRows, Rows, Rule, Transpose, bind, transformed
from sharding.partition import Units, gather

RNG = np.random.default_rng(2)
ORDER = RNG.permutation(12)
TRANSFORMS = [
    ((Transpose(),), lambda w: w.T),
    ((Rows(4, 8),), lambda w: w[4:12]),
    ((Rows(5, 3),), lambda w: w[5:8]),
    ((Rows(0, 4),), lambda w: w[:4]),
    ((PermuteRows(tuple(ORDER)),), lambda w: w[ORDER]),
    ((PermuteRows(lambda rows: np.arange(rows)[::-1]),), lambda w: w[::-1]),
    ((PermuteRows(tuple(ORDER)), Rows(2, 6), Transpose()), lambda w: w[ORDER][2:8].T),
    ((Transpose(), Rows(4, 8), PermuteRows(tuple(range(7, -1, -1)))), lambda w: w.T[4:12][::-1]),
]


@pytest.mark.parametrize(("transforms", "meaning"), TRANSFORMS)
def test_transforms_of_slices(lazy, transforms, meaning):
    array = RNG.standard_normal((12, 16)).astype(np.float32)
    tensor, truth = transformed(lazy("w", array), transforms), meaning(array)
    assert tensor.shape == truth.shape
    rows, columns = truth.shape
    for units in (
        (None, None),
        (Units(1, (2, 0)), None),
        (None, Units(2, (1,))),
        (Units(1, (1, -1, 2)), Units(2, (-1, 0, 1))),
        (Units(rows, (0,)), Units(columns, (0,))),
    ):
        value = tensor.read(units)
        np.testing.assert_array_equal(value, gather(truth, units))
        assert value.flags.c_contiguous


def test_only_the_needed_rows_are_asked_for(lazy):
    source = lazy("qkv", RNG.standard_normal((12, 4)))
    transformed(source, (Rows(4, 4),)).read((Units(2, (1,)), None))
    ((rows, columns),) = source.asked
    assert rows.elements.tolist() == [6, 7] and columns is None


def test_a_bias_is_cut_like_its_weight(lazy):
    bias = np.arange(12)
    np.testing.assert_array_equal(transformed(lazy("b", bias), (Rows(4, 4),)).read(), bias[4:8])


def test_packed_rows(lazy):
    packed = quantized(lazy("w", RNG.standard_normal((12, 64)).astype(np.float32)), QuantSpec(format="int4", group=32))
    q = transformed(packed, (PermuteRows(tuple(ORDER)), Rows(3, 5))).read()
    np.testing.assert_array_equal(q.values, packed.read().values[ORDER][3:8])
    with pytest.raises(ConversionError, match="w is packed as int4 and cannot be transposed"):
        transformed(packed, (Transpose(),))


@pytest.mark.parametrize("transform", [Rows(8, 8), PermuteRows((0, 1, 1)), PermuteRows(tuple(range(11)))])
def test_transforms_that_do_not_fit(lazy, transform):
    with pytest.raises(ConversionError, match=r"w: .*\(12, 16\)"):
        transformed(lazy("w", np.zeros((12, 16))), (transform,))


RULES = (
    Rule("model.embed_tokens.weight", "embedding"),
    Rule("model.layers.{i}.self_attn.q_proj.weight", "blocks.{i}.attention.q"),
    Rule("model.layers.{i}.mlp.up_proj.weight", "blocks.{i}.mlp.up"),
    Rule("lm_head.weight", "head"),
)
EXPECTED = {"embedding": (5, 4)} | {f"blocks.{i}.{p}": (4, 4) for i in range(12) for p in ("attention.q", "mlp.up")}


@pytest.fixture
def tensors(lazy):
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{p}_proj.weight" for i in range(12) for p in ("self_attn.q", "mlp.up")]
    return {n: lazy(n, np.full((5 if "embed" in n else 4, 4), k, np.float32)) for k, n in enumerate(names)}


def test_bind(tensors):
    bound = bind(RULES, tensors, EXPECTED)
    assert bound.keys() == EXPECTED.keys()
    assert bound["blocks.11.mlp.up"].name == "model.layers.11.mlp.up_proj.weight"
    np.testing.assert_array_equal(bound["blocks.3.attention.q"].read(), tensors["model.layers.3.self_attn.q_proj.weight"].array)


def test_a_fused_tensor_sets_several_paths(lazy):
    rules = [Rule("qkv", name, (Rows(4 * k, 4),)) for k, name in enumerate("qkv")]
    array = RNG.standard_normal((12, 4))
    bound = bind(rules, {"qkv": lazy("qkv", array)}, dict.fromkeys("qkv", (4, 4)))
    np.testing.assert_array_equal(np.concatenate([bound[n].read() for n in "qkv"]), array)


def test_head_of_a_tied_model_may_be_there(tensors, lazy):
    head = {"lm_head.weight": lazy("lm_head.weight", np.zeros((5, 4)))}
    with pytest.raises(UnexpectedTensorError, match=r"lm_head.weight is unknown"):
        bind(RULES, tensors | head, EXPECTED)
    assert "head" not in bind(RULES, tensors | head, EXPECTED, ignore=("lm_head.weight",))
    assert "head" not in bind(RULES, tensors, EXPECTED, ignore=("lm_head.weight",))
    # an ignored name that a path wants is used
    assert "head" in bind(RULES, tensors | head, EXPECTED | {"head": (5, 4)}, ignore=("lm_head.weight",))
    with pytest.raises(MissingTensorError, match=r"head is not set: the checkpoint has no lm_head.weight"):
        bind(RULES, tensors, EXPECTED | {"head": (5, 4)})


def test_ignored_patterns(tensors, lazy):
    names = ["model.layers.3.self_attn.rotary_emb.inv_freq", "vision.tower.0.weight"]
    more = {n: lazy(n, np.zeros(1)) for n in names}
    bind(RULES, tensors | more, EXPECTED, ignore=("model.layers.{i}.self_attn.rotary_emb.inv_freq", "vision.*"))
    with pytest.raises(UnexpectedTensorError) as error:
        bind(RULES, tensors | more, EXPECTED, ignore=("model.layers.{i}.self_attn",))
    assert len(error.value.problems) == 2


def test_missing(tensors):
    del tensors["model.layers.7.mlp.up_proj.weight"]
    with pytest.raises(MissingTensorError, match=r"blocks.7.mlp.up is not set.*no model.layers.7.mlp.up_proj.weight") as error:
        bind(RULES, tensors, EXPECTED, where="/models/x")
    assert str(error.value).startswith("/models/x does not fit: 1 problem\n") and len(error.value.problems) == 1
    with pytest.raises(MissingTensorError, match="pos is not set: no rule of the family sets it"):
        bind(RULES, tensors, {"pos": (1,)} | EXPECTED, ignore=("*",))


def test_shape(tensors, lazy):
    tensors["model.embed_tokens.weight"] = lazy("model.embed_tokens.weight", np.zeros((4, 5)))
    with pytest.raises(TensorShapeError, match=r"model.embed_tokens.weight has shape \(4, 5\), embedding needs \(5, 4\)"):
        bind(RULES, tensors, EXPECTED)


def test_set_twice(tensors, lazy):
    rules = (*RULES, Rule("wte.weight", "embedding"))
    with pytest.raises(UnexpectedTensorError, match=r"embedding is set twice: by model.embed_tokens.weight and by wte.weight"):
        bind(rules, tensors | {"wte.weight": lazy("wte.weight", np.zeros((5, 4)))}, EXPECTED)


def test_every_problem_at_once(tensors, lazy):
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors["model.layers.2.self_attn.q_prj.weight"] = tensors.pop(name)
    tensors["model.layers.12.mlp.up_proj.weight"] = lazy("beyond", np.zeros((4, 4)))
    tensors["model.embed_tokens.weight"] = lazy("model.embed_tokens.weight", np.zeros((4, 5)))
    with pytest.raises(CheckpointMismatchError) as error:
        bind(RULES, tensors, EXPECTED)
    assert type(error.value) is CheckpointMismatchError
    assert error.value.problems == [
        f"blocks.2.attention.q is not set: the checkpoint has no {name}; the nearest is model.layers.2.self_attn.q_prj.weight",
        f"model.layers.2.self_attn.q_prj.weight is unknown to the model; the nearest is {name}",
        "model.layers.12.mlp.up_proj.weight is unknown to the model",
        "model.embed_tokens.weight has shape (4, 5), embedding needs (5, 4)",
    ]


def test_a_long_list_is_shortened_in_the_message(tensors):
    with pytest.raises(MissingTensorError, match="25 problems") as error:
        bind(RULES, {}, EXPECTED)
    assert len(error.value.problems) == 25 and "and 5 more" in str(error.value)


def test_a_rule_with_unequal_fields():
    with pytest.raises(ConversionError, match="both sides must have the same fields"):
        Rule("a.{i}.b", "c.{j}")
