"""Is an imported model its native model? Every check of a case, with the native model of transformers as the oracle."""

import copy
from dataclasses import dataclass, field

import torch
import transformers
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ..composition.errors import CompositionError
from ..composition.native import family_of, from_native, to_native
from ..composition.native.equality import logits_of, sample_picture
from .native_cases import NativeCase
from .tiny_tokenizer import make_sensitive


#: Of the table. The tests take the first alone.
SEEDS = (0, 1, 2)

#: Largest difference of logits in fp32.
TOLERANCE = 1e-5

#: What logits are compared on.
KINDS = ("one image", "several images", "mixed sizes", "padded batch")

NEW_TOKENS = 16


@dataclass
class CaseResult:
    """What was found over all seeds, tied and untied.

    Args:
        differences: Kind -> largest difference of logits; a kind that the family cannot take is left out.
        greedy: Whether greedy generation gave the same tokens everywhere.
        processor: Whether both processors made the same `input_ids`, `attention_mask` and `pixel_values`.
        to_native: Whether the way back gave the same keys and equal tensors.
        problems: What was not equal, in words.
    """

    name: str
    model_class: str
    differences: dict[str, float] = field(default_factory=dict)
    greedy: bool = True
    processor: bool = True
    to_native: bool = True
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def check_case(case: NativeCase, seeds: tuple[int, ...] = SEEDS[:1]) -> CaseResult:
    """Build the native model for each seed, tied and untied, import it, and compare everything.

    Weights are large, so that a token or a picture that goes astray shows (`make_sensitive`).
    """
    family = family_of(case.config(case.ties[0]))
    result = CaseResult(case.name, family.model_class)
    for seed in seeds:
        for tied in case.ties:
            where = f"seed {seed}, {'tied' if tied else 'untied'}"
            native, native_processor = build_native(case, seed, tied)
            try:
                _check_one(case, native, native_processor, where, result)
            except CompositionError as error:
                result.problems.append(f"refused: {error} ({where})")
    return result


def build_native(case: NativeCase, seed: int, tied: bool) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A native model with random weights of some size, and its processor."""
    config = case.config(tied)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        native = getattr(transformers, family_of(config).model_class)(config).eval()
    make_sensitive(native, seed + 1)
    return native, case.processor(config)


def case_chats(case: NativeCase) -> dict[str, tuple[list, list]]:
    """Kind -> chats, and the pictures of each."""
    same = [sample_picture(*case.sizes[0], seed=seed) for seed in range(3)]
    mixed = [sample_picture(*size, seed=seed) for seed, size in enumerate(case.sizes)]
    chats = {"one image": [mixed[:1]]}
    if case.max_images > 1:
        chats["several images"] = [same[: case.max_images]]
        chats["mixed sizes"] = [mixed[: case.max_images]]
        chats["padded batch"] = [mixed[: case.max_images], mixed[1:2]]
    else:
        chats["mixed sizes"] = [mixed[:1], mixed[1:2]]
        chats["padded batch"] = [mixed[:1], mixed[1:2]]
    return {
        kind: ([_chat(len(pictures), index) for index, pictures in enumerate(batch)], batch)
        for kind, batch in chats.items()
    }


def _chat(num_images: int, index: int) -> list[dict]:
    words = " ".join(f"w{7 * word % 80}" for word in range(3 + 5 * index))
    return [
        {"role": "user", "content": [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": words}]}
    ]


#: Padding on the left, as generation wants it, whatever side a tokenizer is set to.
_SETTINGS = {"padding": True, "padding_side": "left", "return_tensors": "pt"}


def _texts(processor: ProcessorMixin, chats: list) -> list[str]:
    return [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]


def _check_one(case: NativeCase, native, native_processor, where: str, result: CaseResult) -> None:
    before = {key: tensor.clone() for key, tensor in native.state_dict().items()}
    ours, processor = from_native(native, native_processor)
    family = family_of(native.config)
    # A native processor without a template is given the texts that ours writes.
    writer = processor if native_processor.chat_template is None else native_processor
    for kind, (chats, pictures) in case_chats(case).items():
        expected = family.call_processor(native_processor, _texts(writer, chats), pictures, **_SETTINGS)
        found = processor(text=_texts(processor, chats), images=pictures, **_SETTINGS)
        place = f"{kind}, {where}"
        if not _same_inputs(case, expected, found):
            result.processor = False
            result.problems.append(f"the processors' outputs differ ({place})")
            continue
        difference = _difference(native, case.oracle_inputs(expected), ours, found)
        result.differences[kind] = max(difference, result.differences.get(kind, 0.0))
        if not difference <= TOLERANCE:
            result.problems.append(f"logits differ by {difference:.3g} ({place})")
        if kind in ("one image", "padded batch") and not _same_generation(native, expected, ours, found):
            result.greedy = False
            result.problems.append(f"greedy tokens differ ({place})")
    # Without the packages that the native processor needs, the model alone.
    exported, _ = to_native(ours, None if family.missing_packages() else processor)
    after = exported.state_dict()
    same_class = type(exported) is type(native)
    if not same_class or before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in before):
        result.to_native = False
        result.problems.append(
            f"to_native(from_native(x)) gives {type(exported).__name__} with other tensors ({where})"
        )


def _same_inputs(case: NativeCase, expected: BatchFeature, found: BatchFeature) -> bool:
    return (
        torch.equal(expected["input_ids"], found["input_ids"])
        and torch.equal(expected["attention_mask"], found["attention_mask"])
        and torch.equal(case.pixel_values(expected), found["pixel_values"])
    )


def _difference(native, expected: BatchFeature, ours, found: BatchFeature) -> float:
    """The largest difference of logits where there is no padding."""
    with torch.no_grad():
        expected_logits, found_logits = logits_of(native, expected), logits_of(ours, found)
    attended = expected["attention_mask"].bool()
    return float((expected_logits - found_logits)[attended].abs().max())


def _same_generation(native, expected: BatchFeature, ours, found: BatchFeature) -> bool:
    """Ours never generates the placeholder of pictures; native classes may, so there it is suppressed."""
    placeholder = ours.config.image_token_id
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 3}
    oracle = copy.deepcopy(native.generation_config)
    oracle.suppress_tokens = [placeholder]
    wanted = native.generate(**expected, **settings, generation_config=oracle)
    made = ours.generate(**found, **settings)
    return torch.equal(wanted[:, -NEW_TOKENS:], made[:, -NEW_TOKENS:])
