"""check(): the same answers as compose and the composed model give, without weights."""

import copy
import json
import time

import pytest
import torch
from model_tester import picture
from tiny_parts import LANGUAGE_MODELS, TOWERS, VOCABULARY, text_config, tiny_tokenizer, vision_config
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.composition import compatibility_table
from anyvlm.composition.model_sizes import num_parameters
from anyvlm.composition.parts import load_language_model
from anyvlm.composition.probe import probe_vision_tower
from anyvlm.composition.small_copies import shallow_copy, thin_copy, tiny_copy
from anyvlm.modeling.fusion import build_fusion
from anyvlm.modeling.vision_towers import build_vision_tower


@pytest.fixture
def table(monkeypatch):
    """A function that puts rows into the computed table, which is empty otherwise."""
    rows = {"vision": {}, "text": {}}
    monkeypatch.setattr(compatibility_table, "compatibility_table", lambda: rows)

    def add(kind, model_type, status, reason=None, marks=()):
        rows[kind][model_type] = {"status": status, "reason": reason, "marks": list(marks)}

    return add


def assert_describes(report, model, processor):
    """Every number of the report is the composed model's own."""
    assert report.works is True and report.reasons == []
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        part = getattr(model, name)
        assert report.part(name).model_class == type(part).__name__
        assert report.part(name).parameters == sum(parameter.numel() for parameter in part.parameters()), name
    assert report.parameters == model.num_parameters()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert report.embedding_parameters == sum(parameter.numel() for parameter in embeddings.parameters())
    tied = head.weight is embeddings.weight
    assert report.head_parameters == sum(p.numel() for p in head.parameters()) - (head.weight.numel() if tied else 0)
    inputs = processor(text=["<image>"], images=[picture(seed=1)], return_tensors="pt")
    assert report.tokens_per_picture == int((inputs["input_ids"] == model.config.image_token_id).sum())
    rows, columns = report.grid
    assert rows * columns == report.tokens_per_picture
    assert report.dtype == str(model.dtype).removeprefix("torch.")


@pytest.mark.parametrize("vision", list(TOWERS))
def test_numbers_are_those_of_the_composed_model_for_every_tower(vision, table):
    size = TOWERS[vision][0]
    report = anyvlm.check(vision_config(vision), text_config("llama"), tokenizer=tiny_tokenizer(), image_size=size)
    model, processor = anyvlm.compose(
        vision_config(vision), text_config("llama"), tokenizer=tiny_tokenizer(), image_size=size
    )
    assert_describes(report, model, processor)
    assert report.grid == TOWERS[vision][2]


@pytest.mark.parametrize("text", list(LANGUAGE_MODELS))
def test_numbers_are_those_of_the_composed_model_for_every_language_model(text, table):
    config = text_config(text)
    config.max_position_embeddings = 1024  # for a thousand tokens in the cache
    report = anyvlm.check(vision_config("dinov2"), config, tokenizer=tiny_tokenizer())
    model, processor = anyvlm.compose(vision_config("dinov2"), config, tokenizer=tiny_tokenizer())
    assert_describes(report, model, processor)
    rows = [part.get_input_embeddings().weight.shape[0] for part in (model, load_language_model(config))]
    assert report.new_embedding_rows == rows[0] - rows[1]

    ids = torch.zeros(1, 1000, dtype=torch.long)
    with torch.no_grad():
        outputs = model.language_model(input_ids=ids, use_cache=True, return_dict=True)
    caches = [outputs[key] for key in ("past_key_values", "cache_params") if outputs.get(key) is not None]
    if not caches or text == "moshi":  # openai-gpt has none, rwkv a state of its own kind; moshi does not run on meta
        assert report.cache is None
        return
    tensors = []
    for layer in caches[0].layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            tensors += [tensor for tensor in values if isinstance(tensor, torch.Tensor)]
    assert report.cache.first_1000_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_bytes_are_those_of_the_composed_model():
    for dtype in ("float32", "bfloat16", "float16"):
        model, _ = anyvlm.compose(
            vision_config("siglip_vision_model"), text_config("qwen3"), tokenizer=tiny_tokenizer(), dtype=dtype
        )
        report = anyvlm.check(
            vision_config("siglip_vision_model"), text_config("qwen3"), tokenizer=tiny_tokenizer(), dtype=dtype
        )
        expected = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        assert sum(part.bytes_per_dtype[dtype] for part in report.parts) == expected
        assert report.training_bytes["everything"] == 4 * expected


