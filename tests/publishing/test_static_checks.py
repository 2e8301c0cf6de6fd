"""Every check of the files passes on a whole checkpoint and fails on one that is broken in that way."""

import json
import shutil

import pytest

from anyvlm.publishing.errors import PublishingError
from anyvlm.publishing.static_checks import check_files, code_files


def edit_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_whole_checkpoint_passes(whole_checkpoint):
    check_files(whole_checkpoint)


def test_code_files_are_all_python_files_of_a_checkpoint(whole_checkpoint):
    assert code_files(whole_checkpoint) == {path.name for path in whole_checkpoint.glob("*.py")}
    assert len(code_files(whole_checkpoint)) > 5


@pytest.mark.parametrize("name", ["anyvlm_checkpoint.py", "projectors.py"])
def test_missing_code(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(PublishingError, match=f"code that auto_map leads to is missing: {name}"):
        check_files(checkpoint)


@pytest.mark.parametrize(
    ("file", "entry"), [("config.json", "AutoModelForCausalLM"), ("processor_config.json", "AutoProcessor")]
)
def test_missing_auto_map(checkpoint, file, entry):
    edit_json(checkpoint / file, lambda config: config.pop("auto_map"))
    with pytest.raises(PublishingError, match=rf"auto_map of {file} lacks .*{entry}"):
        check_files(checkpoint)


def test_code_of_another_repository(checkpoint):
    entry = "other/repository--anyvlm_checkpoint.AnyVlmConfig"
    edit_json(checkpoint / "config.json", lambda config: config["auto_map"].update(AutoConfig=entry))
    with pytest.raises(PublishingError, match="another repository: other/repository--"):
        check_files(checkpoint)


def test_missing_shard(composed, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    composed[0].save_pretrained(checkpoint, max_shard_size="60KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 2
    check_files(checkpoint)
    shards[1].unlink()
    with pytest.raises(PublishingError, match=f"index.json names are missing: {shards[1].name}"):
        check_files(checkpoint)


def test_two_sets_of_weights(composed, checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    composed[0].save_pretrained(checkpoint, max_shard_size="60KB")
    (checkpoint / "model.safetensors").write_bytes(weights)
    with pytest.raises(PublishingError, match="both model.safetensors and model.safetensors.index.json"):
        check_files(checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json is missing"),
        ("processor_config.json", "processor_config.json is missing"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
        ("tokenizer.json", "vocabulary is missing"),
        ("model.safetensors", "the weights are missing"),
    ],
)
def test_missing_file(checkpoint, name, message):
    (checkpoint / name).unlink()
    with pytest.raises(PublishingError, match=message):
        check_files(checkpoint)


@pytest.mark.parametrize("value", ["/home/someone/models/tower", "C:\\models\\tower", "~/models/tower", "file:///m/t"])
@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_local_path(checkpoint, file, value):
    edit_json(checkpoint / file, lambda config: config.update(deep=[{"source": value}]))
    with pytest.raises(PublishingError, match=rf"{file} names a folder of this machine: deep\[0\].source"):
        check_files(checkpoint)


@pytest.mark.parametrize("value", ["/model", "./model", "../model"])
def test_local_name(checkpoint, value):
    edit_json(checkpoint / "config.json", lambda config: config["vision_config"].update(_name_or_path=value))
    with pytest.raises(PublishingError, match="vision_config._name_or_path"):
        check_files(checkpoint)


def test_what_only_looks_like_a_path_passes(checkpoint):
    values = ["/no_think", "</s>", "<|a|>/<|b|>", "owner/name", "https://example.org/a/b", "/", "a/b/c"]
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.update(tokens=values))
    check_files(checkpoint)


def test_pickled_weights_but_not_the_state_of_training(checkpoint):
    (checkpoint / "checkpoint-10").mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "checkpoint-10/model.bin"):
        (checkpoint / name).touch()
    check_files(checkpoint)
    (checkpoint / "pytorch_model.bin").touch()
    with pytest.raises(PublishingError, match="pickle files .* move pytorch_model.bin elsewhere"):
        check_files(checkpoint)


def test_every_problem_is_named_at_once(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "projectors.py").unlink()
    (checkpoint / "processor_config.json").write_text("{")
    with pytest.raises(PublishingError) as error:
        check_files(checkpoint)
    for part in ("weights are missing", "projectors.py", "processor_config.json cannot be read"):
        assert part in str(error.value)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(PublishingError, match="is not a folder"):
        check_files(tmp_path / "nothing")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PublishingError, match="adapter only"):
        check_files(tmp_path)


def test_code_of_the_parts(remote_code_checkpoint, tmp_path):
    check_files(remote_code_checkpoint)
    assert code_files(remote_code_checkpoint) == {path.name for path in remote_code_checkpoint.glob("*.py")}
    changed = shutil.copytree(remote_code_checkpoint, tmp_path / "changed")
    (changed / "vision_tower_code_functions.py").write_text("gelu = None\n")
    with pytest.raises(
        PublishingError, match=r"vision_tower_code\*.py are not the files that config.json was saved with"
    ):
        check_files(changed)
