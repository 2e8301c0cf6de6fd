"""The parts of `examples/swap_language_model.py` and of its language model that need no trained models."""

import random
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


#: Written as WordNet's are: a header, a thing, an animal, two more things, and one whose explanation is too short.
NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE
03472535 06 n 02 gym_shoe 0 sneaker 0 001 @ 04199027 n 0000 | a canvas shoe with a pliable sole
02084071 05 n 01 dog 0 001 @ 02083346 n 0000 | a member of the genus Canis that has been domesticated
04115456 06 n 02 pair 0 brace 0 001 @ 00002684 n 0000 | two items of the same kind; "a pair of boots"
02769748 06 n 01 bag 0 001 @ 03094503 n 0000 | a flexible container with a single opening; "a bag of rice"
04021798 06 n 01 thing 0 001 @ 00002684 n 0000 | an object
"""


@pytest.fixture(scope="module")
def examples():
    folder = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, folder)
    try:
        import dictionary_language_model
        import swap_language_model

        yield dictionary_language_model, swap_language_model
    finally:
        sys.path.remove(folder)


def test_the_dictionary_has_things_with_short_explanations(examples, tmp_path):
    (tmp_path / "data.noun").write_text(NOUNS, "latin-1")
    entries = dict(examples[0].entries(tmp_path / "data.noun"))
    # Every second entry, and those that pictures of clothes need.
    assert entries == {
        "sneaker": "a canvas shoe with a pliable sole",
        "bag": "a flexible container with a single opening",
    }
    said = {examples[0].conversation(("bag", "a container"), random.Random(seed)) for seed in range(40)}
    assert len(said) == 4 and all(one.endswith("<|end|>") for one in said)


def test_the_language_model_is_trained_once_and_loads(examples, tmp_path):
    (tmp_path / "data.noun").write_text(NOUNS, "latin-1")
    folder = tmp_path / "model"
    examples[0].train(folder, tmp_path, tmp_path, steps=2)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    examples[0].train(folder, tmp_path, tmp_path, steps=2)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "bag"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|user|>bag<|end|><|assistant|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and ids.count(tokenizer.eos_token_id) == 1
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_table_compares_the_starts(examples):
    class Run:
        pictures, test, seconds = 100, 50, 90.0

    def start(after, losses):
        steps = [[10 * step, loss, 2.0 * step] for step, loss in enumerate(losses)]
        report = {
            "steps": 10 * (len(losses) - 1),
            "agreement": {"after": 0.9},
            "held_out_loss": {"started": losses[0], "after": min(losses)},
            "held_out_losses": steps,
        }
        return {"at_once": 0.0, "after": after, "shuffled": 0.1, "text_difference": 0.0, "report": report}

    starts = {
        "random": start(0.6, [4, 2, 1]),
        "kept": start(0.72, [3, 1, 0.5]),
        "closed_form": start(0.7, [2, 0.8, 0.6]),
    }
    text = examples[1].table([{"old": 0.8, "shuffled": 0.1, "starts": starts}], Run)
    assert "90.0 % (lowest 90.0 %)" in text and "75.0 % (lowest 75.0 %)" in text
    # The loss that all reach is 1: the random start after 20 steps, the others after 10.
    rows = [line.split("|")[-3:-1] for line in text.splitlines() if line.startswith(("| new", "| first"))][-3:]
    assert [[cell.strip() for cell in row] for row in rows] == [["20", "4"], ["10", "2"], ["10", "2"]]
