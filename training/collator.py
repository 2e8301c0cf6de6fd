"""Batches for `Trainer` from conversations with pictures and videos; only the assistant's words are supervised."""

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .objectives.base import OBJECTIVE_INPUTS, Objective
from .packing import pack


if TYPE_CHECKING:
    from .feature_cache import FeatureCache


@dataclass
class AnyVlmDataCollator:
    """Turn samples into a batch with labels.

    A sample is a dict with `messages`, as in TRL and `datasets`: a list of `{"role": …, "content": …}` whose content
    is a string, or a list of `{"type": "text", "text": …}` and `{"type": "image"}`; pictures stand in the content
    (`{"type": "image", "image": …}`) or in order in the sample's `images`. A sample whose messages place no picture
    has its `images` put in front of the first user message. Likewise for `video` and `videos`; a video in a sample is one
    of the forms that `processor` takes, and a sample with one video has it in a list. A list of samples is as good as a
    sample: they come into one batch together.

    Or it has `text` and no `messages`: plain text, as a language model without a chat template was trained on. All of it is
    supervised, and its end, unless `complete` is `False`. Samples of both kinds can be in one batch.

    Args:
        processor: The model's processor.
        max_length: Most tokens a sample may have, image tokens included; longer ones raise. A sample cut off inside a
            picture or an answer would be another sample.
        padding_side: `"right"` or `"left"`.
        objectives: Losses beside the language model's, by name, as `AnyVlmTrainer` takes them; what they need of a sample
            goes into the batch under `objective_inputs`.
        packing: Put the samples of a batch one after another in one row, without padding, see `training/packing.py`. Call
            `enable_packing` first: not every language model keeps them apart.
        feature_cache: Features of a frozen tower; pictures that are in it go into the batch as these (`tower_features`).

    Raises:
        ValueError: no token of the batch is supervised; a sample is too long; the chat template does not show where
            the assistant's words are.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    padding_side: str = "right"
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    packing: bool = False
    feature_cache: "FeatureCache | None" = None

    def __call__(self, samples: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        samples = single_samples(samples)
        batch = self.unpacked(samples)
        inputs = {
            name: objective.collate(samples, batch, self.processor) for name, objective in self.objectives.items()
        }
        if self.packing:
            batch = pack(batch)
        if any(inputs.values()):
            batch[OBJECTIVE_INPUTS] = {name: tensors for name, tensors in inputs.items() if tensors}
        return batch

    def unpacked(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The model's inputs, one sample in each row, padded."""
        texts, spans, pictures, videos = [], [], [], []
        bos = self.processor.tokenizer.bos_token
        is_plain = [sample.get("messages") is None for sample in samples]
        for sample, plain in zip(samples, is_plain):
            if plain:
                text = plain_text(sample, self.processor)
                texts.append(text)
                spans.append([(0, len(text))])
                pictures.append([])
                videos.append([])
                continue
            messages, of_sample = place_media(sample)
            text, assistant_spans = render_with_assistant_spans(self.processor, messages)
            if self.processor.complete_prompt(text) != text:
                raise ValueError(
                    f"This model's prompts have {self.processor.prompt_form['after_images']!r} behind the pictures, and the "
                    "chat template does not write it, so the processor would, after the answer. Set a "
                    "processor.chat_template that does."
                )
            texts.append(text)
            spans.append(assistant_spans)
            pictures.append(
                of_sample["image"] if self.feature_cache is None else self.feature_cache.seen(of_sample["image"])
            )
            videos.append(of_sample["video"])
        # A projector that reads the text beside the picture must not read the answer.
        prompts = [text[: parts[0][0] if parts else None] for text, parts in zip(texts, spans)]
        reads = self.processor.qformer_tokenizer is not None
        # A chat template that writes the beginning does so for conversations only.
        written = any(bos and text.startswith(bos) for text, plain in zip(texts, is_plain) if not plain)
        if written:
            for row, plain in enumerate(is_plain):
                if plain:
                    texts[row], spans[row] = bos + texts[row], [(len(bos), len(bos) + len(texts[row]))]
        batch = self.processor(
            text=texts,
            images=pictures if any(pictures) else None,
            videos=videos if any(videos) else None,
            add_special_tokens=not written,
            padding=True,
            padding_side=self.padding_side,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **({"instruction": prompts} if reads else {}),
        )
        offsets = batch.pop("offset_mapping")
        replacements = batch.pop("text_replacement_offsets", None) or [[] for _ in samples]
        labels = torch.full_like(batch["input_ids"], -100)
        for row, sample_spans in enumerate(spans):
            supervised = _tokens_in_spans(offsets[row], _after_expansion(sample_spans, replacements[row]))
            labels[row, supervised] = batch["input_ids"][row, supervised]
            if is_plain[row]:  # nothing predicts the first token, and padding before it must not learn to
                labels[row, int(batch["attention_mask"][row].argmax())] = -100
        self._check(batch, labels)
        batch["labels"] = labels
        return dict(batch)

    def _check(self, batch: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        lengths = batch["attention_mask"].sum(1)
        if self.max_length is not None and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"Sample {int(lengths.argmax())} of the batch has {int(lengths.max())} tokens, more than max_length="
                f"{self.max_length}. Shorten its text or raise max_length."
            )
        if not bool((labels[:, 1:] != -100).any()):
            raise ValueError(
                "No token of this batch is supervised. Each sample needs a message of role 'assistant' with some text; "
                "check the names of the roles, and that the chat template renders them."
            )


