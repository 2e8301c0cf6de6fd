"""`anyvlm.verify` passes what is right, and of what is broken in one place names that place first."""

import copy
import json
import shutil

import pytest
import torch
from remote_checkpoints import use_remote_image_processor, use_remote_tokenizer, write_remote_part
from safetensors.torch import load_file, save_file
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoModel, AutoModelForCausalLM
from verified_parts import CHAT_TEMPLATE, make_sources, other_tokenizer, save_composed, save_language_model, save_tower

import anyvlm
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native
from anyvlm.modeling.projectors import build_projector
from anyvlm.publishing.fresh_worker import picture


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def loaded(sources):
    model = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(sources.checkpoint).eval()
    return model, anyvlm.AnyVlmProcessor.from_pretrained(sources.checkpoint)


@pytest.fixture
def composed(loaded):
    """A copy to be broken."""
    return copy.deepcopy(loaded)


@pytest.fixture
def checkpoint(sources, tmp_path):
    """A copy to be broken."""
    return shutil.copytree(sources.checkpoint, tmp_path / "checkpoint")


def verify(subject, against, **kwargs):
    kwargs.setdefault("fresh_process", False)
    return anyvlm.verify(subject, against, **kwargs)


# What is right passes.


def test_checkpoint_passes_every_step_also_in_a_fresh_process(sources):
    report = anyvlm.verify(sources.checkpoint, sources.both)
    assert report.passed, report
    assert [step.name for step in report.steps] == [
        "checkpoint",
        "language_model",
        "vision_tower",
        "projector",
        "processor",
        "whole",
    ]
    not_checked = [check.name for step in report.steps for check in step.checks if check.status != "passed"]
    assert not_checked == ["layer", "compared with before"]  # which need the composed model before
    assert report.check("language_model", "logits").figures["max_difference"] == 0
    assert report.check("vision_tower", "features").figures["max_difference"] == 0
    assert report.check("whole", "fresh process").figures["same_tokens"]
    json.dumps(report.to_dict())


def test_without_sources_what_needs_none_is_checked(composed):
    report = verify(composed, None)
    assert report.passed and report.against == []
    for step, check in (("language_model", "logits"), ("vision_tower", "features"), ("processor", "tokenizer")):
        assert report.check(step, check).status == "not checked"
        assert "no source" in report.check(step, check).detail
    assert report.check("whole", "picture").status == "passed"


def test_source_logits_are_those_of_the_source_itself(composed, sources):
    """The figures are those that transformers' own model gives, worked out by hand."""
    with torch.no_grad():
        composed[0].language_model.lm_head.weight[:90] *= 1.5  # logits are 1.5 times as large, all differences 0.5
    report = verify(composed, sources.both, trained=["language_model"])
    assert report.passed
    figures = report.check("language_model", "logits").figures
    assert figures["relative_difference"] == pytest.approx(0.5, rel=1e-5)
    weights = report.check("language_model", "weights")
    assert weights.figures["most_changed"] == {"lm_head.weight": pytest.approx(0.5)}
    source = AutoModelForCausalLM.from_pretrained(sources.language_model)
    squares = {name: tensor.square().sum() for name, tensor in source.state_dict().items()}
    expected = (0.25 * squares["lm_head.weight"] / sum(squares.values())).sqrt()
    assert weights.figures["relative_change"] == pytest.approx(float(expected), rel=1e-5)


def test_model_is_left_as_it_is(composed, sources):
    model, processor = composed
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generation_config = model.generation_config.to_dict()
    assert verify(composed, sources.both).passed
    assert model.training and model.generation_config.to_dict() == generation_config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"projector": "linear", "fusion": "cross_attention"},
        {"projector": {"type": "resampler", "num_queries": 5}, "fusion": "gated"},
        {"projector": "pixel_shuffle", "image_attention": "prefix"},
        {"views": {"type": "tiles", "layout": "anyres"}, "image_attention": "bidirectional"},
        {"projector": {"type": "qformer", "num_queries": 4, "reads_text": True}},
    ],
    ids=lambda arguments: "-".join(map(str, arguments)),
)
def test_every_way_of_joining_passes(sources, arguments):
    model, processor = anyvlm.compose(sources.tower, sources.language_model, **arguments)
    report = verify((model, processor), sources.both)
    assert report.passed, report


