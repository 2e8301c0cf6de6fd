"""Gemma 3: imported, run beside the native class, exported."""

import copy

import pytest
import torch

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.native import from_native
from anyvlm.composition.native.equality import logits_of, sample_picture
from anyvlm.composition.native.gemma3 import pan_and_scan


@pytest.mark.parametrize("case", native_cases("gemma3"), ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


def test_pan_and_scan():
    """Long pictures become several views; in the text, in attention and in what is generated."""
    native, native_processor = build_native(native_cases("gemma3")[0], seed=0, tied=False)
    ours, processor = from_native(copy.deepcopy(native), native_processor)
    pan_and_scan(ours, processor, min_crop_size=8)
    pictures = [sample_picture(*size) for size in ((40, 90), (30, 31), (100, 30))]
    text = ["w1 <start_of_image> w2 <start_of_image> w3", "<start_of_image> w4"]
    batch = {"text": text, "images": [pictures[:2], pictures[2:]], "padding": True, "return_tensors": "pt"}
    theirs = native_processor(**batch, padding_side="left", do_pan_and_scan=True, pan_and_scan_min_crop_size=8)
    found = processor(**batch)
    assert torch.equal(found["input_ids"], theirs["input_ids"])
    assert len(found["pixel_values"]) == 1 + 2 + 1 + 1 + 3
    assert torch.equal(found["pixel_values"], theirs["pixel_values"])
    attended = theirs["attention_mask"].bool()
    difference = (logits_of(ours, found) - logits_of(native, theirs))[attended].abs().max()
    assert difference <= 1e-5, difference
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    wanted = native.generate(**theirs, **settings, suppress_tokens=[ours.config.image_token_id])
    assert torch.equal(ours.generate(**found, **settings), wanted)
