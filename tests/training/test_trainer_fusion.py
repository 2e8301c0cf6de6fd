"""Fusions in an ordinary `Trainer`, with adapters and with checkpointing."""

import numpy as np
import pytest
import torch
from model_tester import picture
from test_trainer import losses, new_model, trainer
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_resumed_equals_uninterrupted(tmp_path, fusion):
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    whole = trainer(tmp_path / "whole", *new_model(fusion=fusion), max_steps=20, save_steps=10, **options)
    whole.train()
    trainer(tmp_path / "parts", *new_model(fusion=fusion), max_steps=10, save_steps=10, **options).train()
    second = trainer(tmp_path / "parts", *new_model(fusion=fusion, seed=1), max_steps=20, save_steps=10, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-10"))
    assert np.abs(losses(second) - losses(whole)).max() <= 1e-6
    assert losses(whole)[-3:].mean() < losses(whole)[:3].mean() - 0.5


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_adapters(tmp_path, fusion):
    """LoRA in the language model, the fusion and the projector trained whole: saved, loaded and merged they agree."""
    peft = pytest.importorskip("peft")
    model, processor = new_model(fusion=fusion)
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["fusion", "multi_modal_projector"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, settings)
    run = trainer(tmp_path / "run", adapted, processor, max_steps=8, gradient_checkpointing=True)
    run.train()
    adapted.eval()
    gates = {name: p for name, p in adapted.named_parameters() if "fusion.modules_to_save" in name and "gate" in name}
    assert gates and all(p.abs().max() > 0 for p in gates.values())
    inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
    with torch.no_grad():
        expected = adapted(**inputs).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