@pytest.mark.parametrize("vision", ["siglip2_vision_model", "qwen2_vl_vision", "pixtral", "resnet"])
def test_towers_that_take_pictures_in_other_ways_pass(sources, vision, tmp_path):
    torch.manual_seed(0)
    model, processor = anyvlm.compose(vision_config(vision), sources.language_model)
    model.vision_tower.save_pretrained(tmp_path / "tower")
    report = verify((model, processor), [tmp_path / "tower", sources.language_model])
    assert report.passed, report
    assert report.check("vision_tower", "features").figures["max_difference"] == 0


def test_fused_towers_are_compared_one_by_one(sources, tmp_path):
    other = save_tower(tmp_path / "other", "dinov2", seed=5)
    model, processor = anyvlm.compose((sources.tower, other), sources.language_model)
    against = [other, sources.language_model, sources.tower]  # in any order
    assert verify((model, processor), against).passed
    with torch.no_grad():
        model.vision_tower.towers[1].layernorm.weight[0] += 1
    report = verify((model, processor), against)
    assert report.first_failure == ("vision_tower", "weights") and "layernorm.weight" in report.verdict()
    model, processor = anyvlm.compose((sources.tower, other), sources.language_model)
    processor.image_processor.image_processors[1].image_std = [0.5, 0.5, 0.5]
    assert verify((model, processor), against).first_failure == ("vision_tower", "colours")


# What is broken in one place is found there first.


def break_language_model_weight(model, processor):
    model.language_model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5


def break_word_embedding(model, processor):
    model.get_input_embeddings().weight[17] *= 1.01


def break_language_model_config(model, processor):
    for layer in model.language_model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5


def break_language_model_spec(model, processor):
    model.learn_about_language_model({"embedding_scale": 2.0})


def break_text_in_the_whole(model, processor):
    model.register_forward_hook(lambda module, arguments, outputs: setattr(outputs, "logits", 2 * outputs.logits))


def break_tower_weight(model, processor):
    model.vision_tower.encoder.layers[0].self_attn.q_proj.weight[0, 0] += 0.1


def break_tower_depth(model, processor):
    model.vision_tower.encoder.layers = model.vision_tower.encoder.layers[:-1]


def break_tower_config(model, processor):
    for layer in model.vision_tower.encoder.layers:
        layer.layer_norm1.eps = 0.5


def break_tower_spec(model, processor):
    """The class token is read as the first patch."""
    model.config.vision_tower_spec = {**model.config.vision_tower_spec, "num_prefix_tokens": 0, "num_suffix_tokens": 1}


def break_feature_layer(model, processor):
    model.config.vision_feature_layer = -2


def break_image_mean(model, processor):
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]


def break_rescaling(model, processor):
    processor.image_processor.do_rescale = False


def break_interpolation(model, processor):
    processor.image_processor.resample = 0  # nearest


def break_picture_size(model, processor):
    processor.image_processor.crop_size = {"height": 48, "width": 48}
    processor.image_processor.size = {"shortest_edge": 48}


def break_projector_scale(model, processor):
    for parameter in model.multi_modal_projector.output_layer.parameters():
        parameter *= 100


def break_projector_to_constant(model, processor):
    layer = model.multi_modal_projector.output_layer
    layer.weight.zero_()
    layer.bias.normal_(std=0.1)


def break_projector_to_nan(model, processor):
    model.multi_modal_projector.output_layer.weight[0, 0] = float("nan")


