"""The parts of `examples/swap_tower.py` that need no trained models."""

import gzip
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import compose


SCRIPT = Path(__file__).parents[2] / "examples" / "swap_tower.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script
    spec = importlib.util.spec_from_file_location("swap_tower", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "swap_tower", module)
    spec.loader.exec_module(module)
    return module


def test_exact_answers_are_those_of_generate(example, monkeypatch):
    """Greedy answers of a random model are made the right ones for some pictures, and are wrong for the others."""
    monkeypatch.setattr(example, "QUESTION", "w5 ?")
    model, processor = compose("clip_vision_model", image_size=32)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(one) for one in rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)]
    inputs = processor(
        text=["User: <image>w5 ?\nAssistant:"] * 6, images=[[one] for one in pictures], return_tensors="pt"
    )
    # Only the end is left to say after two words, as after an answer.
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    monkeypatch.setattr(example, "NAMES", tuple(f"w{index}" for index in range(6)))
    questions = example.Questions(model, processor)
    rows, prompt = questions.rows, inputs["input_ids"].shape[1]
    rows["input_ids"] = torch.cat([inputs["input_ids"], generated], 1)
    rows["labels"] = torch.full_like(rows["input_ids"], -100)
    rows["labels"][:, prompt:] = generated
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    wrong = [1, 4]
    rows["labels"][wrong, -1] += 1
    features = torch.stack(questions.path.features(questions.path.inputs(pictures))[0])
    assert questions.exact(features, np.arange(6)) == pytest.approx(4 / 6)


def test_data_is_read_packed_or_not(example, tmp_path):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint32).reshape(2, 28, 28).astype(np.uint8)
    labels = np.array([3, 9], np.uint8)
    for name, values, dimensions in zip(example.FILES, (pixels, labels, pixels, labels), (3, 1, 3, 1)):
        sizes = values.shape[:dimensions]
        head = bytes([0, 0, 8, dimensions]) + b"".join(size.to_bytes(4, "big") for size in sizes)
        packed = name.startswith("train")
        content = head + values.tobytes()
        (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    read = example.fashion_mnist(tmp_path, tmp_path)
    assert all(np.array_equal(one, other) for one, other in zip(read, (pixels, labels, pixels, labels)))
    with pytest.raises(SystemExit, match="pass --data"):
        example.fashion_mnist(tmp_path / "elsewhere", tmp_path)


def test_table_is_written_between_its_marks(example, tmp_path):
    shares = {"teacher": 0.8, "shuffled": 0.1, "random": 0.1, "closed": 0.72, "distilled": 0.76}
    result = {
        **shares,
        "alignment": {"explained_variance": 0.5},
        "distillation": {"agreement": {"after": 0.9}, "steps": 100},
    }
    other = {**result, "closed": 0.68}
    run = Namespace(pictures=100, seconds=60.0, train=6000, test=1000)
    text = example.table({"there": [result, other], "back": []}, run)
    assert "| ResNet-50, closed form, 100 pictures, no gradient step | 70.0 ± 2.8 % | 87.5 % | 85.0 % |" in text
    assert "**ResNet-50" not in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{example.BEGIN}\nold\n{example.END}\nafter\n")
    for _ in range(2):
        example.write_between_marks(page, text)
        assert page.read_text() == f"before\n{example.BEGIN}\n{text}\n{example.END}\nafter\n"
    page.write_text("no place")
    with pytest.raises(SystemExit, match="no place for the table"):
        example.write_between_marks(page, text)


def test_says_which_model_is_missing(example, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["swap_tower.py", "--models", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="There is no dinov2-small in"):
        example.main()