def plain_text(sample: Mapping[str, Any], processor: ProcessorMixin) -> str:
    """The text with its end."""
    if not isinstance(sample.get("text"), str):
        raise ValueError(f"A sample has neither messages nor text, only {', '.join(sample) or 'nothing'}.")
    if sample.get("images") or sample.get("videos"):
        raise ValueError("A sample of plain text has no pictures or videos: write `messages` for those.")
    if processor.prompt_form is not None:
        raise ValueError(
            f"This model's texts all have the form {processor.prompt_form}, which plain text has not. Write `messages`."
        )
    ends = sample.get("complete") is not False
    return sample["text"] + (processor.tokenizer.eos_token or "" if ends else "")


#: What stands for it in a text -> the keys of a content block that hold it, and what a message calls it.
_MEDIA = {
    "image": ("<image>", ("image", "url", "path"), "pictures"),
    "video": ("<video>", ("video", "url", "path"), "videos"),
}


def single_samples(samples: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The samples, and those that are in a list among them."""
    return [one for given in samples for one in ([given] if isinstance(given, Mapping) else given)]


def place_media(sample: Mapping[str, Any]) -> tuple[list[dict], dict[str, list]]:
    """A sample's messages with a content block or placeholder for each picture and video; and those, by kind, in order."""
    messages = [dict(message) for message in sample["messages"]]
    found = {kind: _inline(messages, kind) for kind in _MEDIA}
    for kind, (_, _, name) in _MEDIA.items():
        given = sample.get(f"{kind}s")
        given = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
        if found[kind] and given:
            raise ValueError(f"A sample has {name} both in its messages and in `{kind}s`. Put them in one place.")
        if given and not any(_places(message.get("content"), kind) for message in messages):
            for message in messages:
                if message["role"] == "user":
                    content = message["content"]
                    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
                    message["content"] = [*[{"type": kind} for _ in given], *blocks]
                    break
        found[kind] = found[kind] or given
    return messages, found


def _inline(messages: list[dict], kind: str) -> list:
    return [
        block[key]
        for message in messages
        if isinstance(message.get("content"), (list, tuple))
        for block in message["content"]
        if block.get("type") == kind
        for key in _MEDIA[kind][1]
        if block.get(key) is not None
    ]


def _places(content: Any, kind: str) -> bool:
    if isinstance(content, str):
        return _MEDIA[kind][0] in content
    return any(block.get("type") == kind for block in content or [])


def render_with_assistant_spans(processor: ProcessorMixin, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; returns the text and the `(start, end)` characters of the assistant's words.

    A template that marks them with `{% generation %}` is believed. From any other, each assistant message is what its
    rendering adds to the rendering of all before it with the generation prompt, end of turn included.

    Raises:
        ValueError: an earlier part of the conversation is rendered differently once a message follows it, so that the
            assistant's words cannot be found.
    """
    template = processor.chat_template
    variables = processor.tokenizer.special_tokens_map

    def render(part: list[dict], add_generation_prompt: bool = False) -> str:
        rendered, _ = render_jinja_template(
            conversations=[part], chat_template=template, add_generation_prompt=add_generation_prompt, **variables
        )
        return rendered[0]

    if re.search(r"\{\%-?\s*generation\s*-?\%\}", template):
        rendered, marked = render_jinja_template(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **variables
        )
        return rendered[0], [tuple(span) for span in marked[0]]

    text = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], add_generation_prompt=True)
        after = render(messages[: index + 1]) if index + 1 < len(messages) else text
        if not (text.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"The chat template renders the conversation up to message {index} differently when more messages "
                "follow, so the assistant's words cannot be told from the rest. Mark them in the template with "
                "{% generation %} … {% endgeneration %} and set processor.chat_template."
            )
        spans.append((len(before), len(after)))
    return text, spans


def _after_expansion(spans: list[tuple[int, int]], replacements: list[dict]) -> list[tuple[int, int]]:
    """Where spans of the rendered text are after each image token was repeated."""
    ends = [replacement["span"][1] for replacement in replacements]
    gained = [0] + [replacement["new_span"][1] - replacement["span"][1] for replacement in replacements]
    return [tuple(char + gained[bisect.bisect_right(ends, char)] for char in span) for span in spans]


def _tokens_in_spans(offsets: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """Boolean `(sequence,)`: tokens that overlap a span. Tokens without characters (padding, added ones) never do."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in spans:
        inside |= (starts < end) & (ends > start) & (ends > starts)
    return inside
