"""Bottleneck adapters change nothing at first, are all that is trained, and come back with the model's own code."""

import json

import pytest
import torch
from test_adapters import logits, sample_inputs, train
from test_trainer import new_model
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoModelForCausalLM

import anyvlm
from anyvlm.publishing.fresh_process import run_in_fresh_process
from anyvlm.training.parts.adapters import add_adapters


BOTH = {"language_model": {"type": "bottleneck", "r": 8}, "vision_tower": {"type": "bottleneck", "r": 4}}

FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
saved = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    print(json.dumps(float((model(**saved["inputs"]).logits - saved["logits"]).abs().max())))
"""


@pytest.mark.parametrize(
    "text, tower", [("llama", "clip_vision_model"), ("gpt2", "dinov2"), ("mamba", "siglip_vision_model")]
)
def test_as_made_they_change_nothing(text, tower):
    model, processor = anyvlm.compose(vision=vision_config(tower), text=text_config(text), tokenizer=tiny_tokenizer())
    inputs = processor(text=["w1 <image> w2"], images=[torch.zeros(3, 32, 32)], return_tensors="pt")
    before = logits(model.eval(), inputs)
    assert torch.equal(logits(add_adapters(model, BOTH).eval(), inputs), before)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_all_that_is_trained_comes_back(tmp_path, options):
    model, processor = new_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = train(add_adapters(model, BOTH), processor, tmp_path / "run", save_steps=3, **options)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("multi_modal_projector.")}
    adapters = {name: tensor for name, tensor in after.items() if name not in before}
    assert all("bottleneck_adapter" in name for name in adapters) and len(adapters) == 4 * 4
    assert all(tensor.abs().max() > 0 for name, tensor in adapters.items() if name.endswith("up.weight"))
    inputs = sample_inputs(processor)
    expected = logits(model, inputs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3", trust_remote_code=True).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    if not options:
        torch.save({"inputs": dict(inputs), "logits": expected}, tmp_path / "inputs.pt")
        (tmp_path / "fresh.py").write_text(FRESH)
        done = run_in_fresh_process(tmp_path / "fresh.py", tmp_path / "run" / "checkpoint-3", tmp_path / "inputs.pt")
        assert json.loads(done.stdout.splitlines()[-1]) <= 1e-6


@pytest.mark.parametrize(
    "parts, options, message",
    [
        ({"language_model": {"type": "bottleneck", "rank": 4}}, {}, "has no rank. Its settings: r, activation"),
        ({"language_model": {"type": "bottleneck", "activation": "sin"}}, {}, "no activation 'sin'"),
        ({"language_model": {"type": "bottleneck"}, "vision_tower": {"type": "lora"}}, {}, "one type for all parts"),
        ({"vision": {"type": "bottleneck"}}, {}, "has no part 'vision'"),
        ({"language_model": {"type": "bottleneck"}}, {"also_train": ("projector",)}, "which the model has not"),
        ({"multi_modal_projector": {"type": "bottleneck"}}, {}, "no layers of one width"),
    ],
)
def test_refused(parts, options, message):
    with pytest.raises(ValueError, match=message):
        add_adapters(new_model()[0], parts, **options)


def test_tower_of_maps_is_refused():
    model, _ = anyvlm.compose(
        vision=vision_config("resnet"), text=text_config("llama"), tokenizer=tiny_tokenizer(), image_size=64
    )
    with pytest.raises(ValueError, match="Use LoRA there"):
        add_adapters(model, {"vision_tower": {"type": "bottleneck"}})
