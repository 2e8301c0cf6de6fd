"""A checkpoint with its code: complete, and the same wherever and however often it is loaded and saved."""

import ast
import filecmp
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_tester import picture
from safetensors.torch import load_file, save_file
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import anyvlm
from anyvlm.compatibility.model_under_test import set_gates
from anyvlm.configuration.checkpoint_code import (
    AUTO_MAP,
    ENTRY_MODULE,
    checkpoint_sources,
    flatten_relative_imports,
    write_checkpoint_code,
)
from anyvlm.publishing.fresh_process import run_in_fresh_process


FRESH_LOAD = Path(__file__).parent / "fresh_load.py"


def save_with_answers(model, processor, directory: Path) -> Path:
    """Save a checkpoint, and beside it what it gives for two texts with pictures."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    arguments = {
        "text": ["w1 <image> w2", "w3 <image> w4 <image>"],
        "images": [[picture(0)], [picture(1), picture(2)]],
    }
    arrays = {"text": arguments["text"], "images": [[_tensor(p) for p in images] for images in arguments["images"]]}
    inputs = processor(**arrays, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = directory.with_suffix(".answers")
    torch.save({"processor_arguments": arrays, "logits": logits, "generated": generated}, answers)
    return answers


def _tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_in_fresh_process(checkpoint: Path, answers: Path, copy: Path) -> dict:
    result = run_in_fresh_process(FRESH_LOAD, checkpoint, answers, copy)
    return json.loads(result.stdout.strip().splitlines()[-1])


def check_three_generations(model, processor, tmp_path: Path) -> None:
    generations = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    answers = save_with_answers(model, processor, generations[0])
    for checkpoint, copy in zip(generations[:-1], generations[1:]):
        result = load_in_fresh_process(checkpoint, answers, copy)
        assert set(result["differences"].values()) == {0.0}
        assert set(result["generation_equal"].values()) == {True}
        assert len(result["differences"]) == 4
        assert result["same_config_class"]
        assert result["processor"] == "AnyVlmProcessor"
        assert result["processor_module"].startswith("transformers_modules.")
    # transformers completes the config of a tokenizer that was made in memory when it first loads it.
    _check_same_files(generations[0], generations[2], except_for={"tokenizer_config.json"})
    _check_same_files(generations[1], generations[2], except_for=set())


def _check_same_files(first: Path, second: Path, except_for: set[str]) -> None:
    comparison = filecmp.dircmp(first, second)
    assert not comparison.left_only and not comparison.right_only
    _, differing, unreadable = filecmp.cmpfiles(first, second, comparison.common_files, shallow=False)
    assert set(differing) <= except_for and not unreadable


def test_three_generations_without_the_package(tmp_path):
    model, processor = anyvlm.compose(
        vision=vision_config("yolos"), text=text_config("qwen3_moe"), tokenizer=tiny_tokenizer(), image_size=32
    )
    check_three_generations(model, processor, tmp_path)


@pytest.mark.parametrize(("fusion", "views"), [("cross_attention", "resize"), ("gated", "tiles")])
def test_three_generations_of_a_fusion(tmp_path, fusion, views):
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"),
        text=text_config("gpt2"),
        tokenizer=tiny_tokenizer(),
        fusion=fusion,
        views=views,
    )
    set_gates(model.fusion, 0.7)
    check_three_generations(model, processor, tmp_path)


def test_three_generations_of_trained_parts(tmp_path, trained_models):
    model, processor = anyvlm.compose(
        vision=f"{trained_models}/dinov2-small", text=f"{trained_models}/stories-15m", image_size=112
    )
    check_three_generations(model, processor, tmp_path)


@pytest.fixture
def checkpoint(tmp_path):
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


class TestCode:
    def test_every_auto_map_value_is_a_class_of_the_entry_module(self, checkpoint):
        for name in ("config.json", "processor_config.json"):
            auto_map = json.loads((checkpoint / name).read_text())["auto_map"]
            assert set(auto_map.items()) <= set(AUTO_MAP.items())
        entry = ast.parse((checkpoint / f"{ENTRY_MODULE}.py").read_text())
        imported = {alias.name for node in entry.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert {value.split(".")[1] for value in AUTO_MAP.values()} <= imported

    def test_transformers_finds_every_file_and_needs_no_other_package(self, checkpoint):
        """By transformers' own reading of the code."""
        needed, seen = [f"{ENTRY_MODULE}"], set()
        while needed:
            name = needed.pop()
            seen.add(f"{name}.py")
            needed += [found for found in get_relative_imports(checkpoint / f"{name}.py") if f"{found}.py" not in seen]
            assert set(get_imports(checkpoint / f"{name}.py")) <= {
                "PIL", "numpy", "torch", "transformers", *sys.stdlib_module_names,
            }  # fmt: skip
        assert seen == {path.name for path in checkpoint.glob("*.py")}

    def test_sources_are_the_packages_own(self):
        """Flattening changes import lines and nothing else."""
        root = Path(anyvlm.__file__).parent
        for name, source in checkpoint_sources().items():
            originals = [root / package / name for package in ("configuration", "modeling", "processing")]
            original = next((path for path in originals if path.is_file()), None)
            if original is None:
                assert name == f"{ENTRY_MODULE}.py"
                continue
            for before, after in zip(original.read_text().splitlines(), source.splitlines(), strict=True):
                if before != after:
                    assert re.sub(r"\.\.\w+\.", ".", before) == after

    def test_imports_are_rewritten_only_where_they_are_imports(self):
        source = '''"""from ..configuration.a import b"""
from ..configuration.image_tokens import (
    image_grid,
)
text = "from ..configuration.a import b"
def late():
    from ..modeling.projectors import build_projector
    return build_projector
'''
        flat = flatten_relative_imports(source)
        assert flat == source.replace("from ..configuration.image_tokens", "from .image_tokens").replace(
            "from ..modeling.projectors", "from .projectors"
        )

    def test_import_that_would_not_travel_is_refused(self):
        with pytest.raises(ValueError, match="from .module import"):
            flatten_relative_imports("from . import projectors\n")

    def test_failed_write_leaves_the_old_file_whole(self, tmp_path, monkeypatch):
        write_checkpoint_code(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def full_disk(self, *args, **kwargs):
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError):
            write_checkpoint_code(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.py")} == {
            name: content for name, content in before.items() if name.endswith(".py")
        }


