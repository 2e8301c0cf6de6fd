"""Put a tower of another type into a tiny trained model and say what works: the checks of the table of swaps."""

import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..composition.errors import CompositionError
from ..configuration.image_views import has_newline
from ..modeling.fused_vision_towers import FusedVisionTowers
from ..swapping.alignment import AlignmentError, align
from ..swapping.feature_maps import core_projector, foldable_layer
from ..swapping.scaled_views import scaled_views
from ..swapping.vision_swap import swap_vision_tower
from . import tiny_configs
from .combinations import FUSIONS, PROJECTORS, VIEWS
from .composed_model import ComposedModel
from .fresh_logits import require_fresh_logits
from .model_under_test import picture, require
from .pair_checks import FAILS, REFUSED, PairResult, missing_library, one_line
from .plan import LANGUAGE_MODEL


#: Number and meaning of each check, in the order they are run.
SWAP_CHECKS = {
    "builds": "it is swapped in, and the logits are finite",
    "kept": "language model, fusion and newline are the same tensors, and of the projector those that need not change",
    "picture": "another picture changes the logits of the text after it, and of none before it",
    "tokens": "for pictures of several sizes the processor counts as many tokens as the model makes, and a picture of one "
    "view takes as many as before where both towers give rows and columns",
    "text": "text without a picture gives exactly the logits that it gave before",
    "gradients": "every part gets gradients, with gradient checkpointing the same ones; frozen parts get none",
    "save": "saved and loaded it gives the same logits and answers; of a sample, also in a new process without anyvlm",
    "back": "the old tower, put back, gives exactly the old logits where the projector's tensors all stayed, else a model "
    "that passes the first checks",
    "aligned": "fitted in closed form to 24 pictures without labels, it gives tokens of other pictures that are nearer to "
    "the old ones than before, or it says why that cannot be",
    "old": "the old model has the tensors, the config and the logits that it had",
}

SEPARATOR = " / "
#: How the old model is joined unless something else is drawn.
USUAL = ("mlp", "embed", "resize")
#: As `VIEWS`, with pictures of their own sizes for towers that take them, planned and as their image processors like.
SWAP_VIEWS = {**VIEWS, "own sizes": None}
#: Those of which pictures are not brought to one size.
OWN_SIZES = ("native", "own sizes")
#: What is tried again with a refused swap whose reason names it.
WAYS_OUT: dict[str, Any] = {"views": "resize", "projector": {"type": "mlp"}}


def join_name(projector: str, fusion: str, views: str) -> str:
    return SEPARATOR.join((projector, fusion, views))


def joined_models() -> list[str]:
    """`"projector / fusion / views"` of every way to join a model whose tower is exchanged."""
    return [join_name(p, f, v) for p in PROJECTORS for f in FUSIONS for v in SWAP_VIEWS]


class TrainedModel(ComposedModel):
    """A tiny model of which every weight is random and matters, with a tower of one type.

    Args:
        vision, text: Types.
        join: `"projector / fusion / views"`.
    """

    def __init__(self, vision: str, text: str, join: str, seed: int = 0):
        projector, fusion, views = join.split(SEPARATOR)
        edge = tiny_configs.picture_size(vision)
        # Wider than the tower's where pictures are cut, so that there is something to cut.
        wide = {} if views in ("resize", *OWN_SIZES) else {"picture_size": (edge, 2 * edge)}
        super().__init__(
            tiny_configs.vision_config(vision),
            tiny_configs.text_config(text),
            None if views in OWN_SIZES else edge,
            seed=seed,
            new_tokens=3,
            projector=PROJECTORS[projector],
            fusion=FUSIONS[fusion],
            views=SWAP_VIEWS[views],
            **wide,
        )


class TestedModel(ComposedModel):
    """A model as it is, with the checks of any composed model."""

    __test__ = False  # no test of pytest

    def __init__(self, model, processor, new_tokens: int = 3, picture_size: tuple[int, int] = (50, 40)):
        self.model, self.processor, self.bare_language_model = model, processor, model.language_model
        self.new_tokens, self.picture_size = new_tokens, picture_size

    def inputs(self, texts: list[str], pictures: list, **kwargs):
        return super().inputs(
            [text.replace("<image>", self.processor.image_token) for text in texts], pictures, **kwargs
        )


