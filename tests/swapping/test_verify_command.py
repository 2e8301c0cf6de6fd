"""The `anyvlm verify` command: what it prints, and how it exits."""

import json
import shutil

import pytest
from verified_parts import make_sources

from anyvlm.cli import main


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    return exit_.value.code, *capsys.readouterr()


def test_passes_and_prints_every_check(sources, capsys):
    code, out, _ = run(
        capsys, "verify", sources.checkpoint, "--no-fresh-process", "--against", sources.tower, sources.language_model
    )
    assert code == 0
    assert "passed       features: Features are those of" in out and "Nothing is wrong" in out


def test_failure_exits_with_1_and_says_what_to_do(sources, capsys, tmp_path):
    checkpoint = shutil.copytree(sources.checkpoint, tmp_path / "checkpoint")
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 7}))
    arguments = ("verify", checkpoint, "--against", sources.language_model, f"vision={sources.tower}")
    code, out, _ = run(capsys, *arguments)
    assert code == 1
    assert (
        "First failure: processor, special tokens: Generation ends at 7" in out
        and "Set model.generation_config" in out
    )
    assert "not reached  end of an answer" in out
    code, out, _ = run(capsys, *arguments, "--all", "--no-fresh-process", "--json")
    report = json.loads(out)
    assert code == 1 and not report["passed"] and report["first_failure"] == ["processor", "special tokens"]
    assert {step["name"]: step["status"] for step in report["steps"]}["whole"] == "passed"


def test_bad_input_is_one_line(sources, capsys):
    code, out, errors = run(capsys, "verify", sources.language_model, "--against", sources.tower)
    assert code == 1 and not out and "is a 'llama' model, not a composed one" in errors
    code, _, errors = run(capsys, "verify", sources.checkpoint, "--against", "no/such-model")
    assert code == 1 and "no/such-model is no folder here" in errors
    code, _, errors = run(capsys, "verify", sources.checkpoint, "--trained", "projector")
    assert code == 1 and "projector cannot be said to be trained" in errors