class Blind(torch.nn.Module):
    """Tokens that say where they are, and nothing of the picture."""

    output_layer = None

    def forward(self, features, grid):
        places = torch.arange(features.shape[1]).view(1, -1, 1) * torch.ones(len(features), 1, 32)
        return 0.1 * torch.cos(places * torch.arange(32)), grid


def break_projector_to_blind(model, processor):
    model.multi_modal_projector = Blind()


def break_tokenizer(model, processor):
    text = processor.tokenizer.backend_tokenizer.to_str().replace('"User":4', '"User":5').replace('"w1":11', '"w1":4')
    assert text != processor.tokenizer.backend_tokenizer.to_str()
    processor.tokenizer._tokenizer = type(processor.tokenizer.backend_tokenizer).from_str(text)


def break_image_token_id(model, processor):
    model.config.image_token_id -= 1


def break_row_of_image_token(model, processor):
    model.resize_token_embeddings(90)


def break_processor_spec(model, processor):
    """The spec of a tower of larger patches."""
    processor.vision_tower_spec = {**processor.vision_tower_spec, "grid": [2, 2]}


def break_number_of_tokens(model, processor):
    """Another checkpoint's projector."""
    width = model.config.vision_tower_spec["hidden_size"]
    shuffle = {"type": "pixel_shuffle", "in_features": width, "out_features": 32, "scale_factor": 2}
    projector = build_projector(shuffle)
    for module in projector.modules():
        model._init_weights(module)
    model.multi_modal_projector = projector


def break_chat_template_without_pictures(model, processor):
    processor.chat_template = processor.chat_template.replace("<image>", "")


def break_chat_template_of_another_model(model, processor):
    processor.chat_template = processor.chat_template.replace("User: ", "Question: ")


def break_eos(model, processor):
    model.generation_config.eos_token_id = 7


def break_pad(model, processor):
    model.generation_config.pad_token_id = 9


def break_picture_in_the_whole(model, processor):
    def without_picture(module, arguments, kwargs):
        if kwargs.get("pixel_values") is not None:
            kwargs["pixel_values"] = torch.zeros_like(kwargs["pixel_values"])
        return arguments, kwargs

    model.register_forward_pre_hook(without_picture, with_kwargs=True)


def break_order_in_batch(model, processor):
    def reversed_pictures(module, arguments, kwargs):
        if kwargs.get("pixel_values") is not None:
            kwargs["pixel_values"] = kwargs["pixel_values"].flip(0)
        return arguments, kwargs

    model.register_forward_pre_hook(reversed_pictures, with_kwargs=True)


def break_cache_of_long_prompts(model, processor):
    def forgetful(module, arguments, kwargs, outputs):
        cache = kwargs.get("past_key_values")
        if cache is not None and kwargs["input_ids"].shape[1] == 1 and cache.get_seq_length() > 20:
            outputs.logits = outputs.logits.flip(-1)
        return outputs

    model.register_forward_hook(forgetful, with_kwargs=True)