@pytest.mark.parametrize("make", [shallow_copy, thin_copy])
@pytest.mark.parametrize("vision", list(TOWERS))
def test_a_copy_with_fewer_layers_is_read_as_the_whole_tower(vision, make):
    config = vision_config(vision)
    if "num_hidden_layers" in vars(config):
        config.num_hidden_layers = 5
    small = make(config)
    if small is None:
        return  # nothing to make smaller: the whole tower is run
    size = (TOWERS[vision][0],) * 2
    whole, copied = (probe_vision_tower(build_vision_tower(each).eval(), size) for each in (config, small))
    assert copied == whole


def test_a_tiny_copy_keeps_what_is_no_size():
    config = CONFIG_MAPPING["qwen3_next"]()
    small = tiny_copy(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers == len(small.layer_types) < config.num_hidden_layers
    assert small.hidden_act == config.hidden_act and small.tie_word_embeddings == config.tie_word_embeddings


SETTINGS = {
    "queries": {"projector": {"type": "resampler", "num_queries": 6, "head_dim": 8}},
    "anyres tiles, joined by newlines": {"views": "tiles"},
    "dynamic tiles": {
        "projector": {"type": "pixel_shuffle", "scale_factor": 2},
        "views": {"type": "tiles", "layout": "dynamic", "max_tiles": 4},
    },
    "slices": {"views": {"type": "slices", "max_slices": 3}, "image_attention": "bidirectional"},
    "cross-attention": {"fusion": {"type": "cross_attention", "every": 1}, "image_attention": "causal"},
    "gated": {"fusion": "gated", "views": {"type": "tiles", "layout": "dynamic", "max_tiles": 2}},
    "features as they are": {"fusion": "cross_attention", "projector": "identity"},
    "a prefix": {"image_attention": "prefix"},
    "pictures of their own size": {"vision": "siglip2_vision_model", "views": {"type": "native", "max_tokens": 64}},
    "an instruction": {
        "projector": {
            "type": "qformer",
            "num_queries": 3,
            "reads_text": True,
            "qformer_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
            },
        }
    },
}


@pytest.mark.parametrize("case", list(SETTINGS))
def test_settings_give_the_tokens_and_the_parameters_of_the_composed_model(case, table):
    settings = dict(SETTINGS[case])
    parts = tiny_configs.vision_config(settings.pop("vision", "clip_vision_model")), text_config("llama")
    parts[1].num_hidden_layers, parts[1].max_position_embeddings = 5, 4096
    report = anyvlm.check(*parts, tokenizer=tiny_tokenizer(), **settings)
    model, processor = anyvlm.compose(*parts, tokenizer=tiny_tokenizer(), **settings)
    assert report.works is True and report.reasons == []
    assert report.parameters == model.num_parameters()
    for part in report.parts:
        own = getattr(model, part.name)
        assert part.parameters == (own.numel() if part.name == "image_newline" else num_parameters(own)), part.name
    assert report.image_views == model.config.image_views
    sizes = [tuple(map(int, size.split("x"))) for size in report.tokens_of_sizes]
    assert list(report.tokens_of_sizes.values()) == processor._get_num_multimodal_tokens(sizes).num_image_tokens
    example = processor._get_num_multimodal_tokens([report.image_size]).num_image_tokens[0]
    assert report.tokens_per_picture == example
    said = f"{example} tokens" if report.fusion == "embed" else "beside the text, 1 in it"
    assert said in next(value for name, value in report.lines() if name == "picture")
    names = [name for name, _ in model.named_children()] + (["image_newline"] if "newline" in case else [])
    assert sorted(part.name for part in report.parts) == sorted(names)
    json.dumps(report.to_dict())


def test_a_picture_beside_the_text_says_so(table):
    report = anyvlm.check(vision_config("clip_vision_model"), text_config("llama"), fusion="cross_attention")
    assert "32x32 pixels: 16 tokens (4x4) beside the text, 1 in it" in str(report)
    assert report.native_classes["LlavaForConditionalGeneration"].startswith("no")


