"""Adapters stay in their part, keep what is new, and load with PEFT alone. The oracles are PEFT and the model before."""

import json
from pathlib import Path

import peft
import pytest
import torch
from model_tester import picture
from test_trainer import new_model, trainer
from torch import nn
from transformers import AutoModelForCausalLM

from anyvlm.publishing.fresh_process import run_in_fresh_process
from anyvlm.training.parts.adapters import add_adapters


FRESH = Path(__file__).with_name("fresh_adapter.py")


def train(adapted, processor, directory, steps=3, **options):
    run = trainer(directory, adapted, processor, max_steps=steps, learning_rate=1e-2, **options)
    run.train()
    return run.model.eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def sample_inputs(processor):
    return processor(
        text=["w1 <image> w2", "w3 w4 <image>"], images=[picture(0), picture(1)], padding=True, return_tensors="pt"
    )


@pytest.fixture
def saved(tmp_path):
    """A composed model that was saved and loaded, as adapters need."""

    def make(**kwargs):
        model, processor = new_model(**kwargs)
        model.save_pretrained(tmp_path / "base")
        processor.save_pretrained(tmp_path / "base")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True), processor

    return make


def test_all_linear_is_every_linear_layer_of_the_part_and_no_other():
    model, _ = new_model()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = add_adapters(model, {"language_model": {"r": 4}})
    found = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert found == {name for name in linear if name.startswith("language_model.model.")}


def test_settings_per_part():
    model, _ = new_model()
    adapted = add_adapters(
        model,
        {
            "language_model": {"type": "dora", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]},
            "vision_tower": {"type": "dora", "r": 2, "lora_alpha": 16},
        },
    )
    layers = {
        name: module for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {
        (module.r["default"], module.scaling["default"]) for name, module in layers.items() if "vision" in name
    } == {(2, 8.0)}
    text = {name: module for name, module in layers.items() if "language_model" in name}
    assert {(module.r["default"], module.scaling["default"]) for module in text.values()} == {(4, 1.0)}
    assert all(name.endswith("q_proj") for name in text)
    assert all(module.use_dora["default"] for module in layers.values())


@pytest.mark.parametrize(
    "fusion, trained",
    [
        ("embed", {"multi_modal_projector"}),
        ("cross_attention", {"multi_modal_projector", "fusion"}),
        ("gated", {"multi_modal_projector", "fusion"}),
    ],
)
def test_what_is_new_is_trained_and_comes_back(saved, tmp_path, fusion, trained):
    model, processor = saved(fusion=fusion)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = train(add_adapters(model, {"language_model": {"r": 4}}), processor, tmp_path / "run")
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = sample_inputs(processor)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded, inputs), logits(adapted, inputs))
    merged = loaded.merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {"language_model", *trained}


def test_rows_of_new_tokens_come_back(saved, tmp_path):
    model, processor = saved()
    rows = processor.tokenizer.convert_tokens_to_ids(["w1", "w2"])
    embeddings = model.get_input_embeddings().weight.detach().clone()
    adapted = train(add_adapters(model, {"language_model": {"r": 2}}, token_indices=rows), processor, tmp_path / "run")
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    inputs = sample_inputs(processor)
    assert torch.equal(logits(loaded, inputs), logits(adapted, inputs))
    expected = logits(adapted, inputs)
    merged = loaded.merge_and_unload()
    assert (logits(merged, inputs) - expected).abs().max() <= 1e-5
    changed = (merged.get_input_embeddings().weight != embeddings).any(1).nonzero().flatten().tolist()
    assert changed == sorted(rows)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_trained_loaded_and_merged_give_equal_logits(saved, tmp_path, kind):
    """Loaded in a process without the package, in each way there is."""
    model, processor = saved()
    parts = {"language_model": {"type": kind, "r": 4}, "vision_tower": {"type": kind, "r": 2}}
    adapted = add_adapters(model, parts)
    train(adapted, processor, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    adapted.save_pretrained(checkpoint)
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    inputs = sample_inputs(processor)
    torch.save({"inputs": dict(inputs), "logits": logits(adapted, inputs)}, tmp_path / "inputs.pt")
    done = run_in_fresh_process(FRESH, tmp_path / "base", checkpoint, tmp_path / "inputs.pt")
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences.keys() == {"PeftModel", "AutoPeftModelForCausalLM", "load_adapter", "merged"}
    if kind == "dora":  # transformers' own way loses DoRA's magnitudes, and reports them as missing
        assert differences.pop("load_adapter") > 1e-3
    # Merging adds in another order, which rounds.
    assert differences.pop("merged") <= 1e-5
    assert max(differences.values()) == 0


@pytest.mark.parametrize(
    "parts, options, message",
    [
        ({"vision": {}}, {}, "has no part 'vision'. Its parts: .*vision_tower"),
        (
            {"language_model": {"target_modules": ["q_proj", "query"]}},
            {},
            "called 'query'. Its linear layers: .*q_proj",
        ),
        ({"language_model": {"target_modules": "fc1"}}, {}, "called 'fc1'"),
        ({"language_model": {"type": "prefix"}}, {}, "no adapter of type 'prefix'"),
        ({"language_model": {"rank": 4}}, {}, "Not a setting of an adapter: rank"),
        ({"language_model": {"type": "lora"}, "vision_tower": {"type": "dora"}}, {}, "one type for a whole adapter"),
        ({"language_model": {"lora_dropout": 0.1}, "vision_tower": {}}, {}, "one lora_dropout for a whole adapter"),
        ({"language_model": {}, "language_model.model.layers.0": {}}, {}, "overlap"),
        ({"language_model": {}}, {"also_train": ("projector",)}, "Its modules: .*multi_modal_projector"),
        ({"vision_tower": {}}, {"also_train": ("vision_tower",)}, "trained whole, and has adapters too"),
        ({}, {}, "No part is named"),
    ],
)
def test_refused(parts, options, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(new_model()[0], parts, **options)


def test_newline_is_refused():
    model, _ = new_model()
    model.image_newline = nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match="image_newline is a parameter and no module"):
        add_adapters(model, {"language_model": {}}, also_train=("multi_modal_projector", "image_newline"))


def test_rows_of_a_tied_head_are_refused():
    with pytest.raises(ValueError, match="head is tied"):
        add_adapters(new_model(text="gpt2")[0], {"language_model": {}}, token_indices=[3])
