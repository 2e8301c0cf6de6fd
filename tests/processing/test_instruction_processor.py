"""Projectors that read the instruction: what the processor makes, and that it reaches them."""

import copy
import json

import pytest
import torch
from tiny_parts import compose, tiny_tokenizer
from transformers import AutoProcessor

import anyvlm
from anyvlm.compatibility.model_under_test import picture
from anyvlm.training.collator import AnyVlmDataCollator


PROJECTOR = {
    "type": "qformer",
    "num_queries": 4,
    "reads_text": True,
    "qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}


@pytest.fixture(scope="module")
def composed():
    model, processor = compose(projector=PROJECTOR)
    # Fresh Q-Formers hardly tell words apart.
    torch.nn.init.normal_(model.multi_modal_projector.qformer.embeddings.word_embeddings.weight)
    return model, processor


def test_every_picture_comes_with_the_instruction_of_its_text(composed):
    _, processor = composed
    pictures = [picture(seed) for seed in range(3)]
    inputs = processor(
        text=["w1 <image> w2 <image> w3", "w4 <image>"], images=pictures, padding=True, return_tensors="pt"
    )
    first, second = (
        processor.tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"]),
        [processor.tokenizer.convert_tokens_to_ids("w4")],
    )
    rows = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["qformer_input_ids"], inputs["qformer_attention_mask"])
    ]
    bos = processor.tokenizer("")["input_ids"]
    assert rows == [bos + first, bos + first, bos + second]
    assert inputs["qformer_attention_mask"][2, 0] == 1, "padded on the right"


def test_the_instruction_reaches_the_projector(composed):
    model, processor = composed
    text = "w1 <image> w2"
    inputs = [
        processor(text=text, images=picture(0), instruction=words, return_tensors="pt")
        for words in (None, "w1 w2", "w9")
    ]
    with torch.no_grad():
        own, same, other = (model(**each).logits for each in inputs)
    assert torch.equal(own, same)
    assert (own - other)[0, -1].abs().max() > 1e-4


def test_a_batch_is_its_samples_one_by_one(composed):
    model, processor = composed
    texts, pictures = ["w1 <image> w2 w3 w4", "w5 <image>"], [picture(0), picture(1)]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:]
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for row in range(2):
            alone = processor(text=texts[row], images=pictures[row], return_tensors="pt")
            torch.testing.assert_close(together[row], model(**alone).logits[0, -1], rtol=0, atol=1e-5)
            one = model.generate(**alone, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -6:]
            assert torch.equal(generated[row], one)


def test_beams_and_an_uncached_run_see_it_too(composed):
    model, processor = composed
    inputs = processor(text="w1 <image> w2", images=picture(0), return_tensors="pt")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, **settings, use_cache=False))
    assert model.generate(**inputs, **settings, num_beams=2).shape[1] == inputs["input_ids"].shape[1] + 4


def test_the_answer_is_not_read_in_training(composed):
    model, processor = composed

    def batch(answer):
        messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": answer}]
        return AnyVlmDataCollator(processor)([{"messages": messages, "images": [picture(0)]}])

    short, long = batch("w3"), batch("w4 w5 w6")
    assert torch.equal(short["qformer_input_ids"], long["qformer_input_ids"])
    assert model(**short).loss.isfinite()


def test_saved_and_loaded(composed, tmp_path):
    model, processor = composed
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    texts, pictures = ["w1 <image> w2", "w3 <image>"], [picture(0), picture(1)]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    again = loaded(text=texts, images=pictures, padding=True, return_tensors="pt")
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded_model(**again).logits)
    assert "qformer_tokenizer" not in json.loads((tmp_path / "processor_config.json").read_text())


def test_a_tokenizer_that_is_missing_is_not_replaced_by_another(composed, tmp_path):
    _, processor = composed
    processor.save_pretrained(tmp_path)
    for file in (tmp_path / "qformer_tokenizer").iterdir():
        file.unlink()
    with pytest.raises((OSError, ValueError)):
        AutoProcessor.from_pretrained(tmp_path)


class TestRefusals:
    def test_pictures_without_their_instruction(self, composed):
        model, processor = composed
        inputs = processor(text="w1 <image>", images=picture(0), return_tensors="pt")
        del inputs["qformer_input_ids"], inputs["qformer_attention_mask"]
        with pytest.raises(ValueError, match="qformer_input_ids is missing"):
            model(**inputs)

    def test_an_instruction_that_nothing_reads(self):
        model, processor = compose()
        inputs = processor(text="w1 <image>", images=picture(0), return_tensors="pt")
        with pytest.raises(ValueError, match="reads no text"):
            model(**inputs, qformer_input_ids=torch.ones(1, 3, dtype=torch.long))
        with pytest.raises(ValueError, match="reads no instruction"):
            processor(text="w1 <image>", images=picture(0), instruction="w1", return_tensors="pt")

    def test_a_tokenizer_that_nothing_reads(self):
        with pytest.raises(anyvlm.CompositionError, match="reads_text"):
            compose(qformer_tokenizer=tiny_tokenizer())

    def test_a_vocabulary_that_is_too_small(self):
        projector = copy.deepcopy(PROJECTOR)
        projector["qformer_config"]["vocab_size"] = 8
        with pytest.raises(anyvlm.CompositionError, match="vocabulary of 8"):
            compose(projector=projector)

    def test_another_number_of_instructions(self, composed):
        with pytest.raises(ValueError, match="one for each text"):
            composed[1](text=["w1 <image>"], images=picture(0), instruction=["w1", "w2"], return_tensors="pt")

    def test_one_that_is_too_long(self, composed):
        with pytest.raises(ValueError, match="512 positions"):
            composed[1](text="w1 <image>", images=picture(0), instruction="w1 " * 600, return_tensors="pt")


@pytest.mark.parametrize(
    "settings", [{"views": "tiles"}, {"views": "slices"}, {"fusion": "gated"}, {"fusion": "cross_attention"}], ids=str
)
def test_every_view_is_seen_with_the_instruction_of_its_picture(settings):
    model, processor = compose(projector=PROJECTOR, **settings)
    torch.nn.init.normal_(model.multi_modal_projector.qformer.embeddings.word_embeddings.weight)
    texts, pictures = (
        ["w1 <image> w2 w3", "<image> w4 <image>"],
        [picture(0, (70, 90)), picture(1, (200, 64)), picture(2)],
    )
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    image_inputs = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        tokens = model.get_image_features(**image_inputs).pooler_output
        for index, text in enumerate((texts[0], "<image> w4", "w4 <image>")):
            inputs = processor(text=text, images=pictures[index], return_tensors="pt")
            del inputs["input_ids"], inputs["attention_mask"]
            alone = model.get_image_features(**inputs).pooler_output[0]
            torch.testing.assert_close(tokens[index], alone, rtol=0, atol=1e-5)
            other = processor(text=text, images=pictures[index], instruction="w8", return_tensors="pt")
            del other["input_ids"], other["attention_mask"]
            assert (model.get_image_features(**other).pooler_output[0] - alone).abs().max() > 1e-4
