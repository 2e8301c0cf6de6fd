"""The retrieval benchmark runs, and its scores are those of the model on each pair alone."""

import json

import pytest
import retrieval
import torch
from retrieval_scores import language_model_scores, recall_at_1
from typer.testing import CliRunner

import anyvlm
from anyvlm.compatibility import tiny_configs


def test_recall_is_the_mean_of_both_directions():
    scores = torch.tensor([[3.0, 1.0, 0.0], [4.0, 5.0, 0.0], [0.0, 9.0, 2.0]])
    # Pictures find captions 0, 1, 1; captions find pictures 1, 2, 2.
    assert recall_at_1(scores) == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)


def test_likelihoods_and_the_loss_are_the_models():
    train, test = retrieval.drawn_data(5)
    tokenizer = retrieval.word_tokenizer([name for name, _ in train])
    model, processor = retrieval.compose(tiny_configs.vision_config("clip_vision_model"), tokenizer, 32, 32, seed=0)
    model.eval()
    samples = [retrieval.sample(*named) for named in test]
    collator = anyvlm.AnyVlmDataCollator(processor)
    batch = collator(samples)
    scores, loss = language_model_scores(model, processor, batch, [name for name, _ in test])
    with torch.no_grad():
        assert loss == pytest.approx(model(**batch).loss.item(), abs=1e-5)
        pair = collator([retrieval.sample(test[3][0], test[1][1])])
        tokens = int((pair["labels"] != -100).sum())
        assert scores["likelihood"][1, 3].item() == pytest.approx(-model(**pair).loss.item() * tokens, abs=1e-4)


def test_runs_and_writes_its_figures(tmp_path):
    cli = retrieval.typer.Typer()
    cli.command()(retrieval.main)
    result = CliRunner().invoke(cli, ["--quick", "--output", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["arm"] for run in found["runs"]] == list(retrieval.ARMS)
    alone, joint = (arm["recall"] for arm in found["arms"].values())
    assert set(joint) - set(alone) == {"contrastive", "contrastive, ranked again by matching"}
    assert found["gain"] == pytest.approx(max(joint.values()) - max(alone.values()))
