"""Whether a text is about a picture: matching with hard negatives, as in ALBEF (Li et al. 2021) and BLIP (2022)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from ...modeling.picture_inputs import IMAGE_INPUTS
from ..collator import AnyVlmDataCollator
from .base import Objective, ObjectiveBatch
from .captions import caption_keys, caption_of, described_pictures, encode_captions
from .embeddings import evaluating, hidden_size, pool_last, run_again, split_by_sample


class MatchingObjective(Objective):
    """From what the language model has read of a picture and a caption, tell whether they belong together.

    One further pass through the language model over each picture with its own caption, with the caption of another, and over
    each caption with the picture of another (three times the batch). The picture's side of a pair is its sample's
    conversation up to the first answer, so that any number of image tokens fits; the caption is put after it. Features of
    pictures are not computed again. The others are drawn from the batch: where a contrastive objective is trained beside
    this one, those that it finds similar, more often; else all alike. None has the same caption (but for case and
    spaces). Samples without pictures or caption are left out.

    Args:
        model: The composed model; only the width of its hidden states is read.
        negatives: `"both"`, `"text"` (another caption for each picture) or `"picture"` (another picture for each caption).
        learning_rate: Of the head. Default: the trainer's.
    """

    reads_shared = True

    def __init__(self, model: nn.Module, negatives: str = "both", learning_rate: float | None = None):
        super().__init__(learning_rate)
        if negatives not in ("both", "text", "picture"):
            raise ValueError(f"negatives of a matching loss are one of both, text, picture, not {negatives!r}.")
        self.negatives = negatives
        width = hidden_size(model)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def collate(
        self, samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], processor: ProcessorMixin
    ) -> dict[str, Any]:
        """`num_pictures` `(samples,)`, negative where there is no caption; of samples that have both, `prompt_ids` and
        `prompt_mask` up to the first answer, `caption_ids` and `caption_mask`, padded on the right, and `keys`."""
        counts = described_pictures(samples)
        rows = [row for row, count in enumerate(counts) if count > 0]
        extra = {"num_pictures": torch.tensor(counts)}
        if not rows:
            return extra
        captions = [caption_of(samples[row]) for row in rows]
        encoded = encode_captions(captions, processor, add_special_tokens=False)
        prompts = [_prompt(batch, row) for row in rows]
        return {
            **extra,
            "keys": caption_keys(captions),
            "caption_ids": encoded["input_ids"],
            "caption_mask": encoded["attention_mask"],
            "prompt_ids": pad_sequence(prompts, batch_first=True),
            "prompt_mask": pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True),
        }

    def forward(self, batch: ObjectiveBatch) -> torch.Tensor | None:
        if not batch.extra:
            raise ValueError("The batch has no captions. Give the collator the objectives, too: objectives=….")
        if len(batch.extra.get("keys", ())) < 2:
            return None
        own = torch.arange(len(batch.extra["keys"]), device=batch.extra["keys"].device)
        negatives = self._draw(batch)
        if not len(negatives):
            return None
        pairs = torch.cat([torch.stack([own, own], 1), negatives])
        logits = self._logits(batch.model, batch.outputs.image_features, batch.extra, pairs)
        return functional.cross_entropy(logits, (pairs[:, 0] == pairs[:, 1]).long())

    def _draw(self, batch: ObjectiveBatch) -> torch.Tensor:
        """`(negatives, 2)`: a picture and a caption that is not its own."""
        keys = batch.extra["keys"]
        weights = (keys[:, None] != keys).float()
        similarities = batch.shared.get("similarities")
        if similarities is not None:
            described = batch.extra["num_pictures"] > 0
            similarities = similarities[described][:, described].masked_fill(weights == 0, -torch.inf)
        drawn = []
        for side in ("text", "picture"):
            if self.negatives in ("both", side):
                # Rows choose among columns; a picture among texts, then a text among pictures.
                of_side = weights if side == "text" else weights.T
                rows = of_side.any(1).nonzero()[:, 0]
                if not len(rows):
                    continue
                chances = of_side[rows]
                if similarities is not None:
                    logits = similarities if side == "text" else similarities.T
                    # ALBEF's floor, so that where the vectors are sure of themselves something is drawn still.
                    chances = chances * (logits[rows].softmax(-1) + 1e-4)
                pair = [rows, torch.multinomial(chances, 1)[:, 0]]
                drawn.append(torch.stack(pair if side == "text" else pair[::-1], 1))
        return torch.cat(drawn) if drawn else keys.new_zeros(0, 2)

    def _logits(
        self, model: nn.Module, image_features: Any, extra: Mapping[str, torch.Tensor], pairs: torch.Tensor
    ) -> torch.Tensor:
        """`(pairs, 2)`: of not belonging together, and of belonging, for pairs of a picture and a caption among the samples
        that have both."""
        counts = extra["num_pictures"].tolist()
        rows = [row for row, count in enumerate(counts) if count > 0]
        tokens = split_by_sample(image_features.pooler_output, counts)
        grids = image_features.get("token_grids")
        grids = None if grids is None else split_by_sample(grids, counts)
        prompts = [ids[mask.bool()] for ids, mask in zip(extra["prompt_ids"], extra["prompt_mask"])]
        captions = [ids[mask.bool()] for ids, mask in zip(extra["caption_ids"], extra["caption_mask"])]
        chosen = [(rows[picture], picture, caption) for picture, caption in pairs.tolist()]
        sequences = [torch.cat([prompts[picture], captions[caption]]) for _, picture, caption in chosen]
        mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
        # The class comes with the model, which may have been loaded with code of its own.
        features = type(image_features)(
            pooler_output=[picture for row, _, _ in chosen for picture in tokens[row]],
            token_grids=None if grids is None else [grid for row, _, _ in chosen for grid in grids[row]],
        )
        hidden_states = run_again(
            model,
            # Any id pads that is not an image token's.
            input_ids=pad_sequence(sequences, batch_first=True, padding_value=int(captions[0][-1])),
            attention_mask=mask,
            mm_encoder_outputs={"image": features},
        )
        return self.head(pool_last(hidden_states, mask).to(self.head[-1].weight.dtype))

    @torch.no_grad()
    def match(
        self,
        model: nn.Module,
        processor: ProcessorMixin,
        samples: Sequence[Mapping[str, Any]],
        pairs: Sequence[tuple[int, int]],
        batch_size: int = 32,
    ) -> torch.Tensor:
        """`(pairs,)`, on the CPU: how probable it is that the pictures of one sample and the caption of another belong
        together.

        Args:
            samples: As in training, each with pictures and a caption.
            pairs: Of each, the number of the sample whose pictures (and question) and of that whose caption are meant.
            batch_size: Pairs at a time.
        """
        found = []
        with evaluating(model, self):
            for start in range(0, len(pairs), batch_size):
                part = torch.tensor(pairs[start : start + batch_size])
                needed, part = part.unique(return_inverse=True)
                batch = AnyVlmDataCollator(processor, objectives={"matching": self})([samples[i] for i in needed])
                extra = {
                    name: tensor.to(model.device) for name, tensor in batch.pop("objective_inputs")["matching"].items()
                }
                if bool((extra["num_pictures"] <= 0).any()):
                    raise ValueError("A sample without pictures, or without a caption, cannot be matched.")
                inputs = {n: v.to(model.device) for n, v in batch.items() if n in ("pixel_values", *IMAGE_INPUTS)}
                features = model.get_image_features(**inputs, return_dict=True)
                found.append(self._logits(model, features, extra, part).softmax(-1)[:, 1].cpu())
        return torch.cat(found)


def _prompt(batch: Mapping[str, Any], row: int) -> torch.Tensor:
    """The ids of a row up to its first supervised token."""
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    supervised = (labels != -100).nonzero()
    end = int(supervised[0]) if len(supervised) else len(ids)
    return ids[:end][batch["attention_mask"][row, :end].bool()]