SABOTAGES = {
    break_language_model_weight: ("language_model", "weights"),
    break_word_embedding: ("language_model", "weights"),
    break_language_model_config: ("language_model", "logits"),
    break_language_model_spec: ("language_model", "rules"),
    break_text_in_the_whole: ("language_model", "text in the whole"),
    break_image_mean: ("vision_tower", "colours"),
    break_rescaling: ("vision_tower", "colours"),
    break_interpolation: ("vision_tower", "pixels"),
    break_tower_weight: ("vision_tower", "weights"),
    break_tower_depth: ("vision_tower", "weights"),
    break_tower_config: ("vision_tower", "features"),
    break_tower_spec: ("vision_tower", "features"),
    break_picture_size: ("vision_tower", "features"),
    break_projector_to_nan: ("projector", "finite"),
    break_projector_scale: ("projector", "scale"),
    break_projector_to_constant: ("projector", "places"),
    break_projector_to_blind: ("projector", "pictures"),
    break_tokenizer: ("processor", "tokenizer"),
    break_image_token_id: ("processor", "image token"),
    break_row_of_image_token: ("processor", "image token"),
    break_processor_spec: ("processor", "settings"),
    break_number_of_tokens: ("processor", "token counts"),
    break_chat_template_without_pictures: ("processor", "pictures in the chat template"),
    break_chat_template_of_another_model: ("processor", "chat template"),
    break_eos: ("processor", "special tokens"),
    break_pad: ("processor", "special tokens"),
    break_picture_in_the_whole: ("whole", "picture"),
    break_order_in_batch: ("whole", "batch"),
    break_cache_of_long_prompts: ("whole", "generation"),
}


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda function: function.__name__.removeprefix("break_"))
def test_sabotage_is_named_first(composed, sources, sabotage):
    with torch.no_grad():
        sabotage(*composed)
    report = verify(composed, sources.both)
    assert report.first_failure == SABOTAGES[sabotage], report
    failed = report.check(*SABOTAGES[sabotage])
    assert failed.detail and failed.advice and failed.detail in report.verdict()
    # Nothing after it was run.
    results = [check.status for step in report.steps for check in step.checks]
    assert set(results[results.index("failed") + 1 :]) <= {"not reached"}


def test_all_steps_go_on_after_a_failure(composed, sources):
    with torch.no_grad():
        break_language_model_weight(*composed)
        break_projector_scale(*composed)
    break_eos(*composed)
    report = verify(composed, sources.both, all_steps=True)
    failed = [(step.name, check.name) for step in report.steps for check in step.checks if check.status == "failed"]
    assert failed == [
        ("language_model", "weights"),
        ("language_model", "logits"),
        ("projector", "scale"),
        ("processor", "special tokens"),
        ("processor", "end of an answer"),
    ]
    assert report.first_failure == failed[0]
    assert "layers.1.mlp.up_proj.weight" in report.verdict()


def test_end_of_an_answer_must_end_generation(composed, sources):
    model, processor = composed
    processor.chat_template = processor.chat_template.replace("+ eos_token", "+ pad_token")
    language_model = AutoModelForCausalLM.from_pretrained(sources.language_model)
    language_model.name_or_path = ""  # comes without a tokenizer, so that nothing else is said about the chat format
    report = verify(composed, [language_model, sources.tower])
    assert report.first_failure == ("processor", "end of an answer") and "'<pad>'" in report.verdict()


# Files.


def remove_code(folder):
    (folder / "mlp_projector.py").unlink()


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def remove_processor(folder):
    (folder / "processor_config.json").unlink()


def lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["language_model.model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["multi_modal_projector.third.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    config["projector_config"]["in_features"] += 1
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("sabotage", "check", "named"),
    [
        (remove_code, "files", "mlp_projector.py"),
        (remove_weights, "files", "model.safetensors"),
        (remove_processor, "files", "processor_config.json"),
        (lose_a_weight, "weights", "language_model.model.norm.weight"),
        (add_a_weight, "weights", "multi_modal_projector.third.weight"),
        (another_width, "weights", "in_features"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_broken_files_are_named_first(checkpoint, sources, sabotage, check, named):
    sabotage(checkpoint)
    report = verify(checkpoint, sources.both)
    assert report.first_failure == ("checkpoint", check), report
    assert named in report.verdict()


def test_code_of_the_checkpoint_is_what_a_fresh_process_runs(checkpoint, sources):
    """Here anyvlm's own classes run, so that only the fresh process sees what the checkpoint's code does."""
    path = checkpoint / "image_features.py"
    code = path.read_text()
    changed = code.replace(
        "tokens[index], token_grids[index] = sample,", "tokens[index], token_grids[index] = 2 * sample,"
    )
    assert changed != code
    path.write_text(changed)
    report = anyvlm.verify(checkpoint, sources.both)
    assert report.first_failure == ("whole", "fresh process"), report


def test_another_code_version_is_noted(checkpoint, sources):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "code_version": "0.0.7"}))
    report = verify(checkpoint, sources.both)
    assert report.passed and any("0.0.7" in note for note in report.notes)


