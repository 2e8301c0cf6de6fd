"""Step "projector": its tokens are finite, as large as the text's embeddings, and follow the picture."""

import torch

from ..composition.language_model_probe import relative_error
from ..modeling.feature_alignment import AlignedProjector
from .modality_gap import modality_gap
from .verification_checks import Check, CheckFailed, Finding, NotChecked, Subject, compare_weights


#: Tokens that vary less than this, relative to their size, are the same to a language model in half precision.
_LEAST_VARIATION = 1e-3

#: How far the relation to the embeddings may move from that of the model before the swap.
_MOST_CHANGE = 10.0


def check_finite(subject: Subject) -> Finding:
    tokens = torch.cat(subject.image_tokens)
    wrong = int((~torch.isfinite(tokens)).sum())
    if wrong:
        weights = [
            name
            for name, tensor in subject.model.multi_modal_projector.state_dict().items()
            if not bool(torch.isfinite(tensor).all())
        ]
        cause = f", and so are weights of the projector: {', '.join(weights[:5])}" if weights else ""
        raise CheckFailed(f"{wrong} of {tokens.numel()} numbers are not finite{cause}.", {"not_finite": wrong})
    return Finding(f"{len(tokens)} tokens of {len(subject.pictures)} pictures are finite.", {"tokens": len(tokens)})


def check_scale(subject: Subject) -> Finding:
    """RMS and norm of the tokens, against the language model's embeddings."""
    figures = statistics(subject)
    ratio = figures["rms_ratio"]
    least, most = 1 / subject.scale_limit, subject.scale_limit
    reason = (
        "new projectors start at 1, and one that was trained with stories-15m ended at 14; a language model that sees "
        "far larger or smaller inputs than its embeddings loses the text beside them, or the picture"
    )
    before = _before(subject)
    if before is not None:
        figures["rms_ratio_before"] = statistics(before)["rms_ratio"]
        least, most = figures["rms_ratio_before"] / _MOST_CHANGE, figures["rms_ratio_before"] * _MOST_CHANGE
        reason = f"at most {_MOST_CHANGE:g} times more or less than before, when the language model was the same"
    if not least <= ratio <= most:
        raise CheckFailed(
            f"Image tokens are {ratio:.3g} times as large as the text's embeddings (RMS), outside of {least:.3g} to "
            f"{most:.3g}.",
            figures,
            [least, most],
            reason,
        )
    return Finding(
        f"Image tokens are {ratio:.3g} times as large as the text's embeddings.", figures, [least, most], reason
    )


def check_places(subject: Subject) -> Finding:
    """Tokens of one picture differ."""
    several = [tokens.float() for tokens in subject.image_tokens if len(tokens) > 1]
    if not several:
        raise NotChecked("a picture has one token")
    variation = min(_variation(tokens) for tokens in several)
    return _varies(variation, "Tokens are the same at every place of a picture", "Tokens differ from place to place")


def check_pictures(subject: Subject) -> Finding:
    """Tokens of different pictures differ."""
    tokens = [each.float() for each in subject.image_tokens]
    variations = []
    for first, second in zip(tokens, tokens[1:]):
        if first.shape != second.shape:
            first, second = first.mean(0, keepdim=True), second.mean(0, keepdim=True)
        variations.append(
            float((first - second).square().mean().sqrt() / first.square().mean().sqrt().clamp(min=1e-30))
        )
    return _varies(
        max(variations), "Different pictures give the same tokens", "Different pictures give different tokens"
    )


def check_gap(subject: Subject) -> Finding:
    """How far apart image tokens and embeddings lie. It is measured, not judged: models with a large gap work."""
    figures = statistics(subject)
    if not figures["distance"] == figures["distance"]:
        raise CheckFailed("The distance between the means of image tokens and embeddings is no number.", figures)
    return Finding(
        f"The means of image tokens and of embeddings are {figures['distance']:.3g} lengths of an embedding apart.",
        figures,
    )


