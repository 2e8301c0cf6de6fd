"""Another language model in a trained model, without teaching it anything."""

import copy
import logging

import pytest
import torch
from model_tester import picture
from tiny_parts import VOCABULARY, compose, make_sensitive, text_config, tiny_tokenizer, vision_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import anyvlm
from anyvlm.compatibility.model_under_test import set_gates
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native
from anyvlm.compatibility.swap_checks import TestedModel
from anyvlm.composition.errors import CompositionError
from anyvlm.composition.starting_scale import embedding_rms
from anyvlm.swapping.text_swap import swap_language_model
from anyvlm.swapping.vision_swap import swap_vision_tower


QFORMER = {
    "num_queries": 4,
    "qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}
TEMPLATE = "{% for message in messages %}<turn> {{ message['content'] }} </turn> {% endfor %}"


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Words of which a third are the tiny tokenizer's, in another order, with other special tokens."""
    words = ["</turn>", "[pad]", "<turn>", "[unk]", *VOCABULARY[:39:-1], *(f"v{n}" for n in range(70))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[unk]",
        bos_token="<turn>",
        eos_token="</turn>",
        pad_token="[pad]",
        chat_template=TEMPLATE,
    )


def language_model(model_type: str = "qwen3", hidden_size: int = 48, seed: int = 8, **settings):
    """A language model with another vocabulary and, unless said otherwise, of another width."""
    config = text_config(model_type)
    values = {"hidden_size": hidden_size, "vocab_size": len(other_tokenizer()), "eos_token_id": 0, "bos_token_id": 2}
    for name, value in {**values, "pad_token_id": 1, **settings}.items():
        setattr(config, name, value)
    made = AutoModelForCausalLM.from_config(config).eval()
    make_sensitive(made, seed)
    made.generation_config.eos_token_id, made.generation_config.min_length = 0, 1
    return made


def trained(vision="clip_vision_model", text="llama", picture_size=(50, 40), **arguments) -> TestedModel:
    torch.manual_seed(0)
    model, processor = compose(vision, text, **arguments)
    make_sensitive(model, 2)
    if model.fusion is not None:
        set_gates(model.fusion, 0.7)
    return TestedModel(model, processor, picture_size=picture_size)


def tuned(old: TestedModel):
    """The old language model with somewhat other weights, as tuning leaves them."""
    made = copy.deepcopy(old.model.language_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


def tokens_of(tested: TestedModel) -> torch.Tensor:
    with torch.no_grad():
        inputs = tested.one_picture()
        return tested.model.get_image_features(**tested.image_inputs(inputs)).pooler_output[0]


def swapped(old: TestedModel, new, tokenizer=None, **arguments) -> TestedModel:
    """The model with another language model, after what must hold whatever that is."""
    tokenizer = tokenizer or other_tokenizer()
    bare = copy.deepcopy(new)
    before = {name: tensor.clone() for name, tensor in old.model.state_dict().items()}
    logits, settings = old.logits(old.one_picture()), (old.model.config.to_dict(), old.processor.to_dict())
    vocabulary = old.processor.tokenizer.get_vocab()
    found = TestedModel(
        *swap_language_model(old.model, old.processor, new, tokenizer=tokenizer, **arguments),
        picture_size=old.picture_size,
    )
    found.bare_language_model = bare
    # The text of a prompt sees what follows, and Idefics' open gates change text without pictures, too.
    fusion = found.model.fusion
    if found.model.config.image_attention != "prefix" and (fusion is None or fusion.needs_pictures):
        inputs = found.inputs(["w50 w51 w52 w53"], [])
        with torch.no_grad():
            expected = bare(**inputs).logits
        assert torch.equal(found.logits(inputs)[..., : expected.shape[-1]], expected), "text alone gives other logits"
    if fusion is not None:  # closed in new cross-attention
        set_gates(fusion, 0.7)
    assert found.model.vision_tower is old.model.vision_tower
    assert found.model.language_model is new
    found.check_forward_is_finite()
    found.check_picture_changes_logits()
    found.check_cached_generation_equals_uncached()
    for height, width in ((50, 40), (33, 120)):
        shown = found.inputs(["<image>"], [picture(0, (height, width))])
        count = int((shown["input_ids"] == found.model.config.image_token_id).sum())
        made = found.model.get_image_features(**found.image_inputs(shown)).pooler_output
        assert count == (len(made[0]) if found.model.fusion is None else 1)
    # The old model is as it was.
    now = old.model.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())
    assert (old.model.config.to_dict(), old.processor.to_dict()) == settings
    assert old.processor.tokenizer.get_vocab() == vocabulary
    assert torch.equal(old.logits(old.one_picture()), logits)
    return found


def changed(old: TestedModel, new: TestedModel) -> set[str]:
    """Tensors of the projector that are not what they were."""
    before, after = (each.model.multi_modal_projector.state_dict() for each in (old, new))
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


#: Projector -> what of it changes for embeddings of another width.
PROJECTOR_CASES = {
    "linear": ("linear", {"linear.weight", "linear.bias"}),
    "mlp": ("mlp", {"layers.1.weight", "layers.1.bias"}),
    "mlp without bias": ({"type": "mlp", "bias": False, "num_layers": 3}, {"layers.2.weight"}),
    "gated mlp": (
        {"type": "mlp", "gated": True, "hidden_act": "silu", "norm": "rms_norm"},
        {"layers.1.weight", "layers.1.bias"},
    ),
    "pixel_shuffle": ("pixel_shuffle", {"layers.1.weight", "layers.1.bias"}),
    "patch_merger": ("patch_merger", {"layers.1.weight", "layers.1.bias"}),
    "avg_pool": ("avg_pool", {"layers.1.weight", "layers.1.bias"}),
    "conv": ({"type": "conv", "num_convs": 1}, {"convs.0.weight", "linear.weight", "linear.bias"}),
    "resampler": ({"type": "resampler", "num_queries": 5}, {"output_projection.weight"}),
    "qformer": ({"type": "qformer", **QFORMER}, {"language_projection.weight", "language_projection.bias"}),
}


@pytest.mark.parametrize("name", PROJECTOR_CASES)
def test_every_projector(name):
    projector, expected = PROJECTOR_CASES[name]
    old = trained(projector=projector)
    new = swapped(old, language_model())
    # A new bias is zero, and may be what it was in shape alone.
    assert changed(old, new) == expected
    assert len(tokens_of(new)) == len(tokens_of(old))
    rms = tokens_of(new).square().mean().sqrt() / embedding_rms(new.model.language_model)
    assert 0.3 < rms < 3


@pytest.mark.parametrize("name", PROJECTOR_CASES)
def test_a_tuned_language_model_keeps_everything(name):
    old = trained(projector=PROJECTOR_CASES[name][0])
    new = swapped(old, tuned(old), old.processor.tokenizer)
    assert not changed(old, new)
    assert torch.equal(tokens_of(new), tokens_of(old))


def test_same_width_is_not_the_same_embeddings():
    """Nor is the same architecture with other weights."""
    old = trained()
    assert changed(old, swapped(old, language_model(hidden_size=32))) == {"layers.1.weight", "layers.1.bias"}
    other = copy.deepcopy(old.model.language_model)
    make_sensitive(other.apply(other._init_weights), 9)
    assert changed(old, swapped(old, other, tiny_tokenizer())) == {"layers.1.weight", "layers.1.bias"}


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_fusions(fusion):
    """New for another language model, kept for the same one, tuned."""
    old = trained(fusion=fusion)
    new = swapped(old, language_model())
    assert new.model.fusion is not old.model.fusion
    kept = swapped(old, tuned(old), old.processor.tokenizer)
    assert kept.model.fusion is not old.model.fusion, "the old model would lose its own"
    tensors = kept.model.fusion.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in old.model.fusion.state_dict().items())