# Trained parts, and the model before a swap.


def test_trained_parts_must_be_said_to_be_trained(composed, sources):
    model, processor = composed
    with torch.no_grad():
        break_tower_weight(model, processor)
        break_language_model_weight(model, processor)
    assert verify(composed, sources.both).first_failure == ("language_model", "weights")
    assert verify(composed, sources.both, trained=["language_model"]).first_failure == ("vision_tower", "weights")
    report = verify(composed, sources.both, trained=["language_model", "vision_tower"])
    assert report.passed, report
    assert "up_proj" in report.check("language_model", "weights").detail
    assert 0 < report.check("vision_tower", "features").figures["relative_difference"] < 1
    with pytest.raises(ValueError, match="multi_modal_projector cannot be said to be trained"):
        verify(composed, sources.both, trained=["multi_modal_projector"])


def test_trained_parts_with_nan_still_fail(composed, sources):
    with torch.no_grad():
        composed[0].vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] = float("nan")
    report = verify(composed, sources.both, trained=["vision_tower"])
    assert report.first_failure == ("vision_tower", "features")
    assert "nan" in json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("vision", ["clip_vision_model", "resnet"])
def test_pictures_of_their_own_size_after_a_swap(sources, vision, tmp_path):
    torch.manual_seed(0)
    subject = anyvlm.compose(vision_config(vision), sources.language_model, image_size=64)
    before = copy.deepcopy(subject)
    model, processor, _ = anyvlm.swap(*subject, views="native")
    report = verify((model, processor), [before])
    assert report.passed, report
    assert report.check("vision_tower", "features").figures["max_difference"] == 0
    assert any("called otherwise" in note for note in report.notes)


def test_resized_tower_is_read_as_it_is_measured_anew(sources, loaded):
    model, processor, _ = anyvlm.swap(*copy.deepcopy(loaded), patch_size=4)
    report = verify((model, processor), sources.checkpoint)
    assert report.first_failure == ("vision_tower", "weights") and "[32, 3, 4, 4]" in report.verdict()
    report = verify((model, processor), sources.checkpoint, trained=["vision_tower"])
    assert report.passed, report
    assert "measured anew" in report.check("vision_tower", "features").detail
    break_tower_spec(model, processor)
    report = verify((model, processor), sources.checkpoint, trained=["vision_tower"])
    assert report.first_failure == ("vision_tower", "features")


def test_composed_model_before_the_swap_stands_for_its_parts(composed, sources):
    report = verify(composed, sources.checkpoint)
    assert report.passed, report
    assert report.against[0] == {"source": str(sources.checkpoint), "as": "vision tower"}
    assert report.check("projector", "compared with before").detail == "The projector is bit for bit what it was."
    break_feature_layer(*composed)
    assert verify(composed, sources.checkpoint).first_failure == ("vision_tower", "layer")


def test_scale_is_compared_with_that_of_the_model_before(composed, sources):
    model, processor = composed
    before = copy.deepcopy(composed)
    with torch.no_grad():
        for parameter in (*before[0].multi_modal_projector.output_layer.parameters(),):
            parameter *= 60  # as training may make it
    assert verify(before, sources.both).first_failure == ("projector", "scale")
    assert verify(before, sources.both, scale_limit=100).passed
    assert verify(before, [*sources.both, before]).passed
    report = verify(composed, [*sources.both, before])  # 60 times smaller than it was
    assert report.first_failure == ("projector", "scale")
    # What one language model is used to says nothing about another.
    torch.nn.init.normal_(before[0].get_input_embeddings().weight, std=0.02)
    assert verify(composed, [*sources.both, before]).passed


