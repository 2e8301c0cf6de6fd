"""The sides of the training benchmark do the same work in turn, and it would be seen if they did not."""

import json
from dataclasses import replace

import pytest
import torch
import turns
import typer
from llava_pair import QUICK_SIZES, native_name
from measure import in_fresh_process
from training_sides import Comparison, compose_for, make_samples, make_sides, peak_memory
from typer.testing import CliRunner

import anyvlm
import training


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes) -> Comparison:
    settings = {
        "name": "tiny",
        "side": "packing",
        "target": 1.0,
        "sides": ("native", "ours", "packing", "cache"),
        "sizes": QUICK_SIZES,
        "vocab_size": 1200,
        "lengths": (28, 60),
        "answer_share": 0.5,
        "frozen_tower": True,
    }
    return Comparison(**{**settings, **changes})


def run(directory, comparison, changed=None):
    """Losses and the order of turns."""
    device = torch.device("cpu")
    model, processor = compose_for(comparison, torch.float32, 0)
    samples = make_samples(comparison, processor, 4, 0)
    sides = make_sides(comparison, comparison.sides, model, processor, samples, device, str(directory))
    if changed:
        changed(sides)
    order = []
    for side in sides:
        side.model.register_forward_pre_hook(lambda *_, name=side.name: order.append(name))
    trainers = [side.trainer(samples, 2, comparison.sizes, device) for side in sides]
    order.clear()  # packing is tried before
    seconds = turns.Turns(trainers, iter(range(1000)).__next__, lambda: None).run()
    return [turns.losses(trainer) for trainer in trainers], order, seconds, samples, processor


def test_all_four_have_equal_losses_and_take_turns(tmp_path):
    losses, order, seconds, samples, processor = run(tmp_path, tiny())
    assert order == ["native", "ours", "packing", "cache"] * 4
    assert all(len(found) == 4 for found in losses + seconds)
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=1e-5)
    lengths = {anyvlm.AnyVlmDataCollator(processor)([one])["input_ids"].shape[1] for one in samples}
    assert len(lengths) > 1 and min(lengths) >= 28 and max(lengths) <= 60


def test_one_weight_that_differs_is_seen(tmp_path):
    def change(sides):
        with torch.no_grad():
            name = native_name("language_model.model.layers.1.mlp.up_proj.weight")
            sides[0].model.get_parameter(name).view(-1)[:64] += 0.5

    losses, *_ = run(tmp_path, tiny(sides=("native", "ours")), change)
    assert abs(losses[0][0] - losses[1][0]) > 1e-5


def test_a_side_that_fails_stops_the_others(tmp_path):
    def break_it(sides):
        sides[1].collator.max_length = 3

    with pytest.raises(ValueError, match="max_length=3"):
        run(tmp_path, tiny(sides=("native", "ours")), break_it)


def test_quick_run_writes_its_report(tmp_path):
    output, table = tmp_path / "training.json", tmp_path / "training.md"
    app = typer.Typer()
    app.command()(training.main)
    arguments = ["--quick", "--no-memory", "--only", "frozen", "--output", str(output), "--markdown", str(table)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())["comparisons"]["frozen"]
    assert found["equal_losses"] and found["target"] == 0.35
    sides = found["sides"]
    assert list(sides) == ["native", "ours", "cache"]
    assert all(len(line["seconds"]) == 2 for line in sides.values())
    assert sides["cache"]["bytes_on_disk"] > 4 * 4 * 64 * 4  # 4 pictures of 2 x 2 features of width 64
    assert len(table.read_text().splitlines()) == 2 + 3


def test_peak_memory_is_of_a_step():
    """Adam's two moments are there before the second step; its gradients and activations are not."""
    comparison = tiny(sizes=replace(QUICK_SIZES, hidden_size=128), vocab_size=40_000)
    memory = in_fresh_process(peak_memory, comparison, "ours", torch.float32, torch.device("cpu"), 0, 1)
    weights = 4 * 40_000 * 128  # the embeddings, by far the most of them
    assert memory.before - memory.libraries > 2.8 * weights
    assert memory.increment > 0.9 * weights
