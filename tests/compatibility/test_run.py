"""The command: which pairs, going on after a stop, the table it writes. With checks that are made up, so quick."""

import ast
import json
import os
import signal

import pytest
import typer
from typer.testing import CliRunner

from anyvlm.compatibility import run as command
from anyvlm.compatibility.journal import MEASURED_CODE, ROOT, Journal, source_hash
from anyvlm.compatibility.pair_checks import MARKS, PairResult
from anyvlm.compatibility.plan import measure, random_pairs, type_pairs, working_types
from anyvlm.compatibility.table import make_table, read_table, to_markdown, write_table


VISION_TYPES = ["clip_vision_model", "tower_a", "tower_b", "tower_refused", "tower_absent"]
TEXT_TYPES = ["llama", "lm_a", "lm_b", "lm_fails"]
#: Parts of the commands that run the checks and write the tables, and measure nothing.
WRITERS = ("combination_table", "journal", "plan", "progress", "table")
DETAILS = {
    "tokens": 16,
    "inputs": "pixel_values",
    "layout": "sequence",
    "parameters": {"vision_tower": 1000, "language_model": 2000},
}


def made_up_check(vision: str, text: str, seed: int = 0) -> PairResult:
    if vision == "tower_refused":
        return PairResult(vision, text, status="refused", reason="It sees | nothing.")
    if vision == "tower_absent":
        return PairResult(vision, text, status="not tried", reason="timm is not installed")
    if text == "lm_fails":
        return PairResult(vision, text, status="fails", reason="it fails", failed={"cache": "it fails"})
    marks = ["right padding only"] if text == "lm_b" else []
    return PairResult(vision, text, marks=marks, details=DETAILS)


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Run the command on made-up types; returns the outcome and the folder of the table."""
    monkeypatch.setattr(command.tiny_configs, "vision_types", lambda: VISION_TYPES)
    monkeypatch.setattr(command.tiny_configs, "text_types", lambda: TEXT_TYPES)
    monkeypatch.setattr(command, "check_pair", made_up_check)
    app = typer.Typer()
    app.command()(command.main)

    def run(*arguments):
        paths = ["--output", str(tmp_path / "docs"), "--journal", str(tmp_path / "journal.jsonl"), "--workers", "2"]
        return CliRunner().invoke(app, [*paths, *arguments]), tmp_path

    return run


def test_pairs_of_types():
    assert type_pairs(["t1", "clip_vision_model"], ["llama", "l1"]) == [
        ("t1", "llama"),
        ("clip_vision_model", "llama"),
        ("clip_vision_model", "l1"),
    ]


def test_random_pairs_follow_the_seed():
    vision, text = [f"t{n}" for n in range(30)], [f"l{n}" for n in range(30)]
    drawn = random_pairs([*vision, "clip_vision_model"], [*text, "llama"], 300, seed=0)
    assert len(set(drawn)) == 300
    assert not [pair for pair in drawn if "clip_vision_model" in pair or "llama" in pair]
    assert drawn == random_pairs(reversed(vision), text, 300, seed=0)
    assert drawn != random_pairs(vision, text, 300, seed=1)
    assert len(random_pairs(["t1", "t2"], ["l1"], 300, seed=0)) == 2


def test_the_command_writes_the_table(invoke):
    outcome, folder = invoke("--pairs", "3")
    assert outcome.exit_code == 1, "a type fails"
    table = read_table(folder / "docs")
    assert table["counts"]["vision"] == {"tried": 5, "works": 3, "refused": 1, "not tried": 1, "fails": 0}
    assert table["counts"]["text"] == {"tried": 4, "works": 3, "refused": 0, "not tried": 0, "fails": 1}
    assert table["counts"]["pairs"]["works"] == 3
    assert table["vision"]["tower_refused"]["reason"] == "It sees | nothing."
    assert table["vision"]["tower_a"]["parameters"] == 1000
    assert table["text"]["lm_b"]["marks"] == ["right padding only"]
    assert {pair["vision"] for pair in table["pairs"]} <= {"tower_a", "tower_b"}
    assert set(table["versions"]) == {"anyvlm", "transformers", "torch", "python"}
    text = (folder / "docs" / "compatibility.md").read_text()
    assert "| vision types | 5 | 3 | 1 | 1 | 0 |" in text
    assert "| `tower_refused` | It sees \\| nothing. |" in text
    assert "timm is not installed" in text
    assert "3 of 3 random pairs" in text
    assert not list((folder / "docs").glob("*.part"))


def test_two_runs_write_the_same(invoke):
    _, folder = invoke()
    first = {path.name: path.read_bytes() for path in (folder / "docs").iterdir()}
    invoke("--fresh")
    assert {path.name: path.read_bytes() for path in (folder / "docs").iterdir()} == first


def test_only_some_types(invoke):
    outcome, folder = invoke("--only", "tower_refused", "--only", "lm_a")
    assert outcome.exit_code == 0
    assert "tower_refused + llama: refused" in outcome.output
    assert "It sees | nothing." in outcome.output
    assert "clip_vision_model + lm_a: works" in outcome.output
    assert not list(folder.iterdir())
    outcome, _ = invoke("--only", "lm_fails")
    assert outcome.exit_code == 1
    outcome, _ = invoke("--only", "lama")
    assert outcome.exit_code == 2
    assert "lama" in outcome.output


def test_a_stopped_run_goes_on(tmp_path):
    """Killed in the middle of writing a line: what was whole is kept, and only the rest is measured."""
    path = tmp_path / "journal.jsonl"
    pairs = [("t1", "llama"), ("t2", "llama"), ("t3", "llama")]
    journal = Journal(path, {"seed": 0})
    journal.add(PairResult("t1", "llama").to_dict())
    journal.add(PairResult("t2", "llama").to_dict())
    journal.close()
    path.write_text(path.read_text()[:-10])

    journal = Journal(path, {"seed": 0})
    assert set(journal.results) == {("t1", "llama")}
    seen = []
    arguments = {"num_workers": 2, "timeout": 30, "memory": None, "on_result": seen.append}

    def check(vision, text):
        return PairResult(vision, text, reason="measured now").to_dict()

    results = measure(pairs, journal, check, **arguments)
    journal.close()
    assert (seen[0]["vision"], len(seen)) == ("t1", 3)
    assert {pair: result["reason"] for pair, result in results.items()} == {
        ("t1", "llama"): None,
        ("t2", "llama"): "measured now",
        ("t3", "llama"): "measured now",
    }
    assert set(Journal(path, {"seed": 0}).results) == set(pairs)


def test_results_of_other_code_are_put_aside(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"source": "a"})
    journal.add(PairResult("t1", "llama").to_dict())
    journal.close()
    assert not Journal(path, {"source": "b"}).results
    assert "t1" in path.with_name("journal.jsonl.old").read_text()
    Journal(path, {"source": "b"}).add(PairResult("t1", "llama").to_dict())
    assert not Journal(path, {"source": "b"}, fresh=True).results


def test_the_hash_follows_the_code(tmp_path):
    for name in MEASURED_CODE:
        path = tmp_path / name
        (path if path.suffix == "" else path.parent).mkdir(exist_ok=True)
        if path.suffix:
            path.write_text("")
    before = source_hash(tmp_path)
    assert source_hash(tmp_path) == before
    (tmp_path / "modeling" / "new.py").write_text("x = 1")
    assert source_hash(tmp_path) != before
    assert source_hash() == source_hash()


def test_the_hash_is_of_all_that_measures():
    """What the checks of a pair import from their own folder, and what that imports."""
    found, remaining = set(), ["pair_checks", "combinations"]
    while remaining:
        name = remaining.pop()
        found.add(name)
        tree = ast.parse((ROOT / "compatibility" / f"{name}.py").read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        names = {node.module or alias.name for node in imports for alias in node.names}
        remaining += names - found - set(remaining) - {*WRITERS}
    assert {f"compatibility/{name}.py" for name in found} == {
        name for name in MEASURED_CODE if name.startswith("compatibility/")
    }


def test_a_process_that_dies_is_a_result(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {})

    def die(vision, text):
        os.kill(os.getpid(), signal.SIGKILL)

    results = measure([("t1", "llama")], journal, die, 1, 30, None, lambda result: None)
    result = results["t1", "llama"]
    assert result["status"] == "fails"
    assert result["failed"] == {"process": "the process was killed by SIGKILL: it said nothing"}
    assert journal.results["t1", "llama"] == result


def test_the_table_goes_to_json_and_back(tmp_path):
    results = {pair: made_up_check(*pair).to_dict() for pair in type_pairs(VISION_TYPES, TEXT_TYPES)}
    vision, text = working_types(results)
    assert vision == ["clip_vision_model", "tower_a", "tower_b"]
    assert text == ["llama", "lm_a", "lm_b"]
    failing = made_up_check("tower_a", "lm_fails").to_dict()
    table = make_table(
        {
            "versions": {"anyvlm": "1", "transformers": "2", "torch": "3"},
            "seed": 0,
            "with_vision": "x",
            "with_text": "y",
        },
        {name: results[name, "llama"] for name in VISION_TYPES},
        {name: results["clip_vision_model", name] for name in TEXT_TYPES},
        [failing, made_up_check("tower_a", "lm_a").to_dict()],
    )
    write_table(table, tmp_path)
    assert read_table(tmp_path) == table == json.loads(json.dumps(table))
    markdown = to_markdown(table)
    assert "1 of 2 random pairs" in markdown
    assert "| `tower_a` | `lm_fails` | fails | it fails |" in markdown
    for mark in MARKS:
        assert f"| {mark} |" in markdown
    assert read_table(tmp_path / "nowhere") is None
