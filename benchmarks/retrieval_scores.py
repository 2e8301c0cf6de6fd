"""Which caption belongs to which picture: scores `(pictures, captions)` by several ways, and how often the best is right."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from anyvlm.training.objectives.captions import encode_captions
from anyvlm.training.objectives.contrastive import ContrastiveObjective
from anyvlm.training.objectives.embeddings import pool_mean, run_again
from anyvlm.training.objectives.matching import MatchingObjective


def recall_at_1(scores: torch.Tensor) -> float:
    """In percent, mean of both directions: the caption of each picture, the picture of each caption. Pair i belongs to i."""
    own = torch.arange(len(scores))
    return 50 * float((scores.argmax(1) == own).float().mean() + (scores.argmax(0) == own).float().mean())


@torch.no_grad()
def language_model_scores(
    model: torch.nn.Module, processor: Any, batch: Mapping[str, torch.Tensor], captions: Sequence[str]
) -> tuple[dict[str, torch.Tensor], float]:
    """Scores by what a model has without any loss but the language model's, and that loss.

    Args:
        batch: Of the collator, one row for each picture and its caption.
        captions: In the same order.

    Returns:
        `{name of the way: (pictures, captions)}`, and the mean negative log-likelihood of a token of a picture's caption.
    """
    model.eval()
    pictures = model.get_image_features(
        **{name: batch[name] for name in ("pixel_values", "tower_features", "tower_grids") if name in batch},
        return_dict=True,
    )
    encoded = encode_captions(captions, processor)
    images = torch.stack([tokens.mean(0) for tokens in pictures.pooler_output])
    texts = pool_mean(run_again(model, **encoded), encoded["attention_mask"])
    centred = (
        functional.normalize(images - images.mean(0), dim=-1) @ functional.normalize(texts - texts.mean(0), dim=-1).T
    )
    scores = {
        "pooled states": functional.normalize(images, dim=-1) @ functional.normalize(texts, dim=-1).T,
        "pooled states, centred": centred,
    }
    likelihood, lengths = _likelihoods(model, batch, pictures)
    scores["likelihood"] = likelihood
    scores["likelihood per token"] = likelihood / lengths
    # Against how probable a caption is with any of the pictures, or else short and common ones always win.
    scores["likelihood, less the caption's own"] = likelihood - likelihood.logsumexp(0)
    return scores, -float(likelihood.diagonal().sum() / lengths.sum())


def _likelihoods(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], pictures: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihood of each caption after each picture, `(pictures, captions)`, and each caption's tokens."""
    supervised = batch["labels"] != -100
    captions = [ids[mask] for ids, mask in zip(batch["input_ids"], supervised)]
    padded = pad_sequence(captions, batch_first=True)
    mask = pad_sequence([torch.ones_like(caption) for caption in captions], batch_first=True)
    rows = []
    for index, ids in enumerate(batch["input_ids"]):
        prompt = ids[: int(supervised[index].nonzero()[0])].expand(len(captions), -1)
        features = type(pictures)(
            pooler_output=[pictures.pooler_output[index]] * len(captions),
            token_grids=[pictures.token_grids[index]] * len(captions),
        )
        logits = model(
            input_ids=torch.cat([prompt, padded], 1),
            attention_mask=torch.cat([torch.ones_like(prompt), mask], 1),
            mm_encoder_outputs={"image": features},
            logits_to_keep=padded.shape[1] + 1,
        ).logits[:, :-1]
        rows.append((logits.log_softmax(-1).gather(-1, padded[..., None])[..., 0] * mask).sum(1))
    return torch.stack(rows), mask.sum(1)


def trained_scores(
    contrastive: ContrastiveObjective,
    matching: MatchingObjective,
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    captions: Sequence[str],
    candidates: int = 10,
) -> dict[str, torch.Tensor]:
    """Scores by the heads: the vectors' similarity; and of the best by it, what the matching head makes of each pair, as
    ALBEF and BLIP rank."""
    pictures = contrastive.embed_pictures(model, processor, [sample["images"][0] for sample in samples])
    similarity = pictures @ contrastive.embed_texts(model, processor, captions).T
    candidates = min(candidates, len(captions))
    near = torch.zeros_like(similarity, dtype=torch.bool)
    near.scatter_(1, similarity.topk(candidates, 1).indices, True)
    near.scatter_(0, similarity.topk(candidates, 0).indices, True)
    matched = matching.match(model, processor, samples, near.nonzero().tolist(), batch_size=128)
    logits = torch.full_like(similarity, -torch.inf)
    logits[near] = torch.logit(matched, eps=1e-6)
    return {
        "contrastive": similarity,
        "contrastive, ranked again by matching": logits + contrastive.logit_scale.exp().item() * similarity,
    }
