"""Text has the share that was asked for, every sample stays, and cut texts lose nothing."""

from collections import Counter

import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.training.objectives.text_kl import TextKLObjective
from anyvlm.training.text_replay import BESIDE, cut_texts, mix_text_replay, put_texts_beside


SAMPLES = [
    {
        "messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": f"w{index}"}],
        "images": [picture(index)],
    }
    for index in range(12)
]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


@pytest.mark.parametrize("dataset", [SAMPLES, Stream()], ids=["list", "stream"])
def test_share_of_text_and_every_sample_once(dataset):
    mixed = list(mix_text_replay(dataset, ["w1 w2", "w3 w4", {"text": "w6 w7"}], share=0.25))
    texts = Counter(sample["text"] for sample in mixed if "text" in sample)
    assert [sample for sample in mixed if "text" not in sample] == SAMPLES
    assert texts.keys() == {"w1 w2", "w3 w4", "w6 w7"}
    assert sorted(texts.values()) == [1, 1, 2]  # 4 of 16


def test_tables_of_datasets():
    datasets = pytest.importorskip("datasets", reason="datasets is in the [train] extra")
    rows = datasets.Dataset.from_list([{key: sample[key] for key in ("messages",)} for sample in SAMPLES])
    texts = datasets.Dataset.from_dict({"text": ["w1 w2", "w3 w4"]})
    mixed = mix_text_replay(rows, texts, share=0.5)
    assert len(mixed) == 24
    assert Counter(row["text"] for row in mixed if "text" in row) == {"w1 w2": 6, "w3 w4": 6}
    streamed = list(mix_text_replay(rows.to_iterable_dataset(), texts, share=0.5))
    assert ["text" in row for row in streamed] == [False, True] * 12


def test_batches_with_and_without_pictures_have_the_losses_of_each_alone():
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    collator = anyvlm.AnyVlmDataCollator(processor)
    mixed = mix_text_replay(SAMPLES[:3], ["w30 w31 w32", "w33 w34"], share=0.4)
    assert len(mixed) == 5
    with torch.no_grad():
        batches = [collator([sample]) for sample in mixed]
        counts = [int((batch["labels"] != -100).sum()) for batch in batches]
        alone = sum(float(model(**batch).loss) * count for batch, count in zip(batches, counts)) / sum(counts)
        assert float(model(**collator(list(mixed))).loss) == pytest.approx(alone, abs=1e-5)


def test_cut_texts_fit_and_lose_nothing():
    text = " ".join(f"w{index}" for index in range(50))
    _, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    pieces = cut_texts([text, "w1"], processor, max_length=16)
    assert "".join(piece["text"] for piece in pieces) == text + "w1"
    batch = anyvlm.AnyVlmDataCollator(processor, max_length=16)(pieces)
    assert int((batch["labels"] == processor.tokenizer.eos_token_id).sum()) == 2  # of two texts


def test_shares_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="share=1.5"):
        mix_text_replay(SAMPLES, ["w1 w2"], share=1.5)
    with pytest.raises(ValueError, match="needs texts"):
        mix_text_replay(SAMPLES, [])


@pytest.mark.parametrize("per_sample, number", [(0.5, 6), (0.4, 4), (2, 24)])
def test_texts_beside_samples(per_sample, number):
    """As many as asked for, each text before any comes twice, the samples as they were, and the same at every look."""
    texts = [f"w{index}" for index in range(number)]
    dataset = put_texts_beside(SAMPLES, texts, per_sample)
    assert len(dataset) == len(SAMPLES)
    looks = [[dataset[index] for index in order] for order in (range(12), reversed(range(12)))]
    beside = [sample.pop(BESIDE) for sample in looks[0]]
    assert sorted(text["text"] for texts in beside for text in texts) == sorted(texts)
    assert looks[0] == SAMPLES
    assert [sample[BESIDE] for sample in looks[1]] == beside[::-1]


def test_texts_beside_are_no_row_of_the_batch():
    """Only an objective reads them."""
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
    )
    objective = TextKLObjective(model)
    collator = anyvlm.AnyVlmDataCollator(processor, objectives={"text_kl": objective})
    texts = [{"text": "w1 w2 w3"}, {"text": "w4 w5", "complete": False}]
    batch = collator([put_texts_beside(SAMPLES, texts, 1)[index] for index in (0, 1)])
    extra = batch.pop("objective_inputs")["text_kl"]
    plain = anyvlm.AnyVlmDataCollator(processor)
    assert all(torch.equal(value, batch[key]) for key, value in plain(SAMPLES[:2]).items())
    assert sorted(map(tuple, extra["input_ids"].tolist())) == sorted(map(tuple, plain(texts)["input_ids"].tolist()))


@pytest.mark.parametrize("texts, per_sample, message", [([], 1, "no texts"), (["w1"], 0, "positive")])
def test_no_texts_beside(texts, per_sample, message):
    with pytest.raises(ValueError, match=message):
        put_texts_beside(SAMPLES, texts, per_sample)
