"""How far image tokens are from text embeddings, in numbers and in two dimensions."""

from typing import Any

import torch


#: Points of each kind that are kept for the picture.
_POINTS = 150


def modality_gap(image_tokens: torch.Tensor, text_embeddings: torch.Tensor) -> dict[str, float]:
    """How far image tokens `(n, width)` are from text embeddings `(m, width)`.

    Returns:
        `distance`: between the two means (Liang et al. 2022, "Mind the Gap"), in units of the root mean square length of a
        text embedding, so that models of any width and scale compare. `rms_ratio`: the root mean square of the image
        tokens over that of the text embeddings; the language model is used to 1.

    Raises:
        ValueError: no tokens, or of two widths.
    """
    _check(image_tokens, text_embeddings)
    image_tokens, text_embeddings = image_tokens.detach().double(), text_embeddings.detach().double()
    length = text_embeddings.square().sum(-1).mean().sqrt()
    distance = (image_tokens.mean(0) - text_embeddings.mean(0)).norm() / length
    ratio = image_tokens.square().mean().sqrt() / text_embeddings.square().mean().sqrt()
    return {"distance": distance.item(), "rms_ratio": ratio.item()}


def modality_gap_change(
    before: tuple[torch.Tensor, torch.Tensor], after: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """`SwapReport.modality_gap`: the gap before and after, and points for the picture.

    Args:
        before: Image tokens `(n, width)` and text embeddings `(m, width)` of the old model.
        after: Those of the new one, whose width may be another. Of the same language model, give the same embeddings.

    Returns:
        `before`, `after`: as `modality_gap`. `points`: the tokens' two principal components, in lengths of a text embedding;
        of both models together if they have the same text embeddings, else of each by itself. At most 150 of each kind,
        evenly chosen.
    """
    gap: dict[str, Any] = {"before": modality_gap(*before), "after": modality_gap(*after)}
    chosen = [_some(tokens) for tokens in (*before, *after)]
    if chosen[1].shape == chosen[3].shape and torch.equal(chosen[1], chosen[3]):
        points = _principal_components(chosen, unit=before[1])
    else:
        points = _principal_components(chosen[:2], before[1]) + _principal_components(chosen[2:], after[1])
    gap["points"] = {
        "before": {"image": points[0], "text": points[1]},
        "after": {"image": points[2], "text": points[3]},
    }
    return gap


def _check(image_tokens: torch.Tensor, text_embeddings: torch.Tensor) -> None:
    shapes = [tuple(tokens.shape) for tokens in (image_tokens, text_embeddings)]
    if not all(len(shape) == 2 and shape[0] for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"Give image tokens (n, width) and text embeddings (m, width), not {shapes[0]} and {shapes[1]}."
        )


def _some(tokens: torch.Tensor) -> torch.Tensor:
    indices = torch.linspace(0, len(tokens) - 1, min(_POINTS, len(tokens))).round().long()
    return tokens.detach()[indices].cpu().float()


def _principal_components(groups: list[torch.Tensor], unit: torch.Tensor) -> list[list[list[float]]]:
    """Each group's points on the two principal axes of all, in root mean square lengths of the rows of `unit`."""
    together = torch.cat(groups)
    centred = together - together.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    points = centred @ axes.T / unit.detach().float().cpu().square().sum(-1).mean().sqrt().clamp(min=1e-12)
    if points.shape[1] < 2:
        points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))
    return [[[round(x, 5), round(y, 5)] for x, y in group.tolist()] for group in points.split([*map(len, groups)])]
