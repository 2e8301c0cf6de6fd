"""Pictures and texts as vectors in one space, with the loss of CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import ProcessorMixin

from .base import Objective, ObjectiveBatch
from .captions import caption_keys, caption_of, described_pictures, encode_captions
from .embeddings import evaluating, hidden_size, pool_last, pool_mean, run_again, split_by_sample
from .gather import gather_with_gradient
from .picture_features import composed_model, pooled_features, view_features, views_of_pictures


#: Logits of equal vectors: CLIP lets them grow to 100, and no further.
MAX_SCALE = 100.0

_TEXT_POOLING = {"last": pool_last, "mean": pool_mean}


class ContrastiveObjective(Objective):
    """The vector of a picture is nearer to that of its caption than to those of the others' in the batch, and the reverse.

    A picture's vector is a head on the mean of its image tokens; a caption's is a head on the language model's hidden states
    of the caption alone, which takes a second, short pass through it. So pictures and texts can be embedded apart
    (`embed_pictures`, `embed_texts`). Captions that are equal (but for case and spaces) are not negatives of one another.
    With several processes all of their pairs are negatives, with gradient. The caption is the sample's `caption`, or the
    assistant's words; samples without pictures or caption are left out. A picture that is there twice, with two captions, is
    not noticed.

    Args:
        model: The composed model; only the widths of its parts are read.
        embedding_size: Width of the vectors.
        loss: `"softmax"` (CLIP) or `"sigmoid"` (SigLIP: each pair by itself, which suits small batches).
        pictures: `"tokens"`: after the projector, so that the loss trains it too, tower frozen or not, and what is aligned
            is what the language model reads. `"tower"`: the tower's features before it, where the projector is not to be
            concerned; with a frozen tower only the heads and the language model then learn.
        text_pooling: `"last"`, the hidden state at the end-of-text token, or `"mean"` over all tokens.
        temperature: At the beginning; it is learned. Default: 0.07 for `softmax`, 0.1 for `sigmoid`, as in the papers.
        learning_rate: Of the heads and the temperature. Default: the trainer's.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding_size: int = 256,
        loss: str = "softmax",
        pictures: str = "tokens",
        text_pooling: str = "last",
        temperature: float | None = None,
        learning_rate: float | None = None,
    ):
        super().__init__(learning_rate)
        for name, value, choices in (
            ("loss", loss, ("softmax", "sigmoid")),
            ("pictures", pictures, ("tokens", "tower")),
            ("text_pooling", text_pooling, tuple(_TEXT_POOLING)),
        ):
            if value not in choices:
                raise ValueError(f"{name} of a contrastive loss is one of {', '.join(choices)}, not {value!r}.")
        self.loss, self.pictures, self.text_pooling = loss, pictures, text_pooling
        widths = {
            "tokens": model.config.projector_config["out_features"],
            "tower": model.config.vision_tower_spec["hidden_size"],
        }
        self.picture_head = _head(widths[pictures], embedding_size)
        self.text_head = _head(hidden_size(model), embedding_size)
        temperature = temperature or {"softmax": 0.07, "sigmoid": 0.1}[loss]
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        if loss == "sigmoid":
            # Most pairs do not belong together; SigLIP begins where that is the prediction.
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def collate(
        self, samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], processor: ProcessorMixin
    ) -> dict[str, Any]:
        """`num_pictures` `(samples,)`, negative where there is no caption; `input_ids` and `attention_mask` of the captions
        of samples that have both, and their `keys`."""
        counts = described_pictures(samples)
        captions = [caption_of(sample) for sample, count in zip(samples, counts) if count > 0]
        encoded = encode_captions(captions, processor) if captions else {}
        return {"num_pictures": torch.tensor(counts), "keys": caption_keys(captions), **encoded}

    def forward(self, batch: ObjectiveBatch) -> torch.Tensor | None:
        if not batch.extra:
            raise ValueError("The batch has no captions. Give the collator the objectives, too: objectives=….")
        counts = batch.extra["num_pictures"].tolist()
        rows = (batch.extra["num_pictures"] > 0).nonzero()[:, 0]
        pictures = self._pictures(batch.model, batch.inputs, batch.outputs.image_features, counts)
        texts = self._texts(batch.model, batch.extra)
        with torch.no_grad():
            # CLIP's bound. Where it is in the graph, a scale beyond it would get no gradient and stay there.
            self.logit_scale.clamp_(max=math.log(MAX_SCALE))
            similarities = pictures.new_full((len(counts), len(counts)), -math.inf)
            similarities[rows[:, None], rows] = self.logit_scale.exp() * pictures @ texts.T
            batch.shared["similarities"] = similarities
        keys = gather_with_gradient(batch.extra["keys"])
        pictures, texts = gather_with_gradient(pictures), gather_with_gradient(texts)
        if len(keys) < 2:
            return None
        logits = self.logit_scale.exp() * pictures @ texts.T
        others = keys[:, None] != keys
        if self.loss == "sigmoid":
            return sigmoid_loss(logits + self.logit_bias, others)
        return softmax_loss(logits, others)

    def _pictures(
        self, model: nn.Module, inputs: Mapping[str, Any], image_features: Any, counts: Sequence[int]
    ) -> torch.Tensor:
        """`(samples with pictures and caption, embedding_size)`, of length 1."""
        weight = self.picture_head[-1].weight
        pooled = [weight.new_zeros(0, weight.shape[1])]
        if any(count > 0 for count in counts):
            parts = split_by_sample(self._per_picture(model, inputs, image_features), counts)
            pooled += [
                torch.cat(part).to(weight.dtype).mean(0, keepdim=True) for part, n in zip(parts, counts) if n > 0
            ]
        return functional.normalize(self.picture_head(torch.cat(pooled)), dim=-1)

    def _per_picture(self, model: nn.Module, inputs: Mapping[str, Any], image_features: Any) -> Sequence[torch.Tensor]:
        """`(places, width)` of each picture: its tokens, or the mean of the tower's features."""
        if self.pictures == "tokens":
            return image_features.pooler_output
        config = composed_model(model).config
        views, _ = view_features(config, inputs, image_features.last_hidden_state)
        return pooled_features(views, views_of_pictures(config, inputs, len(views))).split(1)

    def _texts(self, model: nn.Module, encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`(captions, embedding_size)`, of length 1."""
        weight = self.text_head[-1].weight
        pooled = weight.new_zeros(0, weight.shape[1])
        if "input_ids" in encoded:
            mask = encoded["attention_mask"]
            hidden_states = run_again(model, input_ids=encoded["input_ids"], attention_mask=mask)
            pooled = _TEXT_POOLING[self.text_pooling](hidden_states.to(weight.dtype), mask)
        return functional.normalize(self.text_head(pooled), dim=-1)

    @torch.no_grad()
    def embed_pictures(
        self, model: nn.Module, processor: ProcessorMixin, pictures: Sequence[Any], batch_size: int = 32, **kwargs
    ) -> torch.Tensor:
        """`(pictures, embedding_size)`, of length 1, on the CPU. `kwargs` as for the processor, where it needs more."""
        found = []
        with evaluating(model, self):
            for start in range(0, len(pictures), batch_size):
                part = list(pictures[start : start + batch_size])
                inputs = processor(
                    text=[processor.image_token] * len(part),
                    images=[[picture] for picture in part],
                    padding=True,
                    return_tensors="pt",
                    **kwargs,
                ).to(model.device)
                inputs = {name: value for name, value in inputs.items() if name not in _OF_THE_TEXT}
                features = model.get_image_features(**inputs, return_dict=True)
                found.append(self._pictures(model, inputs, features, [1] * len(part)).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def embed_texts(
        self, model: nn.Module, processor: ProcessorMixin, texts: Sequence[str], batch_size: int = 32
    ) -> torch.Tensor:
        """`(texts, embedding_size)`, of length 1, on the CPU."""
        found = []
        with evaluating(model, self):
            for start in range(0, len(texts), batch_size):
                encoded = encode_captions([text.strip() for text in texts[start : start + batch_size]], processor)
                encoded = {name: tensor.to(model.device) for name, tensor in encoded.items()}
                found.append(self._texts(model, encoded).cpu())
        return torch.cat(found)


_OF_THE_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def softmax_loss(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """CLIP's: the mean of two cross-entropies, each picture's among the texts and each text's among the pictures.

    Args:
        logits: `(pairs, pairs)`, of each picture (row) with each text.
        others: Boolean `(pairs, pairs)`, false where a text says the same as the picture's own; such are no negatives.
    """
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~(others | own), -math.inf)
    targets = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def sigmoid_loss(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """SigLIP's: whether each pair belongs together, summed over a picture's pairs. Arguments as of `softmax_loss`."""
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    terms = functional.binary_cross_entropy_with_logits(logits, own.to(logits.dtype), reduction="none")
    return (terms * (others | own)).sum(-1).mean()


def _head(in_features: int, embedding_size: int) -> nn.Sequential:
    """CLIP's: a norm and a projection without bias."""
    return nn.Sequential(nn.LayerNorm(in_features), nn.Linear(in_features, embedding_size, bias=False))