def test_a_token_at_which_pictures_are_forgotten_follows():
    eos = tiny_tokenizer().eos_token_id
    old = trained(fusion={"type": "cross_attention", "forget_after": eos})
    assert swapped(old, language_model()).model.fusion.forget_after == 0
    old = trained(fusion={"type": "cross_attention", "forget_after": VOCABULARY.index("w79")})
    assert swapped(old, language_model()).model.fusion.forget_after == other_tokenizer().get_vocab()["w79"]
    old = trained(fusion={"type": "cross_attention", "forget_after": VOCABULARY.index("User")})
    assert swapped(old, language_model()).model.fusion.forget_after is None


def test_views_and_newline():
    old = trained(views={"type": "tiles", "layout": "anyres"}, picture_size=(32, 64))
    new = swapped(old, language_model())
    assert new.model.image_newline.shape == (48,)
    assert new.model.config.image_views == old.model.config.image_views
    kept = swapped(old, tuned(old), old.processor.tokenizer)
    assert torch.equal(kept.model.image_newline, old.model.image_newline)


def test_what_stands_before_the_projector_stays():
    """After a tower swap the projector has a map and a grid in front; another language model leaves both alone."""
    old = trained(projector="resampler")
    model, processor = swap_vision_tower(old.model, old.processor, vision_config("resnet"), image_size=64)
    old = TestedModel(model, processor)
    new = swapped(old, language_model())
    assert changed(old, new) == {"projector.output_projection.weight"}
    for key in ("aligned_grid", "aligned_features", "in_features"):
        assert new.model.config.projector_config[key] == old.model.config.projector_config[key]


