"""Whether a class of transformers could hold the same pair: found out by building and running it."""

import copy
import math

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from .running import num_channels, synthetic_pictures
from .small_copies import build_on_meta
from .weightless_parts import WeightlessPart


#: Pictures of more tokens than these are not run through another class: it would take longer than all the rest.
_MAX_TOKENS = 2000


def describe_llava(tower: WeightlessPart, language_model: WeightlessPart, spec: dict) -> str:
    """One line on `LlavaForConditionalGeneration` with this tower and this language model.

    It is built on the meta device in full size, then run with small copies of the parts: on two pictures, and on a text
    beside the language model itself.

    Args:
        spec: The tower's `vision_tower_spec`.
    """
    for part in (tower, language_model):
        # transformers would ask on the terminal whether to run the checkpoint's code.
        if getattr(part.model.config, "part_code", None) is not None:
            return f"no; {type(part.model).__name__} is code of its checkpoint, which that class does not carry"
    try:
        llava = build_on_meta(LlavaForConditionalGeneration, _llava_config(tower.model, language_model.model, spec))
    except Exception as error:  # noqa: BLE001 - whatever a class of transformers says about parts it does not fit
        return f"no; it cannot be built from these parts: {_first_line(error)}"
    if type(llava.model.vision_tower) is not type(tower.model):
        return f"no; it would take {type(llava.model.vision_tower).__name__} as its tower"
    # Instances are not run in it: it would need a second copy of their weights.
    small_parts = [None if part.given is not None else part.run for part in (tower, language_model)]
    if None in small_parts or math.prod(spec["grid"]) > _MAX_TOKENS:
        return "perhaps; it can be built, and was not run here"
    small_tower, small_language_model = small_parts
    small = LlavaForConditionalGeneration(_llava_config(small_tower, small_language_model, spec)).eval()
    try:
        sees = _sees_pictures(small, spec)
    except Exception as error:  # noqa: BLE001 - as above
        return f"no; it builds but fails on a picture: {_first_line(error)}"
    if not sees:
        return "no; it runs, but another picture gives the same logits"
    try:
        equal = _gives_the_same_text(small, small_language_model)
    except Exception as error:  # noqa: BLE001 - as above
        return f"no; it does not take the language model's weights: {_first_line(error)}"
    if not equal:
        return f"no; it gives other logits for a text than {type(language_model.model).__name__}"
    beside = spec["num_prefix_tokens"] + spec["num_suffix_tokens"]
    extra = ", with the tower's tokens beside the patches" if beside and not _drops_first(spec) else ""
    return f"yes; built in full size, run with small copies{extra}"


def _llava_config(tower, language_model, spec: dict) -> LlavaConfig:
    embeddings = language_model.get_input_embeddings().weight.shape[0]
    return LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(language_model.config),
        image_token_index=embeddings - 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default" if _drops_first(spec) else "full",
        tie_word_embeddings=bool(getattr(language_model.config, "tie_word_embeddings", False)),
    )


def _drops_first(spec: dict) -> bool:
    """LLaVA drops the first token of every picture, or none."""
    return (spec["num_prefix_tokens"], spec["num_suffix_tokens"]) == (1, 0)


def _sees_pictures(llava: LlavaForConditionalGeneration, spec: dict) -> bool:
    tower = llava.model.vision_tower
    pictures = synthetic_pictures(2, num_channels(tower.config), tuple(spec["image_size"])).to(tower.dtype)
    num_tokens = math.prod(spec["grid"])
    if not _drops_first(spec):
        num_tokens += spec["num_prefix_tokens"] + spec["num_suffix_tokens"]
    ids = torch.tensor([[2, *[llava.config.image_token_id] * num_tokens, 3, 4]] * 2)
    first, second = llava(input_ids=ids, pixel_values=pictures, logits_to_keep=1).logits
    return bool((first != second).any())


def _gives_the_same_text(llava: LlavaForConditionalGeneration, language_model: PreTrainedModel) -> bool:
    """Whether LLaVA with the language model's weights gives its logits. Larger weights than random ones let a scale or
    cap of the logits show."""
    oracle = copy.deepcopy(language_model)
    generator = torch.Generator().manual_seed(0)
    for parameter in oracle.parameters():
        if parameter.is_floating_point() and parameter.ndim >= 2:
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    llava.model.language_model.load_state_dict(oracle.base_model.state_dict())
    llava.lm_head.load_state_dict(oracle.get_output_embeddings().state_dict())
    ids = torch.arange(2, 10)[None]
    expected = oracle(input_ids=ids).logits
    return torch.allclose(llava(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= 160 else text[:159] + "…"


def describe_servers(tower: PreTrainedModel, language_model: PreTrainedModel) -> dict[str, str]:
    """What is known of servers. Nothing is started here: conditions that can be read off the parts are."""
    lacking = [type(part).__name__ for part in (tower, language_model) if not part._supports_attention_backend]
    if lacking:
        vllm = (
            f"no; its Transformers backend wants attention that can be replaced, which {' and '.join(lacking)} lacks"
        )
    else:
        vllm = "not tried; both parts have the attention interface that its Transformers backend wants"
    return {
        "transformers": "yes; pipeline('image-text-to-text') with trust_remote_code=True",
        "transformers serve": "not tried; stock, it takes no classes that come with a checkpoint",
        "vLLM": vllm,
    }
