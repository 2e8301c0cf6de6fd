"""The demo from end to end, with few steps: everything is written, and the fresh process agrees."""

import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from anyvlm.demo import DemoError, fresh_answers
from anyvlm.demo.data import KINDS
from anyvlm.demo.report import written_aside
from anyvlm.demo.run import recipe_for, run_demo
from anyvlm.demo.train import Recipe


FEW_STEPS = Recipe(steps=25, batch_size=16, learning_rate=1e-3, held_out_per_kind=5, num_threads=1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Results, folder and console output of one short run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=120)
    results = run_demo(folder, FEW_STEPS, seed=1, console=console)
    return results, folder, console.file.getvalue()


def test_everything_is_written_and_nothing_half(demo):
    results, folder, _ = demo
    written = {path.name for path in folder.iterdir()}
    assert written == {"checkpoint", "pictures", "sheet.png", "report.md", "results.json"}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder / "checkpoint").iterdir()
    }
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 1000 and len(sheet.convert("L").getcolors(maxcolors=256)) > 50
    assert len(list((folder / "pictures").glob("*.png"))) == len(KINDS)


def test_the_fresh_process_used_the_checkpoints_own_code_and_agreed(demo):
    results, _, printed = demo
    fresh = results["fresh_process"]
    assert fresh["model_class"].startswith("transformers_modules.")
    assert fresh["same_answers"] == fresh["num_questions"] == 5 * len(KINDS) == len(results["answers"])
    assert "the same answer to all 20 questions" in printed


def test_the_loss_falls(demo):
    losses = [loss for _, loss in demo[0]["losses"]]
    assert len(losses) == FEW_STEPS.steps
    assert losses[-1] < losses[0] / 1.5


def test_the_report_and_the_console_have_the_measured_numbers(demo):
    results, folder, printed = demo
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert [entry["kind"] for entry in results["scores"]] == [*KINDS, "all"]
    for entry in results["scores"]:
        shares = [f"{100 * entry[key]:.1f} %" for key in ("exact", "shuffled", "chance")]
        assert f"| {entry['kind']} | {entry['num_questions']} | {' | '.join(shares)} |" in report
        assert re.search(rf"{entry['kind']}\W+{entry['num_questions']}\W+" + r"\W+".join(shares), printed)
        right = [answer["truth"] == answer["answer"] for answer in results["answers"]]
        if entry["kind"] == "all":
            assert entry["exact"] == pytest.approx(sum(right) / len(right))
    parts = results["model"]["parts"]
    assert f"{sum(part['parameters'] for part in parts.values()):,}" in report
    assert f"takes {results['model']['tokens_per_picture']} tokens" in report
    assert "**20 of 20**" in report


def test_a_fresh_process_that_answers_otherwise_fails_the_demo(tmp_path, monkeypatch):
    def answer_otherwise(checkpoint, conversations, pictures, *args):
        return {"answers": ["something else"] * len(pictures), "model_class": "", "seconds": 0.0}

    monkeypatch.setattr(fresh_answers, "answer_in_fresh_process", answer_otherwise)
    with pytest.raises(DemoError, match="another answer to 8 of 8 questions"):
        run_demo(tmp_path, replace(FEW_STEPS, steps=1, held_out_per_kind=2), console=Console(file=io.StringIO()))
    assert "**0 of 8**" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_fresh_process_without_a_checkpoint_says_why_it_failed(tmp_path):
    picture = Image.new("RGB", (8, 8))
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(RuntimeError, match="The fresh process failed: .*missing"):
        fresh_answers.answer_in_fresh_process(tmp_path / "missing", [messages], [picture], 1, 1)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.txt"):
        run_demo(tmp_path, FEW_STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("ne")
        raise RuntimeError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.md", "old")]
    with written_aside(path) as aside:
        aside.write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.md", "new")]


def test_an_unknown_size_is_refused():
    from anyvlm.demo.parts import Parts

    with pytest.raises(ValueError, match="quick, small, large"):
        recipe_for(Parts(), "huge")
