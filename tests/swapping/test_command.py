"""`anyvlm swap`: a checkpoint that loads without the package, or nothing at all; and a source that is only read."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from test_checkpoint import load_in_fresh_process, save_with_answers
from tiny_parts import compose, text_config, tiny_tokenizer, vision_config
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from anyvlm import cli
from anyvlm.swapping import swap as swap_module
from anyvlm.swapping.report import SwapReport


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `anyvlm swap …`."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["swap", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out, captured.err


def contents(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A composed model in `source`, other parts in `tower` and `text`, two pictures in `images`."""
    folder = tmp_path_factory.mktemp("swap")
    for part in compose("clip_vision_model", "llama"):
        part.save_pretrained(folder / "source")
    torch.manual_seed(1)
    AutoModel.from_config(vision_config("dinov2")).save_pretrained(folder / "tower")
    AutoModelForCausalLM.from_config(text_config("qwen3")).save_pretrained(folder / "text")
    tiny_tokenizer().save_pretrained(folder / "text")
    (folder / "images").mkdir()
    for colour in ("red", "green"):
        Image.new("RGB", (40, 30), colour).save(folder / "images" / f"{colour}.png")
    return folder


@pytest.fixture(scope="module")
def swapped(folders) -> Path:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["swap", *map(str, (folders / "source", "--vision", folders / "tower", "-o", folders / "swapped"))])
    assert not exit_info.value.code
    return folders / "swapped"


class TestWhatIsWritten:
    def test_the_kept_part_is_the_sources_and_the_new_one_the_towers(self, folders, swapped):
        new, old = (AutoModelForCausalLM.from_pretrained(path) for path in (swapped, folders / "source"))
        tower = AutoModel.from_pretrained(folders / "tower")
        for part, origin in ((new.language_model, old.language_model), (new.vision_tower, tower)):
            expected = origin.state_dict()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in part.state_dict().items())

    def test_it_loads_in_a_fresh_process_without_the_package(self, swapped, tmp_path):
        model, processor = (kind.from_pretrained(swapped) for kind in (AutoModelForCausalLM, AutoProcessor))
        result = load_in_fresh_process(
            swapped, save_with_answers(model, processor, tmp_path / "again"), tmp_path / "copy"
        )
        assert set(result["differences"].values()) == {0.0} and set(result["generation_equal"].values()) == {True}
        assert result["processor_module"].startswith("transformers_modules.")

    def test_report_and_recipe_stand_beside_it(self, swapped):
        report = SwapReport.load(swapped)
        assert (
            report.swapped == "vision"
            and {part["name"]: part["what"] for part in report.parts}["language_model"] == "kept"
        )
        assert (swapped / "swap_report.txt").read_text().startswith("swapped:")
        assert Image.open(swapped / "swap_report.png").width > 1000
        recipe = yaml.safe_load((swapped / "swap_recipe.yaml").read_text())
        assert recipe["model"] == str(swapped) and len(recipe["stages"]) == len(report.next_steps) >= 2

    def test_the_recipes_parts_are_those_of_the_saved_model(self, swapped):
        model = AutoModelForCausalLM.from_pretrained(swapped)
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        for stage in yaml.safe_load((swapped / "swap_recipe.yaml").read_text())["stages"]:
            for name, part in stage["parts"].items():
                assert {name, *part.get("layers", [])} <= names

    def test_another_language_model_in_another_dtype(self, capsys, folders, tmp_path):
        before = contents(folders / "source")
        arguments = (folders / "source", "--text", folders / "text", "-o", tmp_path / "new", "--dtype", "bfloat16")
        code, out, err = run(capsys, *arguments)
        assert code == 0, err
        assert "Qwen3ForCausalLM" in out and "vision_tower" in out and f"Saved to {tmp_path / 'new'}" in out
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
        assert model.dtype == torch.bfloat16 and type(model.language_model).__name__ == "Qwen3ForCausalLM"
        assert contents(folders / "source") == before
        assert [path.name for path in tmp_path.iterdir()] == ["new"]

    def test_the_terminal_gets_tables_of_its_width(self, capsys, folders, tmp_path, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "80")
        code, out, err = run(capsys, folders / "source", "--vision", folders / "tower", "-o", tmp_path / "new")
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
        assert code == 0 and plain != out, err
        assert all(len(line) <= 80 for line in plain.splitlines() if not line.startswith("Saved"))
        for word in ("multi_modal_projector", "replaced", "Dinov2Model", "kept", "train next"):
            assert word in plain

    def test_the_same_tower_for_other_pictures(self, capsys, folders, tmp_path):
        code, out, err = run(
            capsys, folders / "source", "--patch-size", 4, "--image-tokens", "own", "-o", tmp_path / "new"
        )
        assert code == 0, err
        assert "resized" in out and "before the swap 16" in out
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.vision_config.patch_size == 4

    def test_overwrite_takes_the_place_of_a_checkpoint(self, capsys, folders, tmp_path):
        (tmp_path / "old").mkdir()
        for name in ("config.json", "left_over.bin"):
            (tmp_path / "old" / name).write_text("{}")
        arguments = (folders / "source", "--vision", folders / "tower", "-o", tmp_path / "old")
        assert run(capsys, *arguments, "--overwrite")[0] == 0
        assert not (tmp_path / "old" / "left_over.bin").exists()
        assert json.loads((tmp_path / "old" / "config.json").read_text())["model_type"] == "anyvlm"


