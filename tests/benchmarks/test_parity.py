"""A composed model computes what transformers' LLaVA computes, and the benchmark would see it if it did not.

Nothing here depends on how fast anything is.
"""

import json
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import torch
import typer
from equality import Check, check_equality
from llava_pair import QUICK_SIZES, build_native, build_pair, copy_weights, make_inputs, native_name
from measure import PeakMeter, ratio_of
from typer.testing import CliRunner


SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "parity.py"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    """Toy models gain nothing from more threads, and wait for them where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pair():
    return build_pair(QUICK_SIZES, 512, torch.float32, CPU, seed=0)


def test_a_composed_model_equals_llava(pair):
    checks = check_equality(*pair, QUICK_SIZES, seed=1)
    assert len(checks) == 4
    assert [check for check in checks if not check.passed] == []


def test_llava_is_built_with_the_vocabulary_that_composing_left():
    # Smaller than the tokenizer's four tokens and the image token, so composing makes it grow.
    ours, native = build_pair(QUICK_SIZES, 3, torch.float32, CPU, seed=0)
    assert ours.config.text_config.vocab_size == native.config.text_config.vocab_size == 5
    assert native.config.image_token_id == ours.config.image_token_id == 4


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
        "multi_modal_projector.layers.1.bias",
        "language_model.model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_one_weight_that_differs_is_seen(pair, name):
    ours, native = pair
    with torch.no_grad():
        native.get_parameter(native_name(name)).view(-1)[0] += 0.5
    logits, _, loss, gradients = check_equality(ours, native, QUICK_SIZES, seed=0)
    assert not logits.passed and not loss.passed and not gradients.passed


def test_a_weight_without_counterpart_is_refused(pair):
    ours, native = pair
    native.model.register_buffer("left_over", torch.zeros(1))
    with pytest.raises(ValueError, match=r"left_over"):
        copy_weights(ours, native)
    del native.model.left_over
    ours.register_parameter("new", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(KeyError, match="new"):
        copy_weights(ours, native)


def test_all_weights_are_copied(pair):
    ours, _ = pair
    native = build_native(ours.config, torch.float32)
    assert copy_weights(ours, native) == sum(parameter.numel() for parameter in ours.parameters())


def test_inputs_are_padded_on_the_left_and_labelled_at_the_end(pair):
    ours, _ = pair
    inputs = make_inputs(ours.config, QUICK_SIZES, [2, 1], CPU, torch.float32, seed=0, answer_tokens=4)
    image_tokens = (inputs["input_ids"] == ours.config.image_token_id).sum(1).tolist()
    assert image_tokens == [2 * QUICK_SIZES.image_tokens, QUICK_SIZES.image_tokens]
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    assert padding == [0, QUICK_SIZES.image_tokens]
    assert (inputs["labels"] != -100).sum(1).tolist() == [4, 4]
    assert len(inputs["pixel_values"]) == 3


def test_ratios_are_of_pairs():
    # The machine slows down threefold half way: medians of each side alone would mix both halves.
    ratio = ratio_of([1.0, 1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0, 6.0])
    assert ratio.median == 0.5
    assert ratio.quartiles == ratio.interval == (0.5, 0.5)
    assert ratio.pairs == 5


def test_peak_memory_sees_what_is_freed_again():
    meter = PeakMeter(CPU)
    before = meter.in_use()
    meter.reset()
    torch.ones(64 * 2**20)  # 256 MiB
    assert meter.peak() - before > 200 * 2**20


def test_quick_run_writes_its_report(tmp_path):
    output = tmp_path / "parity.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--output", str(output)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(output.read_text())
    assert all(line["passed"] for line in report["equality"])
    lines = {line["name"]: line for line in report["costs"]}
    assert {"prefill", "decoding per token", "training step", "training peak memory"} <= set(lines)
    assert lines["prefill"]["target"] == 1.03 and len(lines["prefill"]["quartiles"]) == 2
    # Counted, not timed: logits only where there is a label.
    assert lines["training operations"]["ratio"] < 0.7
    assert report["environment"]["dtype"] == "float32"
    assert report["sizes"]["image_tokens"] == QUICK_SIZES.image_tokens


def test_check_exits_with_1_if_something_is_missed(monkeypatch):
    assert run_parity("--quick", "--only", "equality", "--check").exit_code == 0
    missed = [Check("logits", 1.0, 1e-5)]
    monkeypatch.setattr(parity, "check_equality", lambda *arguments: missed)
    assert run_parity("--quick", "--only", "equality").exit_code == 0
    assert run_parity("--quick", "--only", "equality", "--check").exit_code == 1


def test_bad_input_is_refused_in_words():
    result = run_parity("--hidden-size", "100")
    assert result.exit_code == 2
    assert "multiple of 64" in " ".join(result.output.split())


def run_parity(*arguments: str):
    app = typer.Typer()
    app.command()(parity.main)
    return CliRunner().invoke(app, arguments)
