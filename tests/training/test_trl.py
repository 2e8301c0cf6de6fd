"""TRL's `SFTTrainer`, unchanged, on a composed model and a vision dataset."""

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, Image, List
from model_tester import picture
from test_trainer import new_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from anyvlm.training.parts.merging import merge_adapters


NUM_SAMPLES = 8


def dataset(kind="messages") -> Dataset:
    rows = []
    for index in range(NUM_SAMPLES):
        question = {"role": "user", "content": "w5 w6 ?"}
        answer = {"role": "assistant", "content": "w1" if index % 2 else "w2 w1"}
        texts = (
            {"messages": [question, answer]} if kind == "messages" else {"prompt": [question], "completion": [answer]}
        )
        rows.append({**texts, "images": [picture(index)]})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def sft(directory, model, processor, kind="messages", peft_config=None, **options) -> SFTTrainer:
    defaults = {
        "max_steps": 3,
        "save_steps": 3,
        "per_device_train_batch_size": NUM_SAMPLES,
        "learning_rate": 1e-2,
        "max_length": None,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return SFTTrainer(
        model=model,
        processing_class=processor,
        train_dataset=dataset(kind),
        args=SFTConfig(output_dir=str(directory), **{**defaults, **options}),
        peft_config=peft_config,
    )


def losses(run: SFTTrainer) -> np.ndarray:
    return np.array([entry["loss"] for entry in run.state.log_history if "loss" in entry])


@pytest.mark.parametrize(
    "text, composing, kind, options",
    [
        ("llama", {}, "prompt and completion", {}),
        ("llama", {}, "messages", {"gradient_checkpointing": True}),
        ("llama", {"fusion": "cross_attention"}, "prompt and completion", {}),
        ("granite", {"fusion": "gated"}, "prompt and completion", {}),
        ("mixtral", {}, "prompt and completion", {}),
    ],
)
def test_loss_is_the_model_s_own(tmp_path, text, composing, kind, options):
    """TRL runs the model below its head and applies the head itself; the loss has to be what the model says."""
    model, processor = new_model(text=text, **composing)
    run = sft(tmp_path, model, processor, kind, **options)
    batch = run.data_collator([dict(sample) for sample in dataset(kind)])
    with torch.no_grad():
        expected = model.train()(**batch).loss
    run.train()
    assert losses(run)[0] == pytest.approx(float(expected), abs=2e-5)
    assert losses(run)[-1] < losses(run)[0]


def test_lora_of_trl_comes_back_and_merges(tmp_path):
    model, processor = new_model()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    config = peft.LoraConfig(
        r=4,
        target_modules=r"language_model\..*_proj",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )
    run = sft(tmp_path / "run", model, processor, "prompt and completion", config)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    adapter = tmp_path / "run" / "checkpoint-3"
    inputs = processor(text=["w1 <image> w2"], images=[picture(3)], return_tensors="pt")
    with torch.no_grad():
        expected = run.model.eval()(**inputs).logits
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    merge_adapters(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (merged(**inputs).logits - expected).abs().max() <= 1e-5


def test_evaluation_and_resuming(tmp_path):
    options = {"kind": "prompt and completion", "lr_scheduler_type": "constant"}
    whole = sft(tmp_path / "whole", *new_model(), max_steps=6, **options)
    whole.train()
    sft(tmp_path / "parts", *new_model(), max_steps=3, **options).train()
    second = sft(tmp_path / "parts", *new_model(seed=1), max_steps=6, **options)
    second.train(resume_from_checkpoint=True)
    assert np.isfinite(second.evaluate(dataset("prompt and completion"))["eval_loss"])
    assert len(losses(whole)) == 6
    assert np.abs(losses(second) - losses(whole)).max() <= 1e-6


def test_prompts_that_see_ahead_are_refused(tmp_path):
    run = sft(tmp_path, *new_model(image_attention="prefix"))
    with pytest.raises(ValueError, match="answer begins where the labels do"):
        run.train()