def check_same(subject: Subject) -> Finding:
    """How much of the projector is that of the model before. A projector may be trained at any time, so nothing fails."""
    if subject.sources.composed is None:
        raise NotChecked("no composed model to compare with was given")
    before = subject.sources.composed_model()[0]
    if before.config.projector_config["type"] != subject.config.projector_config["type"]:
        raise NotChecked("the projector is of another type than it was")
    projector = subject.model.multi_modal_projector
    if isinstance(projector, AlignedProjector) and not isinstance(before.multi_modal_projector, AlignedProjector):
        projector = projector.projector
    figures = compare_weights(projector, before.multi_modal_projector)
    if not figures["changed"] and not figures["lacking"] and not figures["additional"] and not figures["other_shapes"]:
        return Finding("The projector is bit for bit what it was.", figures)
    kept = figures["tensors"] - figures["changed"] - len(figures["other_shapes"])
    return Finding(
        f"{kept} tensors of the projector are what they were; {figures['changed']} changed, "
        f"{len(figures['other_shapes'])} have another shape, {len(figures['additional'])} are new.",
        figures,
    )


@torch.no_grad()
def statistics(subject: Subject) -> dict[str, float]:
    """`modality_gap` of image tokens and the language model's embeddings, and the ratio of their mean norms.

    Raises:
        NotChecked: the tokens are of another width, as a fusion may want them.
    """
    tokens = torch.cat(subject.image_tokens).float()
    embeddings = subject.model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    ids = torch.arange(0, rows, max(1, rows // 4096), device=embeddings.weight.device)
    words = embeddings(ids.unsqueeze(0))[0].float()
    words = words[words.abs().sum(-1) > 0]  # rows that pad the vocabulary are zero
    if tokens.shape[-1] != words.shape[-1]:
        raise NotChecked("the fusion takes tokens of another width than the embeddings'")
    norms = [each.norm(dim=-1).mean() for each in (tokens, words)]
    return {**modality_gap(tokens, words), "norm_ratio": float(norms[0] / norms[1])}


def _before(subject: Subject) -> Subject | None:
    """The composed model that was given as a source, if it has this model's language model, which is used to its tokens."""
    if subject.sources.composed is None:
        return None
    model, processor = subject.sources.composed_model()
    if processor is None:
        return None
    own, other = (each.get_input_embeddings().weight.detach() for each in (subject.model, model))
    rows = min(len(own), len(other))
    if own.shape[1] != other.shape[1]:
        return None
    # Trained embeddings move a little; another model's have nothing in common with them.
    same = relative_error(own[:rows].float(), other[:rows].to(own.device).float()) < 0.5
    return Subject(model, processor, subject.sources, subject.pictures) if same else None


def _variation(tokens: torch.Tensor) -> float:
    return float((tokens - tokens.mean(0)).square().mean().sqrt() / tokens.square().mean().sqrt().clamp(min=1e-30))


def _varies(variation: float, constant: str, varying: str) -> Finding:
    figures = {"relative_variation": variation}
    reason = "RMS of the difference over RMS of the tokens; less than this is lost in half precision"
    if not variation >= _LEAST_VARIATION:
        raise CheckFailed(f"{constant} (they differ by {variation:.1g}).", figures, _LEAST_VARIATION, reason)
    return Finding(f"{varying} (by {variation:.2g}).", figures, _LEAST_VARIATION, reason)


CHECKS = (
    Check(
        "finite",
        check_finite,
        "Train again from the last good checkpoint, in bfloat16 or float32 instead of float16 and with a lower "
        "learning rate.",
    ),
    Check(
        "scale",
        check_scale,
        "Swap again with images=…, which fits the projector, or compose anew, which scales it. If the model was "
        "trained so (some reach more), allow it: --scale-limit.",
    ),
    Check(
        "places",
        check_places,
        "The projector does not let the features through: look at its norms and at weights that are zero, and train "
        "it again, or swap with images=….",
    ),
    Check(
        "pictures",
        check_pictures,
        "The projector does not let the features through: look at its norms and at weights that are zero, and train "
        "it again, or swap with images=….",
    ),
    Check("gap to the text", check_gap, "See the check of the scale."),
    Check("compared with before", check_same, ""),
)
