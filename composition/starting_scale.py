"""How large image tokens are before anything is trained: as the text's embeddings."""

import torch
from torch import nn

from ..configuration.image_views import has_newline
from ..modeling.modeling_anyvlm import AnyVlmForConditionalGeneration
from ..modeling.picture_states import PictureStates
from .language_model_probe import plain_words


def match_embedding_scale(
    model: AnyVlmForConditionalGeneration, features: torch.Tensor, projector_only: bool = False
) -> None:
    """Scale the projector's output layer so that image tokens start with the RMS of the text's embeddings.

    Far larger or smaller tokens than a language model ever saw are a common cause of NaN after a swap.

    Args:
        features: Of some pictures, `(num_pictures, num_features, hidden_size)`, fp32.
        projector_only: Newline and fusion are trained, and stay as they are.
    """
    projector = model.multi_modal_projector
    tokens, _ = projector.float()(features.to(model.device), tuple(model.config.vision_tower_spec["grid"]))
    rms = embedding_rms(model.language_model)
    if has_newline(model.config.image_views) and not projector_only:
        model.image_newline.normal_(std=float(rms))
    if projector.output_layer is not None:
        scale = rms / tokens.square().mean().sqrt().clamp(min=1e-12)
        projector.output_layer.weight.mul_(scale)
        tokens = tokens * scale
    projector.to(model.config.dtype)
    if model.fusion is not None and model.fusion.changes_embeddings and not projector_only:
        _match_gathered_scale(model, tokens)


def _match_gathered_scale(model: AnyVlmForConditionalGeneration, tokens: torch.Tensor) -> None:
    """The same for what text gathers from pictures, where that is mixed into the embeddings.

    Args:
        tokens: Of some pictures, `(num_pictures, num_tokens, width)`.
    """
    num_pictures = len(tokens)
    words = plain_words(model.language_model, 8 * num_pictures).view(num_pictures, 8)
    states = PictureStates.from_pictures(list(tokens), torch.arange(8, device=words.device).expand_as(words) == 0)
    gathered, _ = model.fusion.gather(model.get_input_embeddings()(words), states, "sdpa")
    rms = gathered.float().square().mean().sqrt().clamp(min=1e-12)
    model.fusion.output_layer.weight.mul_(embedding_rms(model.language_model) / rms)


def embedding_rms(language_model: nn.Module, max_rows: int = 4096) -> torch.Tensor:
    """RMS of the language model's token embeddings as its embedding module gives them, scale included (gemma)."""
    embeddings = language_model.get_input_embeddings()
    num_rows = embeddings.weight.shape[0]
    ids = torch.arange(0, num_rows, max(1, num_rows // max_rows), device=embeddings.weight.device)
    values = embeddings(ids.unsqueeze(0))[0].float()
    used = values.abs().sum(-1) > 0  # rows that pad the vocabulary are zero
    return values[used].square().mean().sqrt()
