"""The checks of native families see what is wrong with a family: each kind of mistake shows, in its own column."""

from dataclasses import replace

import pytest
import torch

from anyvlm.compatibility import native_checks
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import check_case
from anyvlm.composition.native import families, importing, llava


CASE = native_cases("llava")[0]


def _check_with(monkeypatch, **changes):
    """The result of LLaVA's case with another declaration of the family, not stopped by the comparison on import."""
    family = replace(llava.LLAVA, **changes)
    families.native_families.cache_clear()
    monkeypatch.setattr(llava, "FAMILIES", (family,))
    monkeypatch.setattr(importing, "compare_on_a_sample", lambda *arguments: 0.0)
    try:
        return check_case(CASE, seeds=(0,))
    finally:
        families.native_families.cache_clear()


def test_another_layer_of_the_tower_shows_in_the_logits_and_words(monkeypatch):
    def another_layer(native):
        return {**llava.LLAVA.read_config(native), "vision_feature_layer": -1}

    result = _check_with(monkeypatch, read_config=another_layer)
    assert min(result.differences.values()) > 1e-3 and not result.passed
    assert not result.greedy and result.processor


def test_another_count_of_tokens_shows_in_the_processor(monkeypatch):
    def one_less(native, spec):
        return {**spec, "num_prefix_tokens": 2, "grid": [1, 15]}

    result = _check_with(monkeypatch, adjust_spec=one_less)
    assert not result.processor and "processors' outputs differ" in result.problems[0]


def test_what_an_import_refuses_is_a_problem_and_not_the_end(monkeypatch):
    result = _check_with(monkeypatch, rules=lambda native: llava.two_layer_rules(native)[:-1])
    assert len(result.problems) == 2 and "2 weights are left over" in result.problems[0]


def test_tensors_that_come_back_changed_show(monkeypatch):
    back = native_checks.to_native

    def changed(model, processor):
        native, native_processor = back(model, processor)
        with torch.no_grad():
            native.model.multi_modal_projector.linear_2.bias[0] += 1
        return native, native_processor

    monkeypatch.setattr(native_checks, "to_native", changed)
    result = check_case(CASE, seeds=(0,))
    assert not result.to_native and len(result.problems) == 2 and result.greedy and result.processor


@pytest.mark.parametrize("kind", native_checks.KINDS)
def test_every_kind_of_input_has_what_its_name_says(kind):
    chats, pictures = native_checks.case_chats(CASE)[kind]
    sizes = [{picture.size for picture in batch} for batch in pictures]
    assert len(chats) == len(pictures) == (2 if kind == "padded batch" else 1)
    assert (len(sizes[0]) > 1) == (kind in ("mixed sizes", "padded batch"))
    assert (len(pictures[0]) > 1) == (kind != "one image")