def test_a_copy_shows_the_fusion_of_the_whole_model(table):
    """Layers and widths are the whole model's, not those of the copy that was run."""
    report = anyvlm.check("clip_vision_model", "qwen3", fusion="cross_attention")
    config = CONFIG_MAPPING["qwen3"]()
    with torch.device("meta"):
        arguments = {"hidden_size": config.hidden_size, "image_features": config.hidden_size}
        arguments |= {"num_heads": config.num_attention_heads, "num_decoder_layers": config.num_hidden_layers}
        expected = build_fusion("cross_attention", {**arguments, "decoder_layers": "model.layers"})
    assert report.works is True
    assert report.part("fusion").parameters == num_parameters(expected) > 1e8


@pytest.mark.parametrize(
    "settings", [{"fusion": "magic"}, {"image_attention": "magic"}, {"views": "magic"}, {"vision_fusion": "magic"}]
)
def test_an_unknown_setting_is_an_error_that_names_it(settings):
    with pytest.raises(ValueError, match="Unknown .* 'magic'. Choose one of"):
        anyvlm.check("dinov2", "llama", **settings)


REFUSALS = {
    "native views of a tower of one size": lambda: ("hiera", "llama", {"views": "native"}),
    "a grid that cannot be shuffled": lambda: (
        "dinov2",
        "llama",
        {"projector": {"type": "pixel_shuffle", "scale_factor": 3}},
    ),
    "text that the tokenizer does not know": lambda: ("dinov2", "llama", {"image_text": {"start": "<img>"}}),
    "a vocabulary that is too small": lambda: ("dinov2", "llama", {"projector": _small_vocabulary()}),
    "text within a map": lambda: ("dinov2", "llama", {"views": "tiles", "image_text": {"tile": "w1{tokens}"}}),
    "no room for text": lambda: ("dinov2", "llama", {"image_size": 128}),
    "no list of decoder layers": lambda: (
        "dinov2",
        "marian",
        {"fusion": {"type": "cross_attention", "colour": "red"}},
    ),
    "masks that cannot be given": lambda: ("dinov2", "mamba", {"image_attention": "prefix"}),
    "features of no width": lambda: ("resnet", "gpt2", {"projector": "identity", "image_size": 64}),
    "an encoder": lambda: ("dinov2", tiny_configs.text_config("xlnet"), {}),
    "another rule of generation": lambda: ("dinov2", tiny_configs.text_config("xlm"), {}),
    "no embeddings": lambda: ("dinov2", tiny_configs.text_config("cpmant"), {}),
    "two language models": lambda: (text_config("llama"), "llama", {}),
    "two towers": lambda: ("dinov2", vision_config("dinov2"), {}),
    "a picture of another size": lambda: ("aimv2_vision_model", "llama", {"image_size": 40}),
    "no end of sequence": lambda: ("dinov2", _without_eos(), {"tokenizer": tiny_tokenizer(eos_token=None)}),
}


def _small_vocabulary() -> dict:
    return {"type": "qformer", "reads_text": True, "qformer_config": {"hidden_size": 24, "vocab_size": 8}}


def _tiny_bert() -> dict:
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }


def _without_eos():
    config = text_config("llama")
    config.eos_token_id = None
    return config


@pytest.mark.parametrize("case", list(REFUSALS))
def test_a_refusal_is_the_one_of_compose(case, table):
    vision, text, arguments = REFUSALS[case]()
    vision = vision_config(vision) if isinstance(vision, str) else vision
    text = text_config(text) if isinstance(text, str) else text
    arguments.setdefault("tokenizer", tiny_tokenizer())
    with pytest.raises(anyvlm.CompositionError) as error:
        anyvlm.compose(copy.deepcopy(vision), copy.deepcopy(text), **copy.deepcopy(arguments))
    report = anyvlm.check(vision, text, **arguments)
    assert report.works is False
    assert report.reasons[0] == str(error.value)
    assert "works: " in str(report) and str(error.value) in str(report)


class TestNearest:
    def test_a_picture_size_that_is_taken(self, table):
        report = anyvlm.check(vision_config("aimv2_vision_model"), text_config("llama"), image_size=40)
        assert report.nearest == ["image_size=32 (tried here)"]
        assert anyvlm.check(vision_config("aimv2_vision_model"), text_config("llama"), image_size=32).works is True

    def test_types_named_alike_that_work(self, table):
        table("text", "xlnet2", "works")
        table("text", "xlnet3", "refused", "no")
        assert anyvlm.check("dinov2", tiny_configs.text_config("xlnet")).nearest == ["text: xlnet2"]

    def test_well_known_types_without_a_table(self, table):
        report = anyvlm.check("dinov2", tiny_configs.text_config("xlnet"))
        assert report.nearest == ["text: llama, qwen3, gpt2"]