def test_tokenizer_template_and_generation_are_the_new_ones():
    old = trained()
    new = swapped(old, language_model())
    tokenizer = new.processor.tokenizer
    assert tokenizer.eos_token == "</turn>"
    assert new.model.generation_config.eos_token_id == 0
    assert new.model.generation_config.min_length == 1
    assert new.model.config.text_config.eos_token_id == 0
    assert tokenizer.convert_ids_to_tokens(new.model.config.image_token_id) == "<image>"
    assert len(tokenizer) == len(other_tokenizer()) + 1
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w50"}]}]
    text = new.processor.apply_chat_template(message)
    assert text.startswith("<turn>") and "<image>" in text
    assert new.model.config.composed_from["vision"] == old.model.config.composed_from["vision"]


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "gemma3n_text"])
def test_language_models_of_other_makes(model_type):
    tokenizer = tiny_tokenizer()
    new = AutoModelForCausalLM.from_config(text_config(model_type)).eval()
    make_sensitive(new, 8)
    old = trained()
    found = swapped(old, new, tokenizer)
    assert len(tokens_of(found)) == 16


def test_another_projector():
    old = trained(video_frames={"frame_pool": 2, "num_frames": 4})
    new = swapped(old, language_model(), projector={"type": "resampler", "num_queries": 3})
    expected = {"type": "resampler", "num_queries": 3, "in_features": 32, "out_features": 48}
    assert new.model.config.projector_config == expected
    assert len(tokens_of(new)) == 3
    # Queries have no neighbours that could be pooled.
    assert new.model.config.video_frames["frame_pool"] == 1
    assert new.model.config.video_frames["num_frames"] == 4 == new.processor.video_frames["num_frames"]


def test_instructions_keep_their_tokenizer():
    old = trained(projector={"type": "qformer", "reads_text": True, **QFORMER})
    new = swapped(old, language_model())
    assert new.processor.qformer_tokenizer.get_vocab() == old.processor.qformer_tokenizer.get_vocab()


def test_text_around_pictures_follows_where_the_tokenizer_knows_it(caplog):
    old = trained(image_text={"start": "w50", "end": "w51"})
    assert swapped(old, language_model()).processor.image_text == {"start": "w50", "end": "w51"}
    old = trained(image_text={"start": "w50", "end": "w3"})
    with caplog.at_level(logging.WARNING):
        new = swapped(old, language_model())
    assert new.processor.image_text is None
    assert "Nothing is written around" in caplog.text and "'w3'" in caplog.text


def test_masks_of_pictures_stay_or_it_is_refused():
    old = trained(image_attention="bidirectional")
    assert swapped(old, language_model()).model.config.image_attention == "bidirectional"
    mamba = AutoModelForCausalLM.from_config(text_config("mamba")).eval()
    with pytest.raises(CompositionError, match='set model.config.image_attention = "causal" beforehand'):
        swap_language_model(old.model, old.processor, mamba, tokenizer=tiny_tokenizer())
    old.model.config.image_attention = "causal"
    assert swapped(old, mamba, tiny_tokenizer()).model.config.image_attention == "causal"


