"""What every check of `anyvlm.verify` works with: the model, its sources, and ways to say what was found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from ..composition.language_model_probe import relative_error, rounding
from ..configuration.configuration_anyvlm import AnyVlmConfig
from ..configuration.image_views import depends_on_pictures, has_several_views
from ..configuration.instructions import reads_instruction
from ..modeling.fused_vision_towers import FusedVisionTowers
from ..processing.media_views import take_apart
from ..processing.pictures import to_rgb_picture
from ..processing.prepared_views import prepare_views
from ..processing.processing_anyvlm import AnyVlmProcessor
from .verification_sources import Sources


#: Steps of rounding between two runs that should agree: of the same shapes, and of others (padded, with a cache).
SAME_SHAPES, OTHER_SHAPES = 4, 16

#: What a picture is asked about.
QUESTION = "What is in this picture?"


@dataclass
class Finding:
    """What a check found. Fields as those of `CheckResult`."""

    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    tolerance: Any = None
    tolerance_reason: str | None = None


class CheckFailed(Exception):
    """Something is wrong. Fields as those of `CheckResult`."""

    def __init__(
        self,
        detail: str,
        figures: dict[str, Any] | None = None,
        tolerance: Any = None,
        tolerance_reason: str | None = None,
    ):
        super().__init__(detail)
        self.finding = Finding(detail, figures or {}, tolerance, tolerance_reason)


class NotChecked(Exception):
    """A check cannot be made; the message says why."""


@dataclass
class Subject:
    """A model that is verified.

    Args:
        model, processor: Composed ones; `None` where they could not be loaded.
        sources: What they are compared with.
        checkpoint: The folder they come from, if they do.
        pictures: At least two, RGB.
        trained: Parts that are expected to differ from their sources.
        scale_limit: Largest factor between the size of image tokens and of the text's embeddings.
        timeout: Seconds for the fresh process; `None`: leave it out.
        notes: What is worth knowing and no failure.
    """

    model: PreTrainedModel | None
    processor: AnyVlmProcessor | None
    sources: Sources
    pictures: list[Image.Image]
    checkpoint: Path | None = None
    trained: frozenset[str] = frozenset()
    scale_limit: float = 50.0
    timeout: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> AnyVlmConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def source_language_model(self) -> PreTrainedModel:
        """The source of the language model, as the model has it: dtype, device, eval mode."""
        if self.sources.text is None:
            raise NotChecked("no source of the language model was given")
        return self._source(self.model.language_model, self.sources.language_model)

    def source_vision_tower(self, index: int) -> PreTrainedModel:
        """The same of one tower."""
        if self.sources.vision[index] is None:
            raise NotChecked("no source of the vision tower was given")
        return self._source(self.towers[index], self.sources.vision_tower, index)

    def _source(self, part: PreTrainedModel, load: Callable[..., PreTrainedModel], *arguments) -> PreTrainedModel:
        source = load(*arguments, part.dtype, self.device)
        if source is part:
            raise NotChecked("the source that was given is the model's own module: pass its path or Hub id")
        if source.config.model_type != part.config.model_type:
            raise CheckFailed(
                f"The model has a {part.config.model_type!r}, and the source is a {source.config.model_type!r}."
            )
        return source

    @property
    def towers(self) -> list[PreTrainedModel]:
        """The vision tower, or all of several."""
        tower = self.model.vision_tower
        return list(tower.towers) if isinstance(tower, FusedVisionTowers) else [tower]

    @cached_property
    def image_inputs(self) -> dict[str, torch.Tensor]:
        """What `get_image_features` takes for the pictures, made of the model's config and the image processor alone, so
        that what else is wrong with the processor does not show before its turn."""
        return self.image_inputs_of(self.pictures)

    def image_inputs_of(self, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The same for these pictures, each the only one of its text."""
        config, image_processor = self.config, self.processor.image_processor
        resample = getattr(image_processor, "resample", None)
        media = [take_apart(to_rgb_picture(picture), config.image_views, resample) for picture in pictures]
        views = [view for medium in media for view in medium.views]
        outputs = dict(prepare_views(image_processor, views, config.vision_tower_spec, config.image_views))
        if has_several_views(config.image_views):
            more = depends_on_pictures(config.image_views)
            outputs["original_sizes"] = torch.tensor([(*medium.size, 1)[: 2 + more] for medium in media])
        if reads_instruction(config.projector_config):
            read = self.processor.qformer_tokenizer([QUESTION] * len(pictures), return_tensors="pt")
            outputs |= {f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")}
        return {name: value.to(self.device) for name, value in outputs.items()}

    @cached_property
    @torch.no_grad()
    def image_tokens(self) -> list[torch.Tensor]:
        """Tokens of each picture, `(num_tokens, width)`."""
        return list(self.model.get_image_features(**self.image_inputs).pooler_output)


def agree(
    found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, steps: int, what: str, than: str
) -> Finding:
    """That two results are equal but for rounding.

    Args:
        steps: How many roundings may lie between them.
        what, than: For the sentence: "`what` are those of `than`".

    Raises:
        CheckFailed: they are not.
    """
    if found.shape != expected.shape:
        raise CheckFailed(f"{what} have the shape {tuple(found.shape)}, those of {than} {tuple(expected.shape)}.")
    found, expected = found.float(), expected.float()
    tolerance = rounding(dtype, steps)
    figures = {
        "relative_difference": relative_error(found, expected),
        "max_difference": float((found - expected).abs().max()),
    }
    name = str(dtype).removeprefix("torch.")
    reason = f"{steps} roundings of {name}, at least 1e-5; RMS of the difference over RMS of what is expected"
    if not figures["relative_difference"] <= tolerance:  # so that NaN fails
        raise CheckFailed(
            f"{what} differ from those of {than} by {figures['relative_difference']:.2g} "
            f"(at most {figures['max_difference']:.2g}); rounding makes {tolerance:.1g}.",
            figures,
            tolerance,
            reason,
        )
    detail = f"{what} are those of {than}"
    detail += (
        "." if figures["max_difference"] == 0 else f" but for {figures['relative_difference']:.1g}, which is rounding."
    )
    return Finding(detail, figures, tolerance, reason)


def agree_unless_trained(
    subject: Subject, part: str, found: torch.Tensor, expected: torch.Tensor, what: str, than: str
) -> Finding:
    """As `agree`, of a part and its source; one that was said to be trained may differ."""
    try:
        return agree(found, expected, subject.model.dtype, SAME_SHAPES, what, than)
    except CheckFailed as failure:
        if part not in subject.trained or not bool(torch.isfinite(found).all()):
            raise
        return Finding(f"Trained, as was said. {failure}", failure.finding.figures)


@torch.no_grad()
def compare_weights(found: nn.Module, expected: nn.Module, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compare two modules tensor by tensor, bit for bit.

    Tensors of a vocabulary that grew or shrank are compared in the rows that both have.

    Args:
        ignored: Beginnings of names that do not count.

    Returns:
        `tensors` compared, `changed` (how many), `relative_change` of all weights, `most_changed` (name -> relative change
        of up to five), `lacking` and `additional` names, `other_shapes` (name -> both shapes), `new_rows` of the vocabulary.
    """
    own, other = (
        {n: t for n, t in module.state_dict().items() if not n.startswith(ignored)} for module in (found, expected)
    )
    rows = tuple(_vocabulary(module) for module in (found, expected))
    shapes, changes, squares = {}, {}, [0.0, 0.0]
    for name in own.keys() & other.keys():
        mine, theirs = own[name], other[name].to(own[name].device)
        if mine.shape != theirs.shape and mine.shape[1:] == theirs.shape[1:] and (len(mine), len(theirs)) == rows:
            mine, theirs = mine[: min(rows)], theirs[: min(rows)]
        if mine.shape != theirs.shape:
            shapes[name] = [list(mine.shape), list(theirs.shape)]
            continue
        if torch.equal(mine, theirs.to(mine.dtype)):
            squares[1] += float(theirs.double().square().sum()) if theirs.is_floating_point() else 0.0
            continue
        if not mine.is_floating_point():  # counters of batches and the like
            continue
        change, size = (mine.double() - theirs.double()).square().sum(), theirs.double().square().sum()
        changes[name] = float((change / size.clamp(min=1e-30)).sqrt())
        squares[0] += float(change)
        squares[1] += float(size)
    most = sorted(changes, key=lambda name: (changes[name] == changes[name], -changes[name]))[:5]
    return {
        "tensors": len(own.keys() & other.keys()),
        "changed": len(changes),
        "relative_change": (squares[0] / max(squares[1], 1e-30)) ** 0.5,
        "most_changed": {name: changes[name] for name in most},
        "lacking": sorted(other.keys() - own.keys()),
        "additional": sorted(own.keys() - other.keys()),
        "other_shapes": shapes,
        "new_rows": rows[0] - rows[1] if None not in rows else 0,
    }


def _vocabulary(module: nn.Module) -> int | None:
    """Rows of a language model's embeddings; `None` for towers and other modules."""
    if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
        return None
    return module.get_input_embeddings().weight.shape[0]


def report_weights(comparison: dict[str, Any], of: str, expected_to_change: bool) -> Finding:
    """What `compare_weights` found about a part and its source, whose name is `of`.

    Raises:
        CheckFailed: the part differs from its source, and nothing says that it was trained.
    """
    differences = []
    for key, text in (("lacking", "lacks"), ("additional", "has, and its source has not,")):
        if comparison[key]:
            differences.append(f"{text} {_some(comparison[key])}")
    for name, (own, other) in list(comparison["other_shapes"].items())[:3]:
        differences.append(f"{name} has the shape {own}, and in the source {other}")
    if comparison["changed"]:
        most = ", ".join(f"{name} by {change:.2g}" for name, change in comparison["most_changed"].items())
        differences.append(
            f"{comparison['changed']} of {comparison['tensors']} tensors changed, all weights by "
            f"{comparison['relative_change']:.2g} (RMS), most: {most}"
        )
    figures = {key: value for key, value in comparison.items() if value or key in ("tensors", "changed")}
    reason = "weights that nothing trained stay bit for bit"
    if not differences:
        rows = comparison["new_rows"]
        grown = f"; its vocabulary has {abs(rows)} rows {'more' if rows > 0 else 'less'}" if rows else ""
        return Finding(f"All {comparison['tensors']} tensors are those of {of}{grown}.", figures, 0, reason)
    detail = f"Compared with {of}: {'; '.join(differences)}."
    if not expected_to_change:
        raise CheckFailed(detail, figures, 0, reason)
    return Finding(f"Trained, as was said. {detail}", figures)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class Check:
    """A check that can be made.

    Args:
        name: Unique within its step.
        run: Raises `CheckFailed` or `NotChecked`; any other error is a failure too.
        advice: What to do when it fails.
    """

    name: str
    run: Callable[[Subject], Finding]
    advice: str
