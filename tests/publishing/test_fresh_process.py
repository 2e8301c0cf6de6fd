"""Fresh processes, and the check that runs in one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anyvlm.publishing import fresh_worker
from anyvlm.publishing.errors import FreshProcessError
from anyvlm.publishing.fresh_process import check_in_fresh_process, compare_saved_files, run_in_fresh_process


def write_script(folder: Path, source: str) -> Path:
    path = folder / "script.py"
    path.write_text(source)
    return path


REPORT = """
import importlib.util, json, os, sys

def can_import(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False

keys = ("HF_HUB_OFFLINE", "HF_MODULES_CACHE", "HF_HOME", "HF_TOKEN", "EXTRA", "HF_HUB_CACHE")
print(json.dumps({
    "importable": [name for name in ("anyvlm", "transformers") if can_import(name)],
    "arguments": sys.argv[1:],
    "is_main": __name__ == "__main__",
    **{key: os.environ.get(key) for key in keys},
}))
"""


def test_package_cannot_be_imported_and_nothing_of_the_user_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    script = write_script(tmp_path, REPORT)
    lines = []
    process = run_in_fresh_process(script, "one", tmp_path, extra_env={"EXTRA": "1"}, on_line=lines.append)
    report = json.loads(process.stdout)
    assert lines == [process.stdout.strip()]
    assert report["importable"] == ["transformers"]
    assert report["arguments"] == ["one", str(tmp_path)] and report["is_main"]
    assert (report["HF_HUB_OFFLINE"], report["HF_TOKEN"], report["EXTRA"]) == ("1", None, "1")
    assert report["HF_HUB_CACHE"] != str(tmp_path)
    assert report["HF_MODULES_CACHE"].startswith(report["HF_HOME"]) and not Path(report["HF_HOME"]).exists()
    # Without the blocker, the same script finds the package: the test above is not empty.
    plain = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=True)
    assert "anyvlm" in json.loads(plain.stdout)["importable"]


def test_failures_of_a_process(tmp_path):
    script = write_script(tmp_path, "print('started', flush=True)\nimport anyvlm.publishing\n")
    with pytest.raises(FreshProcessError, match="No module named 'anyvlm") as failure:
        run_in_fresh_process(script)
    assert failure.value.summary == "script.py failed with exit code 1." and failure.value.returncode == 1

    script = write_script(tmp_path, "import sys, time\nprint('before', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    with pytest.raises(FreshProcessError, match="took longer than 2 seconds") as failure:
        run_in_fresh_process(script, timeout=2)
    assert "before" in failure.value.stderr

    script = write_script(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(FreshProcessError, match="ended by signal 9"):
        run_in_fresh_process(script)


def test_missing_weight_is_named_with_the_step(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    lost = "language_model.model.layers.1.mlp.up_proj.weight"
    del weights[lost]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    steps = []
    with pytest.raises(FreshProcessError) as failure:
        check_in_fresh_process(checkpoint, quick=True, on_step=steps.append)
    step = "load the model with AutoModelForCausalLM"
    assert steps[-1] == step
    assert f"step '{step}' failed" in failure.value.summary and lost in failure.value.summary
    assert "\n" not in failure.value.summary
    assert "Traceback" in failure.value.stderr and len(str(failure.value).splitlines()) <= 16


def test_code_that_needs_the_package_is_found(checkpoint):
    with open(checkpoint / "projectors.py", "a") as file:
        file.write("\nimport anyvlm\n")
    with pytest.raises(FreshProcessError, match="step 'load the config with AutoConfig' failed.*anyvlm"):
        check_in_fresh_process(checkpoint, quick=True)


def test_second_generation_with_other_files(whole_checkpoint, tmp_path):
    again = shutil.copytree(whole_checkpoint, tmp_path / "again")
    compare_saved_files(whole_checkpoint, again)
    with open(again / "projectors.py", "a") as file:
        file.write("\n")
    with pytest.raises(FreshProcessError, match="the code differs in projectors.py"):
        compare_saved_files(whole_checkpoint, again)
    (again / "projectors.py").unlink()
    (again / "chat_template.jinja").unlink()
    with pytest.raises(FreshProcessError, match="lacks chat_template.jinja, projectors.py"):
        compare_saved_files(whole_checkpoint, again)


class Model:
    """Logits that depend on the picture by `slope`."""

    def __init__(self, slope: float, offset: float = 0.0):
        self.slope, self.offset = slope, offset

    def __call__(self, input_ids, pixel_values):
        logits = torch.ones(1, 3, 5) * self.offset
        logits[:, -1, 0] += self.slope * pixel_values.mean()
        return SimpleNamespace(logits=logits)


def test_worker_refuses_models_that_are_blind_or_not_finite():
    inputs = {"input_ids": torch.zeros(1, 3), "pixel_values": torch.zeros(1, 3, 2, 2)}
    other = torch.ones(1, 3, 2, 2)
    _, effect = fresh_worker.logits_and_picture_effect(Model(0.5), inputs, other)
    assert effect == 0.5
    with pytest.raises(fresh_worker.CheckFailed, match="does not see pictures"):
        fresh_worker.logits_and_picture_effect(Model(0.0), inputs, other)
    with pytest.raises(fresh_worker.CheckFailed, match="not finite"):
        fresh_worker.logits_and_picture_effect(Model(0.5, offset=float("nan")), inputs, other)


def test_worker_wants_bit_equal_logits_and_the_same_tokens():
    expected = {"logits": torch.randn(1, 3, 5), "tokens": torch.tensor([[1, 2]])}
    fresh_worker.require_equal(expected, expected, "before")
    nearly = {**expected, "logits": expected["logits"].clone()}
    nearly["logits"][0, 0, 0] = torch.nextafter(nearly["logits"][0, 0, 0], torch.tensor(9.0))
    with pytest.raises(fresh_worker.CheckFailed, match="Logits differ"):
        fresh_worker.require_equal(nearly, expected, "before")
    with pytest.raises(fresh_worker.CheckFailed, match="another shape"):
        fresh_worker.require_equal({**expected, "logits": torch.zeros(1, 2, 5)}, expected, "before")
    with pytest.raises(fresh_worker.CheckFailed, match="Other tokens"):
        fresh_worker.require_equal({**expected, "tokens": torch.tensor([[1, 3]])}, expected, "before")


@pytest.mark.parametrize(
    ("problem", "message"), [("unexpected_keys", "no place for them: stray"), ("missing_keys", "be random: stray")]
)
def test_worker_refuses_weights_that_do_not_fit(monkeypatch, problem, message):
    model_class = type("RemoteModel", (torch.nn.Module,), {"__module__": "transformers_modules.checkpoint.code"})
    info = {"missing_keys": set(), "unexpected_keys": set()}
    loader = SimpleNamespace(from_pretrained=lambda *_, **__: (model_class(), info))
    monkeypatch.setattr(fresh_worker.transformers, "AutoModelForCausalLM", loader)
    assert not fresh_worker.load_model("checkpoint", "AutoModelForCausalLM").training
    info[problem] = {"stray"}
    with pytest.raises(fresh_worker.CheckFailed, match=message):
        fresh_worker.load_model("checkpoint", "AutoModelForCausalLM")


def test_worker_refuses_classes_that_are_not_the_checkpoints(composed):
    with pytest.raises(fresh_worker.CheckFailed, match="anyvlm.modeling.*not the checkpoint's own code"):
        fresh_worker.require_code_of_checkpoint(composed[0], "The model")


def test_worker_counts_image_tokens_and_its_pictures_differ(composed):
    model, processor = composed
    counts = fresh_worker.image_token_counts(processor, model.config)
    assert [tuple(count[:2]) for count in counts] == list(fresh_worker.PICTURE_SIZES)
    assert {count[2] for count in counts} == {16}  # 4 x 4 patches
    first, again, other = (np.asarray(fresh_worker.picture(seed, (16, 12))) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    without_placeholder = SimpleNamespace(image_token_id=10**6)
    with pytest.raises(fresh_worker.CheckFailed, match="leaves a picture"):
        fresh_worker.image_token_counts(processor, without_placeholder)


def test_checkpoint_with_code_of_others(remote_code_checkpoint):
    check = check_in_fresh_process(remote_code_checkpoint)
    assert check.saved_again and check.picture_effect > 0