@pytest.mark.parametrize("part", ["vision", "text"])
def test_frozen_parts_stay_frozen(part):
    """As most towers are, in most trained models."""
    old = trained()
    old.model.vision_tower.requires_grad_(False)
    old.model.language_model.requires_grad_(False)
    if part == "text":
        new, _ = swap_language_model(old.model, old.processor, language_model(), tokenizer=other_tokenizer())
    else:
        new, _ = swap_vision_tower(old.model, old.processor, vision_config("resnet"), image_size=64)
    kept = new.vision_tower if part == "text" else new.language_model
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert all(parameter.requires_grad for parameter in new.multi_modal_projector.parameters())


def test_precision_and_mode_are_the_models():
    model, processor = compose(dtype=torch.bfloat16)
    found, _ = swap_language_model(model.train(), processor, language_model(), tokenizer=other_tokenizer())
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert found.training


def test_saved_it_is_loaded_and_swapped_again(tmp_path):
    old = trained(projector="pixel_shuffle", fusion="gated")
    new = swapped(old, language_model())
    new.check_save_and_load(tmp_path, resize=False)
    back = swapped(new, copy.deepcopy(old.model.language_model), old.processor.tokenizer)
    assert back.model.config.projector_config["out_features"] == 32


@pytest.mark.parametrize("name", ["llava, clip tower", "paligemma", "qwen2_vl", "idefics", "idefics3", "gemma3"])
def test_imported_models(name):
    """Prompts are written as the new language model wants them, and a tuned one of the same keeps everything."""
    case = next(case for case in native_cases() if case.name == name)
    model, processor = anyvlm.from_native(*build_native(case, 0, case.ties[0]))
    old = TestedModel(model, processor, picture_size=(48, 96))
    wider = language_model(hidden_size=64)
    if model.config.projector_config["type"] == "identity" and model.fusion is None:
        with pytest.raises(CompositionError, match='An identity projector leaves features.*projector="mlp"'):
            swap_language_model(model, processor, wider, tokenizer=other_tokenizer())
        new = swapped(old, wider, projector={"type": "mlp"})
    else:
        new = swapped(old, wider)
    assert new.processor.prompt_form is None and not new.processor.pictures_first
    assert "text_scales" not in new.model.config.composed_from["native"]
    kept = swapped(old, tuned(old), old.processor.tokenizer)
    assert not changed(old, kept)


def test_a_llava_with_another_language_model_is_a_llava():
    case = next(case for case in native_cases() if case.name == "llava, clip tower")
    model, processor = anyvlm.from_native(*build_native(case, 0, case.ties[0]))
    new = AutoModelForCausalLM.from_config(text_config("qwen2")).eval()
    found, found_processor = swap_language_model(
        model, processor, new, tokenizer=tiny_tokenizer(), projector={"type": "mlp"}
    )
    native, _ = anyvlm.to_native(found, found_processor)  # which compares the logits
    assert type(native).__name__ == "LlavaForConditionalGeneration"


def test_what_cannot_be_is_refused(caplog):
    model, processor = compose()
    new = language_model()

    def refused(error, match, text=new, **arguments):
        with pytest.raises(error, match=match):
            swap_language_model(model, processor, text, **{"tokenizer": other_tokenizer(), **arguments})

    refused(TypeError, "must be a Hub id", text=None)
    refused(CompositionError, "not a text model", text=vision_config("resnet"))
    refused(ValueError, "Unknown projector 'perceiver'", projector={"type": "perceiver"})
    refused(
        CompositionError, "cannot be cut into squares of 3x3", projector={"type": "pixel_shuffle", "scale_factor": 3}
    )
    refused(CompositionError, "An identity projector leaves", projector={"type": "identity"})
    small = language_model("gpt2", n_positions=16, n_embd=48)
    refused(CompositionError, "takes 16 tokens, and the language model has 16 positions", text=small)
    with caplog.at_level(logging.WARNING):
        larger = language_model("gpt2", n_positions=24, n_embd=48)
        swap_language_model(model, processor, larger, tokenizer=other_tokenizer())
    assert "takes 16 of the 24 positions" in caplog.text
