"""Perplexity is that of the bare language model; what a training did to it is logged, kept, and warned about."""

import math

import pytest
import torch
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoModelForCausalLM, TrainingArguments

import anyvlm
from anyvlm.training.forgetting import ForgettingCallback, text_perplexity


TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w8 w9", "w10", "w20 w21 w22 w23 w24"]


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(text_config("llama")).eval()


def mean_loss(model, texts) -> float:
    """Over all tokens of all texts, each read alone, by transformers' own loss."""
    tokenizer, losses, counts = tiny_tokenizer(), [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] > 1:
            with torch.no_grad():
                losses.append(float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1))
            counts.append(ids.shape[1] - 1)
    return sum(losses) / sum(counts)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_is_exp_of_transformers_mean_loss(language_model, batch_size):
    expected = math.exp(mean_loss(language_model, TEXTS))
    assert text_perplexity(language_model, tiny_tokenizer(), TEXTS, batch_size) == pytest.approx(expected, rel=1e-5)


def test_composed_model_is_measured_as_its_language_model():
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    model.train()
    expected = text_perplexity(model.language_model, processor.tokenizer, TEXTS)
    assert text_perplexity(model, processor, TEXTS) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_windows_count_each_token_once(language_model):
    """By hand, for windows of 4 tokens that move by 2: what each of the 7 tokens is predicted from."""
    ids = tiny_tokenizer()(TEXTS[0], return_tensors="pt").input_ids
    contexts = {1: 0, 2: 0, 3: 0, 4: 2, 5: 2, 6: 4}  # token -> where its window begins
    losses = []
    for token, begin in contexts.items():
        with torch.no_grad():
            logits = language_model(input_ids=ids[:, begin:token]).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[0, token]]))
    measured = text_perplexity(language_model, tiny_tokenizer(), TEXTS[:1], max_length=4, stride=2)
    assert measured == pytest.approx(math.exp(sum(losses) / 6), rel=1e-5)


def test_nothing_to_measure_is_refused(language_model):
    with pytest.raises(ValueError, match="at least two tokens"):
        text_perplexity(language_model, tiny_tokenizer(), ["w1"])
    with pytest.raises(ValueError, match="stride=9"):
        text_perplexity(language_model, tiny_tokenizer(), TEXTS, max_length=8, stride=9)
    with pytest.raises(ValueError, match="Nothing is taken by default"):
        ForgettingCallback(None, [])


def new_trainer(directory, texts=("w40 w41 w42",), **arguments):
    torch.manual_seed(0)
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    settings = {"max_steps": 6, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return anyvlm.AnyVlmTrainer(
        model=model,
        args=TrainingArguments(directory, remove_unused_columns=False, save_steps=3, **{**settings, **arguments}),
        train_dataset=[{"text": text} for text in texts] * 8,
        data_collator=anyvlm.AnyVlmDataCollator(processor),
        processing_class=processor,
    )


def test_logged_kept_and_warned_about(tmp_path):
    trainer = new_trainer(tmp_path / "a")
    before = text_perplexity(trainer.model, trainer.processing_class, TEXTS)
    callback = ForgettingCallback(trainer, TEXTS, every_n_steps=4)
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match="the language model forgets.*LoRA"):
        trainer.train()
    logged = [
        (entry["step"], entry["text_perplexity"]) for entry in trainer.state.log_history if "text_perplexity" in entry
    ]
    assert callback.result.history == logged
    assert [step for step, _ in logged] == [0, 4, 6]
    assert callback.result.before == pytest.approx(before, rel=1e-6)
    after = text_perplexity(trainer.model, trainer.processing_class, TEXTS)
    assert callback.result.after == pytest.approx(after, rel=1e-6)
    assert callback.result.change == pytest.approx(after / before - 1, rel=1e-5)
    # A resumed training knows what it was before the first step.
    resumed = new_trainer(tmp_path / "a")
    again = ForgettingCallback(resumed, TEXTS, warn_above=None)
    resumed.add_callback(again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.result.before == callback.result.before
    assert again.result.after == pytest.approx(after, rel=1e-5)


def test_nothing_forgotten_is_not_warned_about(tmp_path, recwarn):
    trainer = new_trainer(tmp_path, learning_rate=0.0)
    callback = ForgettingCallback(trainer, TEXTS)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.result.change == 0
    assert not [warning for warning in recwarn if "forgets" in str(warning.message)]
