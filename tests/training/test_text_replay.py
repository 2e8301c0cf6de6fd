"""Text has the share that was asked for, every sample stays, and cut texts lose nothing."""

from collections import Counter

import pytest
import torch
from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm
from anyvlm.training.text_replay import cut_texts, mix_text_replay


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
