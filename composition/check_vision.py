"""The vision side of `check`: towers without weights, their pictures, and how many tokens these take."""

from dataclasses import dataclass
from typing import Any

from ..configuration.image_views import feature_grids, plan_views
from ..configuration.token_grids import token_grid
from ..processing.fused_image_processor import FusedImageProcessor
from ..processing.prepared_views import grids_of_sizes, makes_one_size
from .check_findings import Findings
from .nearest import nearest_size, nearest_types_to
from .picture_plan import PicturePlan, plan_pictures
from .vision_part import VisionPart, examine_tower, fuse_towers, fused_spec
from .weightless_parts import WeightlessPart


#: Pictures, `(height, width)`, whose tokens are reported: small, of a phone's screen, of a camera, a page, a strip.
USUAL_SIZES = ((224, 224), (480, 640), (1080, 1920), (1754, 1240), (2000, 500))


@dataclass
class CheckedVision:
    """The tower, or several as one, and what composing would know of it.

    Args:
        weightless: In full size, and what was run.
        part: What was run, as `compose` has it.
    """

    weightless: WeightlessPart
    part: VisionPart


def examine_vision(
    towers: list[WeightlessPart | None],
    sources: list,
    image_processors: list,
    image_size: int | tuple[int, int] | None,
    vision_fusion: str,
    trust_remote_code: bool,
    findings: Findings,
) -> CheckedVision | None:
    """`None` if a tower is refused or not known, with the reason in the findings."""
    several = len(towers) > 1
    found = [
        _examine_tower(tower, source, processor, image_size, several, trust_remote_code, findings)
        for tower, source, processor in zip(towers, sources, image_processors)
        if tower is not None
    ]
    if len(found) < len(towers) or None in found:
        return None
    if not several:
        return found[0]
    with findings.refusals():
        return _fuse(found, vision_fusion)
    return None


def _examine_tower(
    tower: WeightlessPart,
    source: Any,
    image_processor: Any,
    image_size: int | tuple[int, int] | None,
    plain: bool,
    trust_remote_code: bool,
    findings: Findings,
) -> CheckedVision | None:
    def nearest() -> list[str]:
        fitting = [] if tower.run is None else nearest_size(tower.run, tower.model.config)
        return fitting or nearest_types_to("vision", tower.model.config.model_type)

    with findings.refusals(nearest):
        processor, size, spec = examine_tower(
            source,
            tower.model,
            image_processor,
            image_size,
            None,
            "default",
            trust_remote_code,
            plain,
            run=tower.examine,
        )
        findings.report.image_size = size
        findings.consult_table(tower)
        if spec is not None:
            return CheckedVision(tower, VisionPart(tower.run, processor, size, spec))
    return None


def _fuse(found: list[CheckedVision], vision_fusion: str) -> CheckedVision:
    specs = [checked.part.spec for checked in found]
    towers = [checked.weightless for checked in found]
    spec, layers = fused_spec(specs, vision_fusion), [None] * len(found)
    run = fuse_towers([tower.run for tower in towers], specs, layers, vision_fusion)
    fused = WeightlessPart(
        "vision",
        fuse_towers([tower.model for tower in towers], specs, layers, vision_fusion),
        given=None if all(tower.given is None for tower in towers) else run,
        run=run,
        known_from=", ".join(dict.fromkeys(tower.known_from for tower in towers)),
    )
    processor = FusedImageProcessor([checked.part.image_processor for checked in found])
    return CheckedVision(fused, VisionPart(run, processor, tuple(spec["image_size"]), spec))


def examine_pictures(vision: CheckedVision, source: Any, settings: dict, findings: Findings) -> PicturePlan | None:
    """How pictures come to the tower, written into the report; `None` if they cannot.

    Args:
        settings: Arguments of `plan_pictures`.
    """
    report, part = findings.report, vision.part
    with findings.refusals():
        plan = plan_pictures(part, source, **settings)
        spec, views = part.spec, plan.measured.image_views
        report.image_size = part.size
        report.image_views = views
        report.one_size = views is None and makes_one_size(plan.image_processor, spec)
        view = (
            grids_of_sizes(plan.image_processor, spec, [part.size])[0]
            if views is None
            else feature_grids(plan.measured, plan_views(views, *part.size))[0]
        )
        report.grid = token_grid(plan.measured.projector_config, view)
        report.tokens_per_picture, *others = plan.num_tokens([part.size, *USUAL_SIZES])
        report.tokens_of_sizes = {
            f"{height}x{width}": tokens for (height, width), tokens in zip(USUAL_SIZES, others, strict=True)
        }
        return plan
    return None