class Swap:
    """A trained model, the tower that is put into it, and the checks.

    Args:
        old: The trained model.
        tower: The new tower; a model instance.
        image_size: Edge of the pictures for the new tower; `None` for what it likes.
        arguments: For `swap_vision_tower`.

    Raises:
        CompositionError: the swap is refused.
    """

    def __init__(self, old: ComposedModel, tower, image_size: int | None, **arguments):
        self.old = old
        self.had = {name: tensor.clone() for name, tensor in old.model.state_dict().items()}
        self.had_settings = self._old_settings()
        self.had_logits = old.logits(old.one_picture())
        self.had_text_logits = old.logits(self._text())
        self.arguments = arguments
        #: What was fitted in closed form, `"features"` or `"tokens"`, or why nothing was.
        self.alignment: str | None = None
        swapped = swap_vision_tower(old.model, old.processor, tower, image_size=image_size, **arguments)
        self.new = self._tested(*swapped)

    @property
    def has_new_projector(self) -> bool:
        return "projector" in self.arguments

    def _tested(self, model, processor) -> TestedModel:
        return TestedModel(model, processor, self.old.new_tokens, self.old.picture_size)

    def _old_settings(self) -> tuple[dict, dict]:
        return copy.deepcopy((self.old.model.config.to_dict(), self.old.processor.to_dict()))

    def _text(self):
        return self.old.inputs(["w1 w2 w3 w4 w5 w6"], [])

    def check_kept(self) -> None:
        old, new = self.old.model, self.new.model
        require(new.language_model is old.language_model, "the language model is another")
        require(new.fusion is old.fusion, "the fusion is another")
        if has_newline(old.config.image_views) and has_newline(new.config.image_views):
            require(new.image_newline is old.image_newline, "the newline is another")
        if self.has_new_projector:
            return
        self._check_kept_projector("weight")

    def _check_kept_projector(self, *names: str) -> None:
        """Nothing of it changed but, where they must take new features, these tensors of its first layer."""
        changed = self.changed_projector_tensors() - self.needed_projector_tensors(*names)
        require(not changed, f"of the projector changed {', '.join(sorted(changed))}")

    def changed_projector_tensors(self) -> set[str]:
        """Tensors of the old projector's core that are not the same bit for bit in the new one."""
        old, new = (core_projector(each.model.multi_modal_projector).state_dict() for each in (self.old, self.new))
        require(old.keys() == new.keys(), "the projector is another")
        return {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}

    def needed_projector_tensors(self, *names: str) -> set[str]:
        """Those that must change for features of another width: a first layer that is linear takes the map into itself."""
        widths = [each.model.config.vision_tower_spec["hidden_size"] for each in (self.old, self.new)]
        core = core_projector(self.old.model.multi_modal_projector)
        layer = foldable_layer(core)
        if layer is None or (widths[0] == widths[1] and "bias" not in names):
            return set()
        return {f"{name}.{own}" for name, module in core.named_modules() if module is layer for own in names}

    @torch.no_grad()
    def check_tokens(self) -> None:
        height, width = self.new.picture_size
        for size in ((height, width), (2 * width, width), (height, 3 * height + 1)):
            counts = [self._num_tokens(each, size) for each in (self.old, self.new)]
            require(
                not self.keeps_tokens() or counts[0] == counts[1],
                f"a picture of {size} pixels took {counts[0]} tokens and takes {counts[1]}",
            )

    def _num_tokens(self, tested: ComposedModel, size: tuple[int, int]) -> int:
        return len(self._tokens(tested, picture(0, size)))

    @staticmethod
    def _tokens(tested: ComposedModel, shown: Image.Image) -> torch.Tensor:
        """Tokens that the model makes of a picture, which are as many as the processor counts."""
        inputs = tested.inputs(["<image>"], [shown])
        tokens = tested.model.get_image_features(**tested.image_inputs(inputs)).pooler_output
        require(len(tokens) == 1, f"one picture gives tokens of {len(tokens)}")
        placeholders = int((inputs["input_ids"] == tested.model.config.image_token_id).sum())
        expected = len(tokens[0]) if tested.model.fusion is None else 1
        require(
            placeholders == expected,
            f"of a picture of {shown.size} the processor makes {placeholders} placeholders, the model {expected} tokens",
        )
        return tokens[0]

    def keeps_tokens(self) -> bool:
        """Whether a picture must take as many tokens as before: it is one view, of one size, and in rows and columns."""
        specs = [each.model.config.vision_tower_spec for each in (self.old, self.new)]
        one_view = all(each.model.config.image_views is None for each in (self.old, self.new))
        has_grid = all(spec["grid"][0] > 1 or spec["grid"][1] == 1 for spec in specs)
        chosen = self.has_new_projector or self.arguments.get("image_tokens") == "own"
        return one_view and has_grid and not any(spec["any_size"] for spec in specs) and not chosen

    def check_text(self) -> None:
        found = self.new.logits(self._text())
        require(torch.equal(found, self.had_text_logits), "text alone gives other logits than before")

    def check_save(self, directory: Path, in_fresh_process: bool) -> None:
        self.new.check_save_and_load(directory, resize=False)
        if in_fresh_process:
            inputs = self.new.one_picture()
            require_fresh_logits(directory / "first", inputs, self.new.logits(inputs))

    def check_back(self) -> None:
        """The old tower put into the new model; what the config of the old model says is given where it was chosen."""
        old = self.old.model.config
        spec = old.vision_tower_spec
        size = None if spec["any_size"] else tuple(spec["image_size"])
        # That of pictures which are cut into patches has no size of its own.
        is_cut = (old.image_views or {}).get("cut_patches", False)
        image_processor = None if is_cut else self.old.processor.image_processor
        chosen = {"image_tokens": self.arguments.get("image_tokens", "keep")}
        if self.has_new_projector:
            chosen["projector"] = old.projector_config
        if "views" in self.arguments:
            chosen["views"] = scaled_views(old.image_views, spec["image_size"], spec["image_size"]) or "resize"
        tower = self.old.model.vision_tower
        if isinstance(tower, FusedVisionTowers):
            chosen["vision_fusion"] = tower.config.vision_fusion
            chosen["vision_feature_layer"] = tower.config.vision_feature_layers
            tower, image_processor, size = tuple(tower.towers), image_processor.image_processors, None
        else:
            chosen["vision_feature_layer"] = old.vision_feature_layer
            chosen["vision_feature_select_strategy"] = old.vision_feature_select_strategy
        again = self._tested(
            *swap_vision_tower(
                self.new.model,
                self.new.processor,
                tower,
                image_processor=image_processor,
                image_size=size,
                **chosen,
            )
        )
        again.check_forward_is_finite()
        again.check_picture_changes_logits()
        had_map = "aligned_features" in old.projector_config
        if not (self.has_new_projector or had_map or self.changed_projector_tensors()):
            found, expected = again.logits(again.one_picture()), self.had_logits
            require(found.shape == expected.shape, f"{found.shape[1]} tokens, before {expected.shape[1]}")
            require(
                torch.equal(found, expected),
                f"with the old tower the logits differ by {(found - expected).abs().max():.2g}",
            )

    def check_aligned(self) -> None:
        before = self._token_error()
        try:
            found = align(
                self.old.model,
                self.old.processor,
                self.new.model,
                self.new.processor,
                [self.new.picture(seed) for seed in range(20, 44)],
                is_replaced=self.has_new_projector,
                progress=False,
            )
        except AlignmentError as error:
            self.alignment = f"none: {error}"
            return
        self.alignment = found["target"]
        self.new.check_forward_is_finite()
        self.check_tokens()
        if found["target"] == "features" and not self.has_new_projector:
            self._check_kept_projector("weight", "bias")
        after = self._token_error()
        require(
            before is None or after < before,
            f"tokens were off by {before}, and are by {after} after they were fitted to the old ones",
        )

    @torch.no_grad()
    def _token_error(self) -> float | None:
        """Mean square of the differences to the old tokens; `None` where their numbers differ."""
        pairs = [
            [self._tokens(each, self.old.picture(seed)) for each in (self.old, self.new)] for seed in range(50, 58)
        ]
        if any(old.shape != new.shape for old, new in pairs):
            return None
        return float(torch.stack([(old - new).square().mean() for old, new in pairs]).mean())

    def check_old(self) -> None:
        now = self.old.model.state_dict()
        changed = [name for name, tensor in self.had.items() if not torch.equal(tensor, now[name])]
        require(not changed and now.keys() == self.had.keys(), f"of the old model changed {', '.join(changed)}")
        require(self._old_settings() == self.had_settings, "the old model's config or processor is another")
        found = self.old.logits(self.old.one_picture())
        require(torch.equal(found, self.had_logits), "the old model gives other logits")


