"""A merged checkpoint answers as the adapter did, also where the package is not; and what cannot be merged is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapters import logits, sample_inputs, train
from test_cli import run
from test_trainer import new_model
from transformers import AutoModelForCausalLM, AutoProcessor

from anyvlm.training.parts.adapters import add_adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Base, adapter (a checkpoint of `Trainer`), inputs, and the logits of the trained model."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model, processor = new_model()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = add_adapters(model, {"language_model": {"r": 4}, "vision_tower": {"r": 2}})
    adapted = train(adapted, processor, folder / "run", save_steps=3)
    inputs = sample_inputs(processor)
    return folder / "base", folder / "run" / "checkpoint-3", inputs, logits(adapted, inputs)


def test_merged_checkpoint_answers_as_the_adapter(trained, tmp_path, capsys):
    base, adapter, inputs, expected = trained
    code, out, err = run(capsys, "merge", adapter, tmp_path / "merged")
    assert code == 0, err
    assert "are equal" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert type(merged).__module__.startswith("transformers_modules") or "anyvlm" in type(merged).__module__
    assert not isinstance(merged, peft.PeftModel)
    assert (logits(merged, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    untrained = AutoModelForCausalLM.from_pretrained(base).eval()
    assert (logits(untrained, inputs) - expected).abs().max() > 1e-2
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"anyvlm_checkpoint.py", "processor_config.json", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names
    AutoProcessor.from_pretrained(tmp_path / "merged", trust_remote_code=True)


def test_another_base_and_dtype(trained, tmp_path, capsys):
    base, adapter, inputs, expected = trained
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (moved / name).write_bytes((adapter / name).read_bytes())
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/nowhere/base"}))
    code, _, err = run(capsys, "merge", moved, tmp_path / "merged")
    assert code == 1 and "no longer there" in err and "--base" in err
    code, _, err = run(capsys, "merge", moved, tmp_path / "merged", "--base", base, "--dtype", "bfloat16")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16


def test_refused_before_anything_is_written(trained, tmp_path, capsys):
    base, adapter, _, _ = trained
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("kept")
    code, _, err = run(capsys, "merge", adapter, full)
    assert code == 1 and "not empty" in err and (full / "file").read_text() == "kept"
    code, _, err = run(capsys, "merge", base, tmp_path / "merged")
    assert code == 1 and "no adapter_config.json" in err
    new_model(text="opt")[0].save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, "merge", adapter, tmp_path / "merged", "--base", tmp_path / "other")
    assert code == 1 and "does not fit" in err
    assert not (tmp_path / "merged").exists()


def test_adapter_with_nan_is_refused(trained, tmp_path, capsys):
    _, adapter, _, _ = trained
    broken = tmp_path / "broken"
    broken.mkdir()
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_A" in name)
    save_file({**weights, name: weights[name] * float("nan")}, broken / "adapter_model.safetensors")
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    code, _, err = run(capsys, "merge", broken, tmp_path / "merged")
    assert code == 1 and "cannot be merged" in err
    assert not (tmp_path / "merged").exists()