class TestArguments:
    def test_all_of_them_reach_swap(self, capsys, folders, tmp_path, monkeypatch):
        seen = {}

        def spy(model, processor, **arguments):
            seen.update(arguments)
            return model, processor, SwapReport(swapped="vision")

        monkeypatch.setattr(swap_module, "swap", spy)
        (tmp_path / "questions.txt").write_text("What is it?\n\n  Which colour?  \n")
        files = ["--images", folders / "images", "--texts", tmp_path / "questions.txt", "-o", tmp_path / "new"]
        joined = ["--projector", '{"type": "mlp", "num_layers": 3}', "--views", "tiles", "--image-size", "16x32"]
        parts = ["--vision", "a", "--vision", "b", "--vision-fusion", "token", "--text", "c", "--tokenizer", "d"]
        rest = ["--image-tokens", "own", "--image-processor", "e", "--seed", 7, "--trust-remote-code"]
        rest += ["--seconds", 5, "--steps", 9, "--num-pictures", 3, "--patch-size", 4, "--vision-feature-layer", -2]
        code, _, err = run(capsys, folders / "source", *files, *joined, *parts, *rest)
        assert code == 0, err
        assert seen == {
            "vision": ("a", "b"),
            "text": "c",
            "images": str(folders / "images"),
            "texts": ["What is it?", "Which colour?"],
            "seconds": 5,
            "steps": 9,
            "num_pictures": 3,
            "patch_size": 4,
            "vision_feature_layer": -2,
            "projector": {"type": "mlp", "num_layers": 3},
            "image_processor": "e",
            "tokenizer": "d",
            "image_size": (16, 32),
            "views": "tiles",
            "image_tokens": "own",
            "vision_fusion": "token",
            "trust_remote_code": True,
            "seed": 7,
        }
        arguments = ["--vision", "a", "--images", folders / "images", "--no-distillation", "-o", tmp_path / "other"]
        code, _, err = run(capsys, folders / "source", *arguments)
        assert code == 0 and "slow on a CPU" not in err
        _, _, err = run(capsys, folders / "source", *arguments, "--dtype", "float16", "--overwrite")
        assert "slow on a CPU: --dtype float32" in " ".join(err.split()) or torch.cuda.is_available()
        assert seen["seconds"] == 0 and seen["steps"] is seen["vision_feature_layer"] is None
        assert seen["image_tokens"] == "keep" and seen["vision"] == "a"

    def bad_input(self, folders, tmp_path):
        """Name -> (arguments, exit code, words that the message must have)."""
        source, tower, output = folders / "source", folders / "tower", ["-o", tmp_path / "new"]
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "diary.txt").write_text("mine")
        (tmp_path / "file").write_text("a file")
        full = ["-o", tmp_path / "full"]
        return {
            "nothing to swap": ([source, *output], 2, "--vision or --text"),
            "no output": ([source, "--vision", tower], 2, "--output"),
            "no model": ([tower, "--vision", tower, *output], 1, "'dinov2' model, not a composed one"),
            "no source": ([tmp_path / "nothing", "--vision", tower, *output], 1, "nothing is no folder"),
            "no tower": ([source, "--vision", tmp_path / "nothing", *output], 1, "nothing is no folder"),
            "the text is a tower": ([source, "--text", tower, *output], 1, "causal language model"),
            "output is the source": ([source, "--vision", tower, "-o", source, "--overwrite"], 2, "which is read"),
            "output holds the tower": ([source, "--vision", tower, "-o", folders, "--overwrite"], 2, "which is read"),
            "output holds files": ([source, "--vision", tower, *full], 2, "--overwrite"),
            "output is no checkpoint": ([source, "--vision", tower, *full, "--overwrite"], 2, "no checkpoint"),
            "output is a file": ([source, "--vision", tower, "-o", tmp_path / "file"], 2, "is a file"),
            "no such images": ([source, "--vision", tower, "--images", tmp_path / "no", *output], 2, "no folder"),
            "texts alone": ([source, "--text", tower, "--texts", tmp_path / "file", *output], 2, "--images"),
            "seconds alone": ([source, "--vision", tower, "--seconds", 5, *output], 2, "--images"),
            "layer": ([source, "--vision", tower, "--vision-feature-layer", "first", *output], 2, "last or best"),
            "image tokens": ([source, "--vision", tower, "--image-tokens", "few", *output], 2, "keep"),
            "size": ([source, "--vision", tower, "--image-size", "big", *output], 2, "32x64"),
            "projector": ([source, "--vision", tower, "--projector", "magic", *output], 1, "mlp"),
        }

    def test_bad_input_gives_one_line_and_writes_nothing(self, capsys, folders, tmp_path):
        before = contents(folders)
        for name, (arguments, expected, words) in self.bad_input(folders, tmp_path).items():
            code, out, err = run(capsys, *arguments)
            last = err.splitlines()[-1]
            assert code == expected, f"{name}: {code}, {err}"
            assert last.startswith("anyvlm: error: ") and "Traceback" not in err and out == "", f"{name}: {err}"
            assert words in last, f"{name}: {last}"
        assert contents(folders) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["diary.txt"]