class TestEncoders:
    """Encoders with a causal form are composed in it; which have one is found out by running a small copy."""

    @pytest.mark.parametrize("text", ["bert", "roberta", "bart"])
    def test_numbers_are_those_of_the_causal_form(self, text, table):
        config = tiny_configs.text_config(text)
        report = anyvlm.check(vision_config("dinov2"), config, tokenizer=tiny_tokenizer())
        model, processor = anyvlm.compose(vision_config("dinov2"), config, tokenizer=tiny_tokenizer())
        assert_describes(report, model, processor)

    def test_the_decoder_of_a_pair_misses_its_encoder(self, table, tmp_path):
        tiny_configs.text_config("bart").save_pretrained(tmp_path)
        report = anyvlm.check(vision_config("dinov2"), tmp_path, tokenizer=tiny_tokenizer())
        assert report.works is True and any("read the output of an encoder" in note for note in report.notes)
        assert not any("trained as an encoder" in note for note in report.notes)

    def test_a_pretrained_one_is_told_to_learn(self, table, tmp_path):
        CONFIG_MAPPING["bert"](**_tiny_bert()).save_pretrained(tmp_path)
        report = anyvlm.check(vision_config("dinov2"), tmp_path, tokenizer=tiny_tokenizer())
        assert report.works is True and any("trained as an encoder" in note for note in report.notes)
        CONFIG_MAPPING["bert"](**_tiny_bert(), is_decoder=True).save_pretrained(tmp_path)
        report = anyvlm.check(vision_config("dinov2"), tmp_path, tokenizer=tiny_tokenizer())
        assert report.works is True and not any("trained as an encoder" in note for note in report.notes)


class TestTable:
    """Where a part cannot be run in a small copy, the computed table is asked."""

    @pytest.fixture
    def check(self, monkeypatch):
        monkeypatch.setattr("anyvlm.composition.small_copies.MAX_REAL_PARAMETERS", 0)
        monkeypatch.setattr("anyvlm.composition.small_copies._TINY", 0)
        return lambda: anyvlm.check(vision_config("dinov2"), text_config("llama"))

    def test_unknown_without_it(self, table, check):
        report = check()
        assert report.works is None
        assert "LlamaForCausalLM" in report.reasons[0] and "has no 'llama'" in report.reasons[0]
        assert report.tokens_per_picture is None and "not known" in str(report)

    def test_refused_by_it(self, table, check):
        table("text", "llama", "refused", "It spits.")
        table("vision", "dinov2", "works")
        report = check()
        assert report.works is False and report.reasons == ["It spits."]

    def test_works_by_it(self, table, check):
        table("text", "llama", "works", marks=["right padding only"])
        table("vision", "dinov2", "works")
        report = check()
        assert report.works is True
        assert report.part("language_model").known_from == "the table of types that were tried"
        assert "LlamaForCausalLM: right padding only." in report.notes

    def test_not_tried_is_unknown(self, table, check):
        table("text", "llama", "not tried", "no library")
        assert check().works is None

    def test_a_type_that_fails_is_refused_though_it_runs(self, table):
        table("text", "llama", "fails", "gradients: none")
        report = anyvlm.check(vision_config("dinov2"), text_config("llama"))
        assert report.works is False and report.reasons == ["gradients: none"]