def check_swap(old_type: str, text_type: str, combination: str, seed: int = 0, fresh: bool = False) -> PairResult:
    """Swap a tower for one of another type and run the checks. Whatever goes wrong is recorded, never raised.

    Args:
        old_type: Type of the tower that the trained model has.
        combination: `"new type / projector / fusion / views"`; where the old tower cannot be joined so, it is joined in
            the usual way.
        fresh: Load what was saved in a new process too, which takes some seconds.
    """
    new_type, join = combination.split(SEPARATOR, 1)
    result = PairResult(old_type, text_type, combination)
    start = time.monotonic()
    torch.manual_seed(seed)
    try:
        old, result.details["join"] = _trained(old_type, text_type, join, seed)
        tower = TrainedModel(new_type, LANGUAGE_MODEL, join_name(*USUAL), seed + 1).model.vision_tower
        any_size = result.details["join"].split(SEPARATOR)[2] in OWN_SIZES
        swap = Swap(old, tower, None if any_size else tiny_configs.picture_size(new_type))
    except (CompositionError, ImportError) as error:
        result.status, result.reason = REFUSED, missing_library(error) or one_line(error)
        _find_way_out(result, old, tower, new_type)
    except Exception as error:  # noqa: BLE001 - that something unforeseen happened is what the table must say
        result.failed["builds"] = one_line(error)
    else:
        result.details |= _details(swap)
        result.failed |= _run_checks(swap, fresh)
        result.details["alignment"] = swap.alignment
    if result.failed:
        result.status = FAILS
        check, found = next(iter(result.failed.items()))
        result.reason = f"{check}: {found}"
    result.seconds = round(time.monotonic() - start, 2)
    return result


