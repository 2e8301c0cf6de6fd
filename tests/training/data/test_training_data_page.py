"""The Python of docs/training_data.md, run in a plain script's order, and its tables of settings against the code."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.training.data import Augmentation, Source, load_training_data, opening_errors
from anyvlm.training.data.source_settings import FORMATS


PAGE = (Path(__file__).parents[3] / "docs" / "training_data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    model.save_pretrained("my-vlm")
    processor.save_pretrained("my-vlm")
    picture(50).save("unknown.jpg")
    Path("data").mkdir()
    lines = []
    for index in range(8):
        picture(index).save(f"data/{index}.png")
        turns = f'[{{"role": "user", "content": "<image> w5"}}, {{"role": "assistant", "content": "w{index}"}}]'
        lines.append(f'{{"messages": {turns}, "images": ["{index}.png"]}}')
    Path("data/train.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    code = blocks("python")
    names = {"examples": load_training_data("data/train.jsonl").select(range(2))}
    for block in (code[0], code[2], code[1]):
        block = block.replace("max_steps=4,", "max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True,")
        exec(compile(block, "docs/training_data.md", "exec"), names)
    assert names["trainer"].state.global_step == 4
    assert len(names["inputs"]["pixel_values"]) == 3 and names["answer"].shape[1] > 0


def test_yaml_is_right():
    for block in blocks("yaml"):
        data = yaml.safe_load(block)["data"]
        assert not opening_errors(data)
        sources = data["train"]["mix"].values() if "mix" in data["train"] else [data["train"]]
        for source in sources:
            Source(**source) if isinstance(source, dict) else Source(path=source)


@pytest.mark.parametrize(
    "names", [[field.name for field in fields(part)] for part in (Source, Augmentation)] + [FORMATS]
)
def test_every_setting_is_named(names):
    assert [name for name in names if f"`{name}`" not in PAGE] == []
