"""BLIP-2 and InstructBLIP: imported, run beside the native class, exported."""

import pytest
import torch
from transformers import AutoProcessor, Blip2Config, Blip2ForConditionalGeneration

import anyvlm
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.native.equality import logits_of, sample_picture


CASES = native_cases("blip_2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


@pytest.mark.parametrize("padding_side", ["left", None])
def test_the_instruction_is_that_of_the_native_processor(padding_side):
    native, native_processor = build_native(CASES[-1], 0, tied=False)
    _, processor = anyvlm.from_native(native, native_processor)
    settings = {"padding": True, "return_tensors": "pt"} | ({"padding_side": padding_side} if padding_side else {})
    pictures = [sample_picture(seed=seed) for seed in range(2)]
    expected, found = (
        each(images=pictures, text=["w1 w2 w3", "w4"], **settings) for each in (native_processor, processor)
    )
    for key in ("qformer_input_ids", "qformer_attention_mask"):
        assert torch.equal(expected[key], found[key])


def test_saved_and_loaded(tmp_path):
    model, processor = anyvlm.from_native(*build_native(CASES[-1], 0, tied=False))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = (
        anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    inputs, again = (
        each(images=sample_picture(), text="w1 w2", return_tensors="pt") for each in (processor, loaded_processor)
    )
    assert torch.equal(logits_of(model, inputs), logits_of(loaded, again))


def test_an_encoder_and_decoder_is_refused():
    config = Blip2Config(
        vision_config=CASES[0].config(False).vision_config,
        qformer_config=CASES[0].config(False).qformer_config,
        text_config={"model_type": "t5", "d_model": 48, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 2},
    )
    processor = CASES[0].processor(CASES[0].config(False))
    with pytest.raises(anyvlm.CompositionError, match="'t5', is an encoder and a decoder"):
        anyvlm.from_native(Blip2ForConditionalGeneration(config), processor)
