"""Idefics: imported, run beside the native class, exported; and what its processor and its packed texts ask for."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import IdeficsImageProcessorPil, IdeficsProcessor, LlamaConfig, PreTrainedTokenizerFast

import anyvlm
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.native import family_of
from anyvlm.composition.native.equality import logits_of, sample_picture
from anyvlm.composition.native.importing import processor_from_native


CASES = native_cases("idefics")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


@pytest.fixture(scope="module")
def pair():
    native, native_processor = build_native(CASES[1], 0, tied=True)
    return (native, native_processor, *anyvlm.from_native(native, native_processor))


def _characters() -> PreTrainedTokenizerFast:
    """A token for each byte, so that no space is lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=tokens,
    )


def _conversation(image: dict) -> list[dict]:
    words = {"type": "text", "text": " What is this? "}
    return [
        {"role": "user", "content": [image, {"type": "text", "text": "and"}, image, image, words]},
        {"role": "assistant", "content": "Two cats."},
        {"role": "user", "content": [words, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": "Why?"},
    ]


def test_the_template_writes_what_the_native_processor_makes_of_words_and_pictures(pair):
    """Spaces, neighbouring pictures and ends of utterances: the oracle is the native processor, given the conversation as
    the instruct checkpoints' documentation writes it."""
    *_, model, _ = pair
    native = IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), _characters())
    processor = processor_from_native(family_of(pair[0].config), native, model.config)
    pictures = [sample_picture(seed=seed) for seed in range(4)]
    end = "<end_of_utterance>"
    prompt = [
        "User:",
        pictures[0],
        "and",
        *pictures[1:3],
        f"What is this?{end}\nAssistant: Two cats.{end}\nUser: What is this?",
    ]
    prompt += [pictures[3], f"{end}\nAssistant: A dog.{end}\nUser: Why?{end}\nAssistant:"]
    native.tokenizer_was_trained_with_end_of_utterance_token = (
        False  # it would add them between words that follow words
    )
    expected = native(text=[prompt], return_tensors="pt")
    text = processor.apply_chat_template(_conversation({"type": "image"}), add_generation_prompt=True, tokenize=False)
    found = processor(text=[text], images=[pictures], return_tensors="pt")
    assert processor.tokenizer.decode(found["input_ids"][0]) == processor.tokenizer.decode(expected["input_ids"][0])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"][0])


def test_pictures_are_forgotten_after_the_end_of_a_text(pair):
    """Texts are packed: after `</s>` nothing is seen until the next picture."""
    native, native_processor, ours, processor = pair
    picture = "<fake_token_around_image><image><fake_token_around_image>"
    texts = [f"<s>w1 {picture} w2 </s> w3 w4 {picture} w5 </s> w6", f"<s>w7 </s> w8 {picture} w9", "<s>w1 </s> w2"]
    pictures = [[sample_picture(seed=0), sample_picture(seed=1)], [sample_picture(seed=2)], []]
    settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    expected_inputs = family_of(native.config).call_processor(native_processor, texts, pictures, **settings)
    inputs = processor(text=texts, images=pictures, **settings)
    assert torch.equal(inputs["input_ids"], expected_inputs["input_ids"])
    expected, found = logits_of(native, expected_inputs), logits_of(ours, inputs)
    attended = inputs["attention_mask"].bool()
    assert (found - expected)[attended].abs().max() <= 1e-5
    ours.fusion.forget_after = None
    try:
        remembered = logits_of(ours, inputs)
    finally:
        ours.fusion.forget_after = native.config.eos_token_id
    assert (remembered - expected)[attended].abs().max() > 1e-3, "the texts do not show it"


def test_text_without_pictures(pair):
    """The native class still runs the mlp of its cross-attention layers."""
    native, native_processor, ours, processor = pair
    expected = logits_of(native, native_processor(text=[["w1 w2 w3"]], return_tensors="pt"))
    inputs = processor(text=["<s>w1 w2 w3"], return_tensors="pt")
    assert (logits_of(ours, inputs) - expected).abs().max() <= 1e-5
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, uncached = (ours.generate(**inputs, **settings, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)


def test_tied_weights_stay_tied_and_saved_models_load(pair, tmp_path):
    *_, ours, processor = pair
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    ours.save_pretrained(tmp_path)
    loaded = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
    inputs = processor(text=["<s>w1 <image> w2"], images=[[sample_picture()]], return_tensors="pt")
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(ours, inputs))
    back, _ = anyvlm.to_native(ours, processor)
    embeddings = back.model.embed_tokens
    assert back.lm_head.weight is embeddings.weight
    assert back.lm_head.additional_fc.weight is embeddings.additional_embedding.weight


def test_what_was_composed_becomes_native(tmp_path):
    """A CLIP and a Llama, with the cross-attention that the native class has."""
    case = CASES[0].config(False)
    native, native_processor = build_native(CASES[0], 0, tied=False)
    ours, processor = anyvlm.from_native(native, native_processor)
    arguments = {
        name: value
        for name, value in ours.config.image_fusion_config.items()
        if name not in ("decoder_layers", "num_decoder_layers", "hidden_size", "image_features")
    }
    composed, composed_processor = anyvlm.compose(
        vision=ours.config.vision_config,
        text=LlamaConfig(**{**ours.config.text_config.to_dict(), "additional_vocab_size": 0}),
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        projector="identity",
        vision_feature_select_strategy="full",
        fusion={"type": "cross_attention", **arguments},
    )
    with pytest.raises(anyvlm.CompositionError, match="make 12 and 11 ids"):
        anyvlm.to_native(composed, composed_processor)  # its template does not write the tokens around pictures
    composed_processor.chat_template = processor.chat_template
    back, _ = anyvlm.to_native(composed, composed_processor)
    assert type(back) is type(native)
    assert back.config.vocab_size == case.vocab_size + case.additional_vocab_size


def test_dropout_is_refused():
    native, native_processor = build_native(CASES[0], 0, tied=False)
    native.config.dropout = 0.1
    with pytest.raises(anyvlm.CompositionError, match=r"dropout=0\.1"):
        anyvlm.from_native(native, native_processor)