class TestSources:
    @pytest.fixture
    def folders(self, tmp_path):
        vision_config("dinov2").save_pretrained(tmp_path / "tower")
        text_config("qwen3").save_pretrained(tmp_path / "lm")
        return tmp_path / "tower", tmp_path / "lm"

    def test_folders_with_a_config_only(self, folders):
        report = anyvlm.check(*folders)
        assert report.works is True
        assert any("tokenizer=" in note for note in report.notes)
        assert any("No image processor" in note for note in report.notes)

    def test_weights_are_not_read(self, folders):
        for folder in folders:
            (folder / "model.safetensors").write_bytes(b"no weights")
        tiny_tokenizer().save_pretrained(folders[1])
        report = anyvlm.check(*map(str, folders))
        assert report.works is True and report.new_embedding_rows == 1

    def test_dtype_is_what_the_folder_says(self, folders):
        config = text_config("qwen3")
        config.dtype = torch.bfloat16
        config.save_pretrained(folders[1])
        assert anyvlm.check(*folders).dtype == "bfloat16"

    def test_instances_are_run_and_left_as_they_are(self):
        tower = AutoModel.from_config(vision_config("dinov2"))
        language_model = AutoModelForCausalLM.from_config(text_config("llama")).train()
        before = [copy.deepcopy(part.state_dict()) for part in (tower, language_model)]
        configs = [part.config.to_dict() for part in (tower, language_model)]
        report = anyvlm.check(tower, language_model, tokenizer=tiny_tokenizer())
        assert report.works is True and report.part("language_model").known_from == "run whole, here"
        for part, state, config in zip((tower, language_model), before, configs):
            assert part.config.to_dict() == config
            assert all(torch.equal(part.state_dict()[name], tensor) for name, tensor in state.items())
        assert language_model.training and language_model.get_input_embeddings().weight.shape[0] == len(VOCABULARY)

    def test_configs_and_tokenizers_are_left_as_they_are(self):
        vision, text, tokenizer = vision_config("dinov2"), text_config("llama"), tiny_tokenizer()
        before = vision.to_dict(), text.to_dict(), len(tokenizer)
        anyvlm.check(vision, text, tokenizer=tokenizer)
        assert (vision.to_dict(), text.to_dict(), len(tokenizer)) == before

    def test_an_unknown_source_is_an_error_that_names_it(self):
        with pytest.raises(OSError, match=r"dino2 is no folder here and no model type.*dinov2"):
            anyvlm.check("dino2", "llama")
        with pytest.raises(OSError, match=r"^\./towers/mine is no folder here, and neither .* nor a Hub id\.$"):
            anyvlm.check("./towers/mine", "llama")

    def test_an_unknown_projector_is_an_error(self):
        with pytest.raises(ValueError, match="mlp"):
            anyvlm.check("dinov2", "llama", projector="magic")

    def test_a_folder_goes_before_a_type_of_the_same_name(self, folders, monkeypatch):
        monkeypatch.chdir(folders[0].parent)
        text_config("llama").save_pretrained("gpt2")
        assert anyvlm.check("tower", "gpt2").part("language_model").model_class == "LlamaForCausalLM"


@pytest.mark.parametrize("text", ["qwen3", "deepseek_v3", "mixtral", "llama4"])
def test_full_size_defaults_take_seconds(text):
    started = time.monotonic()
    report = anyvlm.check("dinov2", text)
    assert report.works is True
    assert report.parameters > 5e9 and report.cache.first_1000_bytes > 1e6
    # Far above the second or two that it takes: a whole language model would take minutes, if it fitted at all.
    assert time.monotonic() - started < 30


class TestNativeClass:
    def llava(self, vision, text):
        return anyvlm.check(vision, text).native_classes["LlavaForConditionalGeneration"]

    def test_a_pair_that_llava_holds(self):
        assert self.llava(vision_config("clip_vision_model"), text_config("llama")).startswith("yes")

    def test_a_tower_that_it_cannot_build(self):
        assert "cannot be built" in self.llava(vision_config("resnet"), text_config("llama"))

    def test_a_head_that_it_does_not_have(self):
        config = text_config("granite")
        assert config.logits_scaling != 1
        assert "other logits" in self.llava(vision_config("clip_vision_model"), config)


def test_the_report_goes_into_json_and_fits_the_eye():
    report = anyvlm.check(vision_config("dinov2"), text_config("llama"))
    content = json.loads(json.dumps(report.to_dict()))
    assert content["works"] is True and content["tokens_per_picture"] == 16
    assert content["context_share"] == pytest.approx(16 / 256)
    text = str(report)
    assert text.splitlines()[0].split() == ["works:", "yes"]
    assert "16 tokens (4x4)" in text and "known from: run whole, here" in text


def test_warnings_of_composing_become_notes(caplog):
    report = anyvlm.check(vision_config("dinov2"), text_config("llama"), image_size=96)
    assert report.works is True
    assert any("One picture takes 144 of the 256 positions" in note for note in report.notes)
    assert not caplog.records