#: As `anyvlm`, but the swap tells when it is in the middle of its pictures, and then of its files, and waits there.
SLOW = """
import signal, sys, time
from anyvlm import cli
from anyvlm.swapping import swap as module
from anyvlm.swapping.report import SwapReport

# A shell that put this into the background had interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
swap, save = module.swap, SwapReport.save

def slow_swap(model, processor, **arguments):
    print("aligning", flush=True)
    time.sleep(600 if sys.argv[1] == "aligning" else 0)
    return swap(model, processor, **arguments)

def slow_save(report, folder):
    written = save(report, folder)
    print("saving", flush=True)
    time.sleep(600)
    return written

module.swap, SwapReport.save = slow_swap, slow_save
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize(("name", "moment"), [("SIGINT", "aligning"), ("SIGKILL", "saving")])
def test_stopped_at_any_moment_nothing_half_is_left(capsys, folders, tmp_path, name, moment):
    before = contents(folders / "source")
    arguments = ["swap", folders / "source", "--vision", folders / "tower", "--output", tmp_path / "new"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, moment, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.stdout.readline() not in (f"{moment}\n", ""):
            pass
        time.sleep(0.2)  # into the wait
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert not (tmp_path / "new").exists() and contents(folders / "source") == before
    if name == "SIGINT":
        assert process.returncode == 130 and err.splitlines()[-1] == "anyvlm: error: interrupted"
        assert list(tmp_path.iterdir()) == []
    else:
        assert process.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
        code, _, err = run(capsys, *arguments[1:])
        assert code == 0, err
        assert [path.name for path in tmp_path.iterdir()] == ["new"], "what the killed run left is removed"
