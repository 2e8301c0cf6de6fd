"""PaliGemma and PaliGemma 2: imported, run beside the native class, trained on the same batch, exported."""

import copy

import pytest
import torch

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.native import from_native
from anyvlm.composition.native.equality import sample_picture
from anyvlm.training.collator import AnyVlmDataCollator


CASES = native_cases("paligemma")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


@pytest.fixture(scope="module")
def imported():
    """The native model and ours, of a checkpoint that has no chat template, as those of PaliGemma have none."""
    native, processor = build_native(CASES[0], seed=0, tied=True)
    processor.chat_template = None
    ours, our_processor = from_native(copy.deepcopy(native), processor)
    return native, processor, ours, our_processor


def test_a_training_batch_is_the_native_one(imported):
    """`suffix` of the native processor, and a conversation here: the same ids, labels and loss."""
    native, processor, ours, our_processor = imported
    picture = sample_picture()
    theirs = processor(text="<image>w1 w2", images=picture, suffix="w3 w4 w5", return_tensors="pt")
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    batch = AnyVlmDataCollator(our_processor)([{"messages": messages, "images": [picture]}])
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    assert torch.equal(batch["labels"], theirs["labels"])
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).loss, native(**theirs).loss)


def test_prompts_are_completed_once(imported):
    processor = imported[3]
    picture = sample_picture()
    raw = processor(text="<image>w1 w2", images=picture)["input_ids"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}]
    written = processor.apply_chat_template(chat, tokenize=False)
    assert written == "<image><s>w1 w2\n"
    assert processor(text=written, images=picture)["input_ids"] == raw
    assert processor.complete_prompt("w1") == "<s>w1\n"


def test_a_chat_template_that_completes_nothing_cannot_be_trained_with(imported):
    processor = copy.deepcopy(imported[3])
    processor.chat_template = "{% for message in messages %}<image> {{ message.content }} {% endfor %}"
    messages = [{"role": "user", "content": "<image>w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(ValueError, match="chat_template"):
        AnyVlmDataCollator(processor)([{"messages": messages, "images": [sample_picture()]}])
