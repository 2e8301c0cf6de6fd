"""Text without pictures among the samples, so that the language model does not forget it.

Replay of what was learnt before is the oldest remedy for forgetting (Robins 1995); VLMs see conversations without pictures
for the same reason (LLaVA-1.5 has those of ShareGPT among its samples).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin


#: Under this key a sample has texts that are for `TextKLObjective` alone.
BESIDE = "texts_beside"


def mix_text_replay(dataset: Any, texts: Sequence | Any, share: float = 0.2, seed: int = 0) -> Any:
    """The data set with text among its samples, such that `share` of all samples are text.

    Each sample comes as often as before; texts are repeated, or left out, to make the share.

    Args:
        dataset: Samples with pictures: anything with a length and indices (torch's, `datasets.Dataset`), or an
            `IterableDataset` of `datasets` or torch.
        texts: The same kinds, or a list; of strings, of `{"text": …}`, or of `{"messages": […]}` without pictures. Plain
            text is supervised whole (see `AnyVlmDataCollator`). Cut long ones with `cut_texts`.
        share: Of the mixture; between 0 and 1.
        seed: Of the order of the texts.

    Raises:
        ValueError: `share` is not between 0 and 1, or there are no texts.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}: the share of text among all samples is between 0 and 1, such as 0.2.")
    if len(texts) == 0:
        raise ValueError("Text replay needs texts. Pass texts like those that the language model was made for.")
    if isinstance(dataset, torch.utils.data.IterableDataset):  # those of `datasets` are, too
        return _StreamWithText(dataset, texts, share, seed)
    return _WithText(dataset, texts, share, seed)


def put_texts_beside(dataset: Any, texts: Sequence | Any, per_sample: float = 0.5, seed: int = 0) -> Any:
    """The data set with texts beside its samples, for `TextKLObjective` alone: the language model's loss is not about them.

    With `mix_text_replay` it is, which is right where the texts say more than the language model knows. On its own words
    that loss has an expected gradient of zero and is noise, which an optimiser such as Adam makes steps of.

    Args:
        dataset: Samples with pictures: anything with a length and indices.
        texts: As for `mix_text_replay`.
        per_sample: Texts for each sample; 0.5 puts one beside every second.
        seed: Of the order of the texts.

    Raises:
        ValueError: `per_sample` is not positive, or there are no texts.
    """
    if per_sample <= 0:
        raise ValueError(f"per_sample={per_sample}: the number of texts for each sample is positive, such as 0.5.")
    if len(texts) == 0:
        raise ValueError("There are no texts. Pass texts like those that the language model was made for.")
    return _TextsBeside(dataset, texts, per_sample, seed)


def cut_texts(
    texts: Sequence[str], processing_class: ProcessorMixin | PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """Texts cut into pieces that a sample has room for, as samples; only the last piece of a text has an end.

    Args:
        max_length: Most tokens of a piece as a sample, beginning and end of the text included.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    # Room for the tokens that begin and end a text, and for words that are split otherwise where a text begins.
    room = max_length - tokenizer.num_special_tokens_to_add() - 2
    if room < 1:
        raise ValueError(f"max_length={max_length} leaves no room for text.")
    pieces = []
    for text in texts:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        starts = [offsets[i][0] for i in range(0, len(offsets), room)] + [len(text)]
        pieces += [
            {"text": text[start:end], "complete": end == len(text)}
            for start, end in zip(starts, starts[1:])
            if text[start:end].strip()
        ]
    return pieces


def as_sample(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """A text as a sample of the collator."""
    return {"text": text} if isinstance(text, str) else dict(text)


class _Texts:
    """Texts in an order that is another in each round through them."""

    def __init__(self, texts: Sequence, seed: int):
        self.texts, self.seed = texts, seed
        self._round, self._order = -1, []

    def __getitem__(self, number: int) -> dict[str, Any]:
        round_, place = divmod(number, len(self.texts))
        if round_ != self._round:
            generator = torch.Generator().manual_seed(self.seed + round_)
            self._round, self._order = round_, torch.randperm(len(self.texts), generator=generator).tolist()
        return as_sample(self.texts[self._order[place]])


class _WithText(torch.utils.data.Dataset):
    """All samples, then the texts; the trainer's sampler shuffles them."""

    def __init__(self, dataset: Any, texts: Sequence, share: float, seed: int):
        self.dataset, self.texts = dataset, _Texts(texts, seed)
        self.number = max(round(len(dataset) * share / (1 - share)), 1)

    def __len__(self) -> int:
        return len(self.dataset) + self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        own = len(self.dataset)
        return self.dataset[index] if index < own else self.texts[index - own]


class _TextsBeside(torch.utils.data.Dataset):
    """The samples, some with texts under `BESIDE`; always the same ones, so that a resumed run sees what it would have."""

    def __init__(self, dataset: Any, texts: Sequence, per_sample: float, seed: int):
        self.dataset, self.texts, self.per_sample = dataset, _Texts(texts, seed), per_sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, end = int(index * self.per_sample), int((index + 1) * self.per_sample)
        return {**self.dataset[index], BESIDE: [self.texts[number] for number in range(first, end)]}


class _StreamWithText(torch.utils.data.IterableDataset):
    """After each sample as many texts as keep the share."""

    def __init__(self, dataset: Iterable, texts: Sequence, share: float, seed: int):
        self.dataset, self.texts, self.ratio = dataset, _Texts(texts, seed), share / (1 - share)

    def __iter__(self):
        given = 0
        for number, sample in enumerate(self.dataset, 1):
            yield sample
            while given + 1 <= number * self.ratio:
                yield self.texts[given]
                given += 1

    def set_epoch(self, epoch: int) -> None:
        """Handed on to a data set that shuffles its stream."""
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
