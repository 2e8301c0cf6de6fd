"""The example script as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoModelForCausalLM, AutoProcessor

import anyvlm


SCRIPT = Path(__file__).parents[1] / "examples" / "train_with_trainer.py"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_trains_on_own_pictures_and_resumes(tmp_path):
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    lines = []
    for index in range(8):
        picture(index).save(tmp_path / f"{index}.png")
        messages = [{"role": "user", "content": "<image> w5 ?"}, {"role": "assistant", "content": f"w{index % 2}"}]
        lines.append(json.dumps({"messages": messages, "images": [f"{index}.png"]}))
    lines.append(json.dumps({"messages": [{"role": "user", "content": "w6"}, messages[1]]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    arguments = [
        *("--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--eval_data", tmp_path / "data.jsonl"),
        *("--output_dir", tmp_path / "out", "--save_steps", 2, "--logging_steps", 1, "--freeze", "vision_tower"),
        *("--per_device_train_batch_size", 3, "--use_cpu", "--report_to", "none", "--gradient_checkpointing"),
    ]
    first = run(*arguments, "--max_steps", 2)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "eval_loss" in first.stdout
    second = run(*arguments, "--max_steps", 3, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    assert second.returncode == 0, second.stderr[-2000:]
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    before, after = model.state_dict(), trained.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector", "language_model"}


def test_says_what_is_missing(tmp_path):
    result = run("--output_dir", tmp_path)
    assert result.returncode == 1
    assert "--vision and --text" in result.stderr.splitlines()[-1]
