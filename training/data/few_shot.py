"""Prompts with examples: pictures and their answers before the question, as in Flamingo (Alayrac et al. 2022).

An example is a sample as any other, `{"messages", "images"}`, so this works with every model whose chat template places
several pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..collator import place_media
from .conversations import blocks


#: How examples are chosen.
CHOICES = ("random", "classes", "nearest")


class FewShot:
    """Puts examples in front of samples; all of their answers are supervised, as they are in the samples they come from.

    Args:
        examples: Samples with answers; a sample is never its own example.
        shots: How many; a pair is the least and the most, so that the model learns to do with any number between.
        choose: `"random"`; `"classes"`, as evenly as `shots` allows, one of each class by the column `label`; or
            `"nearest"`, whose pictures look most like the sample's, the nearest last, next to the question (Alayrac et al.
            2022, RICES).
        label: Column of the class.
        features: For `"nearest"`: `(examples, width)`, of the first picture of each (`picture_features`).
        features_of: For `"nearest"`: gives a sample's, `(width,)`.
        seed: Of the choice, with what a sample's key says.

    Raises:
        ValueError: no examples, or fewer than shots; what `choose` needs is not there.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        shots: int | tuple[int, int] = (0, 4),
        choose: str = "random",
        label: str = "label",
        features: torch.Tensor | None = None,
        features_of: Callable[[Mapping[str, Any]], torch.Tensor] | None = None,
        seed: int = 0,
    ):
        self.examples = [dict(example) for example in examples]
        self.least, self.most = (shots, shots) if isinstance(shots, int) else shots
        self.choose, self.label, self.seed = choose, label, seed
        self.features, self.features_of = features, features_of
        if choose not in CHOICES:
            raise ValueError(f"few-shot examples are chosen by {', '.join(CHOICES)}, not {choose!r}.")
        if not 0 <= self.least <= self.most:
            raise ValueError(f"shots={shots}: a number, or the least and the most of them.")
        if len(self.examples) <= self.most:
            raise ValueError(
                f"There are {len(self.examples)} examples, and up to {self.most} shots need one more: no "
                "sample is its own example."
            )
        if choose == "classes" and any(example.get(label) is None for example in self.examples):
            raise ValueError(f"One example of each class needs the column {label!r} in all of them.")
        if choose == "nearest" and (features is None or features_of is None or len(features) != len(self.examples)):
            raise ValueError("Nearest examples need features, one row for each example, and features_of a sample.")

    def __call__(self, sample: Mapping[str, Any], key: Sequence[int] = ()) -> dict[str, Any]:
        """The sample with examples before its messages; the same for the same key.

        Args:
            key: Whole numbers, such as seed, epoch, index of the sample.
        """
        random = np.random.default_rng([self.seed, *(int(number) for number in key)])
        shots = int(random.integers(self.least, self.most + 1))
        chosen = self._choose(sample, shots, random)
        if not chosen or sample.get("messages") is None:  # plain text
            return dict(sample)
        messages, images = _joined([self.examples[index] for index in chosen], sample)
        return {**sample, "messages": messages, "images": images}

    def _choose(self, sample: Mapping[str, Any], shots: int, random: np.random.Generator) -> list[int]:
        others = [index for index, example in enumerate(self.examples) if not _is_same(example, sample)]
        if shots == 0:
            return []
        if self.choose == "nearest":
            return nearest_examples(self.features[others], self.features_of(sample), shots, others)
        order = [others[place] for place in random.permutation(len(others))]
        if self.choose == "random":
            return order[:shots]
        # Round after round one of each class, in an order that is drawn.
        rounds: dict[Any, int] = {}
        turn = {}
        for index in order:
            name = self.examples[index][self.label]
            turn[index] = rounds[name] = rounds.get(name, -1) + 1
        chosen = sorted(order, key=turn.__getitem__)[:shots]
        return [chosen[place] for place in random.permutation(len(chosen))]


def nearest_examples(
    features: torch.Tensor, query: torch.Tensor, shots: int, names: Sequence[int] | None = None
) -> list[int]:
    """The examples whose features have the largest cosine with `query`, the nearest last.

    Args:
        features: `(examples, width)`.
        query: `(width,)`.
        names: What to call the examples. Default: their numbers.
    """
    similarity = torch.nn.functional.cosine_similarity(features.float(), query.float()[None], dim=-1)
    found = similarity.topk(min(shots, len(features))).indices.flip(0).tolist()
    return found if names is None else [names[index] for index in found]


def few_shot_messages(
    examples: Sequence[Mapping[str, Any]], question: str, image: Any | Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """What to ask a model: examples with their answers, then a question. The pictures are in the messages.

    ```python
    messages = few_shot_messages(examples, "Which fruit is this?", "unknown.jpg")
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ```

    Args:
        examples: Samples `{"messages", "images"}`, in the order they are to have.
        image: Of the question: a picture, several, or none.
    """
    images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    asked = {"messages": [{"role": "user", "content": blocks(question, *["image"] * len(images))}], "images": images}
    messages, images = _joined(examples, asked)
    pictures = iter(images)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": _openable(next(pictures))} if block["type"] == "image" else block
                for block in message["content"]
            ],
        }
        for message in messages
    ]


@torch.no_grad()
def picture_features(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: Sequence[Any], batch_size: int = 16
) -> torch.Tensor:
    """`(pictures, hidden_size)` in fp32 on the CPU: the mean of the tower's features over each picture."""
    from ..objectives.picture_features import composed_model, pooled_features, view_features, views_of_pictures

    composed = composed_model(model)
    was_training, found = composed.training, []
    composed.eval()
    for start in range(0, len(pictures), batch_size):
        some = [[picture] for picture in pictures[start : start + batch_size]]
        texts = [processor.image_token] * len(some)
        batch = processor(text=texts, images=some, padding=True, return_tensors="pt").to(composed.device)
        names = [name for name in batch if name not in ("input_ids", "attention_mask")]
        features = composed.get_image_features(**{name: batch[name] for name in names}).last_hidden_state
        views, _ = view_features(composed.config, batch, features)
        found.append(pooled_features(views, views_of_pictures(composed.config, batch, len(views))).cpu())
    composed.train(was_training)
    return torch.cat(found)


def _joined(examples: Sequence[Mapping[str, Any]], sample: Mapping[str, Any]) -> tuple[list[dict], list]:
    """Messages and pictures of all; what the system says is the sample's, and is said once."""
    messages, images = [], []
    for number, one in enumerate([*examples, sample]):
        own, media = place_media(one)
        if media["video"]:
            raise ValueError("Few-shot examples are pictures; this sample has a video.")
        own = [{**message, "content": _as_blocks(message["content"])} for message in own]
        system = [message for message in own if message["role"] == "system"]
        rest = [message for message in own if message["role"] != "system"]
        messages = [*system, *messages, *rest] if number == len(examples) else [*messages, *rest]
        images += media["image"]
    return messages, images


def _as_blocks(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        pieces = content.split("<image>")
        return [
            block
            for number, piece in enumerate(pieces)
            for block in ([{"type": "image", "text": None}] if number else []) + (blocks(piece) if piece else [])
        ]
    return [{"type": block["type"], "text": block.get("text")} for block in content]


def _openable(picture: Any) -> Any:
    """As chat templates of transformers take it."""
    from .readable import read_picture

    return read_picture(picture)


def _is_same(example: Mapping[str, Any], sample: Mapping[str, Any]) -> bool:
    return example.get("images") == sample.get("images") and example.get("messages") == sample.get("messages")