class TestLoading:
    def test_missing_weight_is_an_error_that_names_it(self, checkpoint):
        weights = load_file(checkpoint / "model.safetensors")
        del weights["multi_modal_projector.layers.0.weight"]
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lacks 1 weights .*multi_modal_projector.layers.0.weight"):
            AutoModelForCausalLM.from_pretrained(checkpoint)

    def test_other_code_version_is_warned_about(self, checkpoint, caplog):
        config = json.loads((checkpoint / "config.json").read_text())
        AutoConfig.from_pretrained(checkpoint)
        assert "written by anyvlm" not in caplog.text
        config["code_version"] = "0.0.7"
        (checkpoint / "config.json").write_text(json.dumps(config))
        loaded = AutoConfig.from_pretrained(checkpoint)
        assert f"written by anyvlm 0.0.7, and the code in use is anyvlm {anyvlm.__version__}" in caplog.text
        loaded.save_pretrained(checkpoint)
        assert json.loads((checkpoint / "config.json").read_text())["code_version"] == anyvlm.__version__

    def test_loading_in_another_dtype(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    def test_attention_of_each_part_can_be_chosen(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, attn_implementation={"vision_config": "eager", "text_config": "sdpa"}
        )
        assert model.vision_tower.config._attn_implementation == "eager"
        assert model.language_model.config._attn_implementation == "sdpa"

    def test_shards(self, checkpoint, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)

    def test_base_class_gives_hidden_states(self, checkpoint):
        base = anyvlm.AnyVlmModel.from_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        ids = torch.arange(10, 20).unsqueeze(0)
        with torch.no_grad():
            hidden = base(input_ids=ids).last_hidden_state
            assert torch.equal(model.get_output_embeddings()(hidden), model(input_ids=ids).logits)

    def test_no_split_modules_are_modules_of_the_model(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert model._no_split_modules
        assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}
