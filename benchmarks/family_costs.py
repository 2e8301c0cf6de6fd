"""What a converted model costs beside the native class it came from: prefill, decoding, training step, for each family.

The models are the tiny ones of `compatibility/native_cases`, made wide and deep enough that the work of a call is not all
overhead, with random weights. `anyvlm.from_native` puts the native model's own tensors into ours, so that both sides read
the same memory.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from costs import Setting, seconds_per_token
from measure import alternate, ratio_of, seconds_of
from torch import nn
from transformers import BatchFeature, GenerationConfig, PreTrainedConfig

import anyvlm
from anyvlm.compatibility.native_cases import NativeCase, native_cases
from anyvlm.composition.native import family_of
from anyvlm.composition.native.equality import sample_picture


#: Ours divided by native, at most, for each of the three costs.
TARGET = 1.03
COSTS = ("prefill", "decoding per token", "training step")

#: Settings of configs that are widths: all are multiplied by one factor, so that parts still fit one another.
_WIDTHS = frozenset({
    "alignment_intermediate_size", "embed_dim", "embedding_size", "encoder_hidden_size", "ffn_dim", "head_dim",
    "hidden_size", "hidden_sizes", "intermediate_size", "mrope_section", "out_hidden_size", "projection_dim",
    "query_pre_attn_scalar", "word_embed_proj_dim",
})  # fmt: skip
_DEPTHS = frozenset({"num_hidden_layers", "depth"})

#: Positions for the prompt, also of Q-Formers, which read it too.
_POSITIONS = 2048


@dataclass(frozen=True)
class Scale:
    """How much larger than in the tests the models are, and what they are given."""

    width: int = 16
    depth: int = 4
    words: int = 128
    new_tokens: int = 16
    supervised: int = 16


QUICK_SCALE = Scale(width=1, depth=1, words=16, new_tokens=4, supervised=4)


def family_cases(names: list[str] | None = None) -> dict[str, NativeCase]:
    """`model_type` of a native class -> its first case; those named, or all.

    Raises:
        ValueError: a name that no case has.
    """
    cases: dict[str, NativeCase] = {}
    for case in native_cases():
        cases.setdefault(case.config(case.ties[0]).model_type, case)
    unknown = [name for name in names or [] if name not in cases]
    if unknown:
        raise ValueError(f"No native family {', '.join(unknown)}. Choose from: {', '.join(sorted(cases))}.")
    return {name: cases[name] for name in sorted(names or cases)}


def scaled_config(config: PreTrainedConfig, scale: Scale) -> PreTrainedConfig:
    """A native config with all widths and depths multiplied."""
    return type(config).from_dict(_scaled(config.to_dict(), scale))


def _scaled(values: dict[str, Any], scale: Scale) -> dict[str, Any]:
    scaled = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _scaled(value, scale)
        elif key in _WIDTHS and value is not None:
            value = [scale.width * entry for entry in value] if isinstance(value, list) else scale.width * value
        elif key in _DEPTHS:
            value *= scale.depth
        elif key == "layer_types" and value:
            value = value * scale.depth
        elif key == "max_position_embeddings" and value is not None:
            value = max(value, _POSITIONS)
        scaled[key] = value
    return scaled


def compare_family(
    case: NativeCase, scale: Scale, setting: Setting, pairs: int, tick: Callable[[], None]
) -> list[dict]:
    """A line for each of `COSTS`; `tick` is called after each pair."""
    config = scaled_config(case.config(case.ties[0]), scale)
    torch.manual_seed(setting.seed)
    family = family_of(config)
    native = getattr(transformers, family.model_class)._from_config(config, dtype=setting.dtype)
    native = native.to(setting.device).eval()
    native_processor = case.processor(config)
    ours, processor = anyvlm.from_native(native, native_processor)
    # A native processor without a template is given the text that ours writes.
    writer = processor if native_processor.chat_template is None else native_processor
    pictures = [[sample_picture(*case.sizes[0])]]
    native_inputs = family.call_processor(native_processor, [_text(writer, scale)], pictures, return_tensors="pt")
    our_inputs = processor(text=[_text(processor, scale)], images=pictures, return_tensors="pt")
    inputs = {
        id(ours): _placed(our_inputs, setting),
        id(native): case.oracle_inputs(_placed(native_inputs, setting)),
    }
    for model in (ours, native):
        model.requires_grad_(True)
        # Generation to the full length whatever comes out of random weights: no token ends it.
        model.generation_config = GenerationConfig(pad_token_id=3, do_sample=False)
    lines = []
    for name, prepare in zip(COSTS, (_prefill, _decoding, _training)):
        calls = {id(model): prepare(model, inputs[id(model)], scale, setting) for model in (ours, native)}
        ratio = ratio_of(*alternate(calls[id(ours)], calls[id(native)], pairs, tick))
        lines.append({"name": name, "target": TARGET, "passed": ratio.median <= TARGET, **asdict(ratio)})
    return lines


def _text(processor, scale: Scale) -> str:
    words = " ".join(f"w{7 * word % 80}" for word in range(scale.words))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def _placed(inputs: BatchFeature, setting: Setting) -> BatchFeature:
    inputs = inputs.to(setting.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(setting.dtype)
    return inputs


def _prefill(model: nn.Module, inputs: dict, scale: Scale, setting: Setting) -> Callable[[], float]:
    def call() -> float:
        with torch.no_grad():
            return seconds_of(lambda: model(**inputs, use_cache=True), setting.device, setting.clock)

    return call


def _decoding(model: nn.Module, inputs: dict, scale: Scale, setting: Setting) -> Callable[[], float]:
    return lambda: seconds_per_token(model, inputs, scale.new_tokens, setting.clock)


def _training(model: nn.Module, inputs: dict, scale: Scale, setting: Setting) -> Callable[[], float]:
    """Forward, backward and AdamW on all parameters. The vocabulary is small, so that computing logits only where there
    is a label saves little: the benchmark with LLaVA measures that."""
    labels = copy.deepcopy(inputs["input_ids"])
    labels[:, : -scale.supervised] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)

    def step() -> None:
        model(**{**inputs, "labels": labels}).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def call() -> float:
        model.train()
        return seconds_of(step, setting.device, setting.clock)

    return call
