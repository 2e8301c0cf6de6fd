"""`push` and its script. The Hub is a fake at the boundary of huggingface_hub."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

from anyvlm.publishing import hub
from anyvlm.publishing.errors import FreshProcessError, PublishingError
from anyvlm.publishing.fresh_process import MODEL_CLASSES
from anyvlm.publishing.hub import push
from anyvlm.publishing.model_card import is_hand_written


SCRIPT = Path(__file__).parents[2] / "scripts" / "push_to_hub.py"


def http_error(status: int, error_class=HfHubHTTPError) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return error_class(f"{status} from\nthe Hub", response=response)


class FakeHub:
    """What publishing calls of `HfApi`. `visibility`: of a repository that exists. `fails`: call -> error."""

    def __init__(self, visibility: str | None = None, fails: dict[str, Exception] | None = None):
        self.visibility, self.fails = visibility, fails or {}
        self.calls: list[tuple[str, dict]] = []

    def _call(self, name: str, **arguments) -> None:
        self.calls.append((name, arguments))
        if name in self.fails:
            raise self.fails[name]

    def whoami(self):
        self._call("whoami")
        return {"name": "me"}

    def repo_info(self, repo_id):
        self._call("repo_info", repo_id=repo_id)
        if self.visibility is None:
            raise http_error(404, RepositoryNotFoundError)
        return SimpleNamespace(private=self.visibility == "private")

    def create_repo(self, repo_id, *, private, exist_ok):
        self._call("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        return f"https://hub.test/{repo_id}"

    def create_branch(self, repo_id, *, branch, exist_ok):
        self._call("create_branch", repo_id=repo_id, branch=branch, exist_ok=exist_ok)

    def upload_folder(self, *, folder_path, ignore_patterns, **arguments):
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        uploaded = set(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        self._call("upload_folder", uploaded=uploaded, **arguments)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def arguments(self, name: str) -> dict:
        (found,) = [arguments for called, arguments in self.calls if called == name]
        return found


@pytest.fixture
def without_process(monkeypatch, fresh_check):
    """Take the fresh process as passed; the list gets its arguments."""
    calls = []

    def check(checkpoint, **arguments):
        calls.append(arguments)
        return fresh_check

    monkeypatch.setattr(hub, "check_in_fresh_process", check)
    return calls


def test_script_dry_run_end_to_end(checkpoint):
    """The whole check in real fresh processes, through the script as a user runs it."""
    (checkpoint / "optimizer.pt").write_bytes(b"0" * 5000)
    before = {path.name for path in checkpoint.iterdir()}
    run = subprocess.run(
        [sys.executable, SCRIPT, checkpoint, "me/my-vlm", "--dry-run", "--license", "mit"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert {path.name for path in checkpoint.iterdir()} == before | {"README.md"}
    for expected in (
        *(f"load the model with {name}" for name in MODEL_CLASSES),
        "second generation: compare AutoModelForCausalLM",
        "Would be uploaded to me/my-vlm",
        "model.safetensors",
        "Left out, 5.0 kB: optimizer.pt",
        "Model card: README.md, written.",
    ):
        assert expected in run.stdout, expected
    assert "upload " not in run.stdout
    card = (checkpoint / "README.md").read_text()
    assert "license: mit" in card and "Every class gave the same logits" in card
    assert "| Tokens per picture | 16 |" in card


def test_new_repositories_are_private_and_get_the_files_of_the_report(checkpoint, without_process):
    left_out = ["optimizer.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", ".config.json.7.tmp"]
    for folder in ("checkpoint-10", "runs/today"):
        (checkpoint / folder).mkdir(parents=True)
        left_out.append(f"{folder}/model.safetensors")
    for name in left_out:
        (checkpoint / name).write_text("0")
    api = FakeHub()
    report = push(checkpoint, "me/my-vlm", api=api)
    assert api.names == ["whoami", "repo_info", "create_repo", "upload_folder"]
    assert api.arguments("create_repo") == {"repo_id": "me/my-vlm", "private": True, "exist_ok": True}
    upload = api.arguments("upload_folder")
    assert upload["uploaded"] == set(report.files) and set(report.left_out) == set(left_out)
    assert {"README.md", "model.safetensors", "anyvlm_checkpoint.py", "tokenizer.json"} <= upload["uploaded"]
    assert upload["repo_id"] == "me/my-vlm" and upload["revision"] is None
    # Weights of an earlier upload would be loaded in place of sharded ones; other files are not touched.
    remote = ["model.safetensors", "model-00001-of-00002.safetensors", "adapter/adapter_model.safetensors", "notes.md"]
    assert list(filter_repo_objects(remote, allow_patterns=upload["delete_patterns"])) == remote[:2]
    assert report.url == "https://hub.test/me/my-vlm" and report.card_written
    assert report.files["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert without_process == [{"quick": False, "timeout": 3600, "on_step": without_process[0]["on_step"]}]


def test_public_branch_and_message(checkpoint, without_process):
    api = FakeHub()
    push(checkpoint, "me/m", private=False, revision="v1", commit_message="First", quick=True, api=api)
    assert api.arguments("create_repo")["private"] is False
    assert api.arguments("create_branch") == {"repo_id": "me/m", "branch": "v1", "exist_ok": True}
    upload = api.arguments("upload_folder")
    assert (upload["revision"], upload["commit_message"]) == ("v1", "First")
    assert 'revision="v1"' in (checkpoint / "README.md").read_text()
    assert without_process[0]["quick"] is True


def test_dry_run_does_not_touch_the_hub(checkpoint, without_process):
    api = FakeHub()
    report = push(checkpoint, "me/m", dry_run=True, api=api)
    assert api.calls == [] and report.url is None
    assert "README.md" in report.files and (checkpoint / "README.md").is_file()


@pytest.mark.parametrize(
    ("visibility", "private", "warning"),
    [
        ("public", True, "exists and is public"),
        ("private", False, "exists and is private"),
        ("private", True, None),
        ("public", False, None),
    ],
)
def test_visibility_that_is_not_as_asked_is_warned_about(checkpoint, without_process, visibility, private, warning):
    api, warned_after = FakeHub(visibility), []
    report = push(
        checkpoint,
        "me/m",
        private=private,
        license="mit",
        api=api,
        on_warning=lambda text: warned_after.append(api.names[-1]),
    )
    assert len(report.warnings) == (warning is not None)
    if warning:
        assert warning in report.warnings[0] and warned_after == ["repo_info"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("whoami", LocalTokenNotFoundError("no token"), "hf auth login"),
        ("whoami", http_error(401), "hf auth login"),
        ("whoami", OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        ("whoami", ConnectionError("Name or service\nnot known"), "did not answer .Name or service not known"),
        ("create_repo", http_error(403), "may not write to me/m.*hf auth login"),
        ("upload_folder", http_error(500), "refused me/m: 500 from the Hub"),
        ("upload_folder", ValueError("Invalid metadata in README.md.\n- license"), "refused me/m: Invalid metadata"),
        ("upload_folder", RuntimeError("Error while uploading"), "run this again"),
    ],
)
def test_errors_of_the_hub_are_one_line_that_helps(checkpoint, without_process, call, error, message):
    with pytest.raises(PublishingError, match=message) as failure:
        push(checkpoint, "me/m", api=FakeHub(fails={call: error}))
    assert "\n" not in str(failure.value)
    # A missing login shows before minutes of loading.
    assert bool(without_process) == (call != "whoami")


@pytest.mark.parametrize("repo_id", ["my-vlm", "me/my vlm", "me/a/b", "me/a--b"])
def test_names_that_are_no_repository(checkpoint, repo_id):
    with pytest.raises(PublishingError):
        push(checkpoint, repo_id, dry_run=True)


def test_nothing_is_sent_for_a_checkpoint_that_fails(checkpoint, monkeypatch):
    def fail(*_, **__):
        raise FreshProcessError("step failed")

    monkeypatch.setattr(hub, "check_in_fresh_process", fail)
    api = FakeHub()
    with pytest.raises(FreshProcessError):
        push(checkpoint, "me/m", api=api)
    assert not {"create_repo", "upload_folder"} & set(api.names)
    assert not (checkpoint / "README.md").exists()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(PublishingError, match="weights are missing"):
        push(checkpoint, "me/m", api=api)


def test_a_hand_written_card_is_kept(checkpoint, without_process):
    card = checkpoint / "README.md"
    card.write_text("# Mine\n")
    report = push(checkpoint, "me/m", dry_run=True, license="mit")
    assert card.read_text() == "# Mine\n" and not report.card_written
    assert "is kept" in report.warnings[0] and "--license" in report.warnings[1]
    report = push(checkpoint, "me/m", dry_run=True, overwrite_card=True)
    assert report.card_written and not is_hand_written(card)
    # One that was written here before follows the checkpoint.
    assert push(checkpoint, "me/other-name", dry_run=True).card_written
    assert "# other-name" in card.read_text()


def test_unknown_license_is_warned_about(checkpoint, without_process):
    assert "licence" in push(checkpoint, "me/m", dry_run=True).warnings[0]
    assert push(checkpoint, "me/m", dry_run=True, license="mit").warnings == []


@pytest.fixture
def run_script():
    """Run the script in this process: output, error output and exit code."""
    spec = importlib.util.spec_from_file_location("push_to_hub", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return lambda *arguments: CliRunner().invoke(script.app, [str(argument) for argument in arguments])


def test_script_fails_with_one_line(checkpoint, run_script, monkeypatch):
    result = run_script(checkpoint / "nothing", "me/m", "--dry-run")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1 and "not a folder" in result.stderr

    def fail(*_, **__):
        raise FreshProcessError("the step failed", "Traceback\nValueError: x")

    monkeypatch.setattr(hub, "check_in_fresh_process", fail)
    assert run_script(checkpoint, "me/m", "--dry-run").stderr == "Error: the step failed\n"
    assert "ValueError: x" in run_script(checkpoint, "me/m", "--dry-run", "--verbose").stderr


def test_script_hands_its_options_on(checkpoint, run_script, without_process, monkeypatch, tmp_path):
    api = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda token: api)
    results = tmp_path / "results.json"
    results.write_text('{"VQAv2": {"accuracy": 0.5}}')
    result = run_script(
        checkpoint, "me/m", "--public", "--quick", "--license", "mit", "--results", results, "--revision", "v1"
    )
    assert result.exit_code == 0, result.output
    assert "Uploaded to me/m" in result.stdout and "https://hub.test/me/m" in result.stdout
    assert api.arguments("create_repo")["private"] is False and without_process[0]["quick"] is True
    assert api.arguments("upload_folder")["revision"] == "v1"
    assert "| VQAv2 | accuracy | 0.5 |" in (checkpoint / "README.md").read_text()
    assert run_script("--help").exit_code == 0 and "--dry-run" in run_script("--help").stdout
