"""Rules for keys: read in both directions, each weight exactly once."""

import pytest
import torch

from anyvlm import CompositionError
from anyvlm.composition.native.keys import (
    NATIVE,
    OURS,
    Rename,
    concatenated,
    plan,
    reshaped,
    separated,
    transposed,
)


RULES = [
    Rename("model.tower.", "vision_tower."),
    Rename("head.weight", "language_model.lm_head.weight"),
    Rename("model.blocks.*.mlp.", "layers.*.feed_forward."),
    concatenated(
        ["model.blocks.*.q.weight", "model.blocks.*.k.weight", "model.blocks.*.v.weight"],
        "layers.*.qkv.weight",
        sizes=[4, 2, 2],
    ),
    separated("model.kv", ["keys", "values"], dim=1),
    transposed("model.table", "table"),
    reshaped("model.patch", "patch", native_shape=(3, 1, 2, 2), our_shape=(3, -1)),
]
NATIVE_TENSORS = {
    "model.tower.a.b": torch.randn(2),
    "head.weight": torch.randn(3, 2),
    **{f"model.blocks.{i}.mlp.up": torch.randn(2) for i in range(12)},
    **{f"model.blocks.{i}.{n}.weight": torch.randn(rows, 3) for i in range(12) for n, rows in zip("qkv", (4, 2, 2))},
    "model.kv": torch.randn(2, 6),
    "model.table": torch.randn(2, 3),
    "model.patch": torch.randn(3, 1, 2, 2),
}


def _run(tensors, direction):
    made = {}
    for step in plan(RULES, tensors, direction):
        made.update(step.run(tensors))
    return made


def test_there_and_back():
    ours = _run(NATIVE_TENSORS, OURS)
    assert ours["vision_tower.a.b"] is NATIVE_TENSORS["model.tower.a.b"]
    assert ours["layers.11.feed_forward.up"] is NATIVE_TENSORS["model.blocks.11.mlp.up"]
    assert torch.equal(ours["layers.11.qkv.weight"][4:6], NATIVE_TENSORS["model.blocks.11.k.weight"])
    assert torch.equal(ours["values"], NATIVE_TENSORS["model.kv"][:, 3:]) and ours["patch"].shape == (3, 4)
    assert torch.equal(ours["table"], NATIVE_TENSORS["model.table"].T)
    back = _run(ours, NATIVE)
    assert back.keys() == NATIVE_TENSORS.keys()
    assert all(torch.equal(back[key], tensor) and back[key].is_contiguous() for key, tensor in NATIVE_TENSORS.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["head.weight", "header.weight", "model.other"], "2 weights are left over.*header.weight, model.other"),
        (["model.blocks.3.q.weight", "model.blocks.3.v.weight"], "1 weights are missing.*model.blocks.3.k.weight"),
    ],
)
def test_keys_that_no_rule_places_are_named(keys, message):
    with pytest.raises(CompositionError, match=message):
        plan(RULES, keys, OURS)
    assert len(plan(RULES, keys, OURS, partial=True)) == ("head.weight" in keys)


def test_two_keys_that_would_become_one_are_named():
    with pytest.raises(CompositionError, match="written twice: same.weight"):
        plan([Rename("a.", "same."), Rename("b.", "same.")], ["a.weight", "b.weight"], OURS)
