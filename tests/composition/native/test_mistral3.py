"""Mistral 3, and LLaVA and LightOnOCR with its tower: imported, run beside the native class, exported."""

import pytest

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_cases.mistral3 import pixtral_processor_class
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.errors import CompositionError
from anyvlm.composition.native import family_of, from_native, to_native
from anyvlm.composition.native.equality import sample_picture


CASES = [case for module in ("mistral3", "pixtral", "lighton_ocr") for case in native_cases(module)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


def test_the_processor_comes_back():
    """What the native processor is made of again; transformers offers its class beside torchvision only."""
    native, native_processor = build_native(native_cases("mistral3")[0], seed=0, tied=False)
    model, processor = from_native(native, native_processor)
    arguments = family_of(native.config).write_processor(processor, native.config, model.config)
    again = pixtral_processor_class()(
        tokenizer=processor.tokenizer, chat_template=processor.chat_template, **arguments
    )
    pictures = [sample_picture(50, 70), sample_picture(90, 30)]
    expected = native_processor(text="w1 [IMG] [IMG] w2", images=pictures)
    found = again(text="w1 [IMG] [IMG] w2", images=pictures)
    assert all((found[key] == expected[key]).all() for key in ("input_ids", "pixel_values", "image_sizes"))


def test_other_projectors_are_not_exported():
    native, native_processor = build_native(native_cases("mistral3")[0], seed=0, tied=False)
    model, _ = from_native(native, native_processor)
    model.config.projector_config["norm"] = "layer_norm"
    with pytest.raises(CompositionError, match="Mistral3ForConditionalGeneration: its projector has norm 'rms_norm'"):
        to_native(model, None)


def test_first_patch_is_not_dropped():
    """LLaVA's `default` would take one patch away from a whole batch of pictures."""
    native, native_processor = build_native(native_cases("pixtral")[0], seed=0, tied=False)
    native.config.vision_feature_select_strategy = "default"
    with pytest.raises(CompositionError, match="drops the first patch of the first picture"):
        from_native(native, native_processor)
