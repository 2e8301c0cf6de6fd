"""The benchmark of stages, run with tiny parts; what its table says."""

import json

import numpy as np
import staged
import staged_training
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import ViTImageProcessorPil

from anyvlm.modeling.language_models import build_language_model
from anyvlm.modeling.vision_towers import build_vision_tower


def tiny_models(folder):
    for name, model_type, size in (("resnet-50", "resnet", 64), ("dinov2-small", "dinov2", 32)):
        config = vision_config(model_type)
        config.num_hidden_layers = 12
        build_vision_tower(config).save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder / name)
    build_language_model(text_config("llama")).save_pretrained(folder / "stories-15m")
    tiny_tokenizer().save_pretrained(folder / "stories-15m")


def test_quick_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    tiny_models(tmp_path)
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (400, 28, 28), dtype=np.uint8), rng.integers(0, 10, 400, dtype=np.uint8)
    monkeypatch.setattr(staged_training, "fashion_mnist", lambda data, output: [pixels, labels, pixels, labels])
    monkeypatch.setattr(staged_training, "UNLABELLED", 6)
    one = staged.Rates(1e-3, 1e-3)
    monkeypatch.setattr(staged, "RATES", {"stages": (one,), "tower": (one,)})
    monkeypatch.setattr(staged, "SWAPPED", one)
    output = tmp_path / "run"
    staged.main(tmp_path, output, seeds=[0], quick=True)
    record = json.loads((output / "staged.json").read_text())
    kept = {path.name: path.read_text() for path in output.glob("*-0-*.json")}
    assert len(kept) == 4 and record["seeds"] == [0]
    monkeypatch.setattr(staged, "train", None)  # nothing is trained again
    staged.main(tmp_path, output, seeds=[0], quick=True)
    assert json.loads((output / "staged.json").read_text())["results"] == record["results"]
    assert "ahead" in capsys.readouterr().out


def test_both_sides_have_as_many_steps():
    for arms in staged.ARMS.values():
        totals = {sum(stage.steps for stage in staged.stages_of(arm, staged.Rates(1, 1), 160)) for arm in arms}
        assert totals == {160}


def test_table():
    arms = {arm: {"tried": [], "rates": {"projector": 1e-3, "other": 1e-4}} for arm in ("single", "two")}
    arms["single"]["exact"], arms["two"]["exact"] = [0.1, 0.2], [0.5, 0.4]
    text = staged.markdown({"stages": arms}, [0, 1], {"test": 500, "steps": 160, "tower_steps": 480, "batch_size": 8})
    assert "| ahead, points |  | +40.0 | +20.0 | +30.0 |" in text
    assert "| two stages: projector, then both | 0.001, 0.0001 | 50.0 | 40.0 | 45.0 |" in text