def test_replaced_tower_is_noted_and_the_rest_compared(sources, tmp_path):
    other = save_tower(tmp_path / "other", "dinov2", seed=5)
    subject = anyvlm.compose(other, sources.language_model)
    report = verify(subject, sources.checkpoint)
    assert report.passed, report
    assert report.check("language_model", "logits").status == "passed"
    assert report.check("vision_tower", "weights").status == "not checked"
    assert any("the vision tower was replaced" in note for note in report.notes)
    report = verify(subject, [sources.checkpoint, other])  # the part itself counts more
    assert report.passed and report.check("vision_tower", "weights").status == "passed"


def test_swapped_models_pass_against_what_they_were_and_what_was_put_in(sources, loaded, tmp_path):
    """What `anyvlm.swap` makes is checked by steps that know nothing of how it is made."""
    tower, language_model = save_tower(tmp_path / "tower", "dinov2", seed=5), tmp_path / "language_model"
    template = CHAT_TEMPLATE.replace("User", "w1").replace("Assistant", "w2")
    save_language_model(language_model, "gpt2", seed=6, tokenizer=other_tokenizer(), chat_template=template)
    model, processor, _ = anyvlm.swap(*copy.deepcopy(loaded), vision=tower)
    report = verify((model, processor), [sources.checkpoint, tower])
    assert report.passed, report
    assert report.check("language_model", "weights").figures["changed"] == 0
    assert report.check("projector", "compared with before").status == "passed"
    model, processor, _ = anyvlm.swap(*copy.deepcopy(loaded), text=language_model)
    report = verify((model, processor), [language_model, sources.checkpoint])
    assert report.passed, report
    assert (
        report.check("vision_tower", "layer").status == report.check("processor", "chat template").status == "passed"
    )
    # With what goes wrong most often, it does not: the old processor, the old chat format.
    report = verify((model, copy.deepcopy(loaded[1])), [language_model, sources.checkpoint])
    assert report.first_failure == ("processor", "tokenizer"), report
    processor.chat_template = loaded[1].chat_template
    report = verify((model, processor), [language_model, sources.checkpoint])
    assert report.first_failure == ("processor", "chat template"), report


def test_imported_model_passes_against_its_native_class():
    """Aya Vision does without the scale of logits that its language model has by itself."""
    native, native_processor = build_native(native_cases("cohere_vision")[0], 0, False)
    subject = anyvlm.from_native(copy.deepcopy(native), native_processor)
    report = verify(subject, [native])
    assert report.passed, report
    assert "as a whole" in report.check("language_model", "logits").detail
    with torch.no_grad():
        subject[0].language_model.model.norm.weight[0] += 1
    assert verify(subject, [native]).first_failure == ("language_model", "weights")


def test_parts_with_code_of_their_own_pass(tmp_path):
    use_remote_tokenizer(write_remote_part(tmp_path / "language_model", "old_style_lm"))
    use_remote_image_processor(write_remote_part(tmp_path / "tower", "tower"))
    both = [tmp_path / "language_model", tmp_path / "tower"]
    save_composed(tmp_path / "composed", both[1], both[0], trust_remote_code=True)
    report = verify(tmp_path / "composed", both, trust_remote_code=True)
    assert report.passed, report
    assert len(report.against) == 2 and report.check("vision_tower", "colours").status == "passed"
    report = verify(tmp_path / "composed", both)
    assert report.first_failure == ("checkpoint", "weights") and "trust_remote_code" in report.verdict()


# Sources are known by what they are.


def test_order_does_not_matter_and_types_may_be_forced(composed, sources):
    expected = [
        {"source": str(sources.tower), "as": "vision tower"},
        {"source": str(sources.language_model), "as": "language model"},
    ]
    for against in (
        sources.both,
        sources.both[::-1],
        [f"vision={sources.tower}", f"text={sources.language_model}"],
        {"text": sources.language_model, "vision": sources.tower},
    ):
        assert verify(composed, against).against == expected