def _trained(old_type: str, text_type: str, join: str, seed: int) -> tuple[ComposedModel, str]:
    """The trained model, and how it is joined."""
    try:
        return TrainedModel(old_type, text_type, join, seed), join
    except CompositionError:
        return TrainedModel(old_type, text_type, join_name(*USUAL), seed), join_name(*USUAL)


def _find_way_out(result: PairResult, old: ComposedModel, tower, new_type: str) -> None:
    """Do as the reason says, and as the next one says, until it works. It fails if a reason names nothing more to do."""
    arguments: dict[str, Any] = {}
    reason = result.reason
    while True:
        named = [name for name in WAYS_OUT if name in reason.lower() and name not in arguments]
        if not named:
            result.failed["builds"] = f"{result.reason} (With {arguments}: {reason})" if arguments else reason
            return
        arguments[named[0]] = WAYS_OUT[named[0]]
        try:
            swap = Swap(old, tower, tiny_configs.picture_size(new_type), **arguments)
        except CompositionError as error:
            reason = one_line(error)
            continue
        result.details["works_with"] = arguments
        result.failed |= _run_checks(swap, fresh=False)
        result.details["alignment"] = swap.alignment
        return


def _details(swap: Swap) -> dict[str, Any]:
    changed = swap.changed_projector_tensors()
    return {
        "tokens": [
            len(each.model.get_image_features(**each.image_inputs(each.one_picture())).pooler_output[0])
            for each in (swap.old, swap.new)
        ],
        "projector": "kept" if not changed else "first layer new",
        "aligned_grid": "aligned_grid" in swap.new.model.config.projector_config,
        "aligned_features": "aligned_features" in swap.new.model.config.projector_config,
    }


def _run_checks(swap: Swap, fresh: bool) -> dict[str, str]:
    directory = Path(tempfile.mkdtemp(prefix="anyvlm-swap-"))
    checks: dict[str, Callable[[], None]] = {
        "builds": swap.new.check_forward_is_finite,
        "kept": swap.check_kept,
        "picture": swap.new.check_picture_changes_logits,
        "tokens": swap.check_tokens,
        "text": swap.check_text,
        "gradients": swap.new.check_gradients,
        "save": lambda: swap.check_save(directory, fresh),
        "back": swap.check_back,
        "aligned": swap.check_aligned,
        "old": swap.check_old,
    }
    failed = {}
    try:
        for name, check in checks.items():
            try:
                check()
            except Exception as error:  # noqa: BLE001 - see above
                failed[name] = one_line(error)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return failed