def test_instances_are_sources(composed, sources):
    tower, language_model = (
        AutoModel.from_pretrained(sources.tower),
        AutoModelForCausalLM.from_pretrained(sources.language_model),
    )
    tokenizer = tiny_tokenizer()
    report = verify(composed, [tokenizer, language_model, tower, composed[1].image_processor])
    assert report.passed, report
    assert {use["as"] for use in report.against} == {"vision tower", "language model", "tokenizer", "image processor"}


def test_own_module_as_a_source_shows_nothing(composed, sources):
    report = verify(composed, [composed[0].language_model, sources.tower])
    assert report.check("language_model", "weights").status == "not checked"
    assert "own module" in report.check("language_model", "weights").detail


def test_tokenizer_alone_is_a_source(composed, sources, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    report = verify(composed, tmp_path)
    assert report.against == [{"source": str(tmp_path), "as": "tokenizer"}]
    assert report.check("processor", "tokenizer").status == "passed"


def test_composite_is_used_for_the_parts_it_has(sources, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    vision = vision_config("clip_vision_model").to_dict()
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text.to_dict(), projection_dim=16)).eval()
    whole.save_pretrained(tmp_path / "clip")
    subject = anyvlm.compose(tmp_path / "clip", sources.language_model, image_size=32)
    report = verify(subject, [tmp_path / "clip", sources.language_model])
    assert report.passed, report
    assert report.against[0] == {"source": str(tmp_path / "clip"), "as": "vision tower"}
    assert report.check("vision_tower", "features").status == "passed"


def test_another_source_of_the_same_type_is_found_out(composed, sources, tmp_path):
    other = save_tower(tmp_path / "other", seed=9)
    assert verify(composed, [other, sources.language_model]).first_failure == ("vision_tower", "weights")
    third = save_language_model(tmp_path / "third", "gpt2")
    report = verify(composed, [sources.tower, third])
    assert report.first_failure == ("language_model", "weights") and "'llama'" in report.verdict()


def test_bad_input_is_refused_with_what_to_do(composed, sources, tmp_path):
    with pytest.raises(ValueError, match="each be the language model's source.*text=PATH"):
        second = shutil.copytree(sources.language_model, tmp_path / "second")
        verify(composed, [sources.language_model, second])
    with pytest.raises(ValueError, match="not a composed one"):
        verify(sources.language_model, sources.both)
    with pytest.raises(ValueError, match="is not a composed model"):
        verify((AutoModel.from_pretrained(sources.tower), None), sources.both)
    with pytest.raises(ValueError, match="has no weights"):
        verify(composed, text_config("llama"))
    with pytest.raises(ValueError, match="nothing a source can be"):
        verify(composed, f"sound={sources.tower}")
    with pytest.raises(ValueError, match="two pictures at least"):
        verify(composed, sources.both, images=[picture(0, (90, 60))])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no model, tokenizer or image processor"):
        verify(composed, tmp_path / "empty")


def test_pictures_of_a_folder(composed, sources, tmp_path):
    (tmp_path / "below").mkdir()
    for seed in (0, 1):
        picture(seed, (90, 60)).save(tmp_path / "below" / f"{seed}.png")
    report = verify(composed, sources.both, images=tmp_path)
    assert report.passed and report.check("projector", "finite").figures == {"tokens": 32}
    flat = [picture(0, (90, 60)), picture(0, (90, 60))]
    assert verify(composed, sources.both, images=flat).first_failure == ("projector", "pictures")


def test_half_precision_passes_and_is_told_apart_from_a_fault(sources, tmp_path):
    """Bounds follow the dtype: what bfloat16 rounds away is no failure, a wrong weight is."""
    folder = save_composed(tmp_path / "half", sources.tower, sources.language_model, dtype="bfloat16")
    report = verify(folder, sources.both)
    assert report.passed, report
    model = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        model.vision_tower.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    subject = (model, anyvlm.AnyVlmProcessor.from_pretrained(folder))
    assert verify(subject, sources.both).first_failure == ("vision_tower", "weights")
    assert verify(folder, sources.both, dtype="float32").first_failure == ("language_model", "weights")
