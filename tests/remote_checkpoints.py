"""Write made-up checkpoints whose classes are in their own files, as those of Qwen-7B and MiniCPM-2B are."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_parts import VOCABULARY, make_sensitive, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model


SOURCES = Path(__file__).parent / "remote_parts"

#: folder -> (its config.json, the Auto class of its model)
PARTS = {
    "old_style_lm": (
        {
            "model_type": "made_up_old_style",
            "auto_map": {
                "AutoConfig": "configuration_part.OldStyleConfig",
                "AutoModelForCausalLM": "modeling_part.OldStyleLMHeadModel",
            },
            "architectures": ["OldStyleLMHeadModel"],
            "n_inner": 40,
            "torch_dtype": "float32",
        },
        AutoModelForCausalLM,
    ),
    "scaled_lm": (
        {
            "model_type": "made_up_scaled",
            "auto_map": {
                "AutoConfig": "configuration_part.ScaledConfig",
                "AutoModel": "modeling_part.ScaledModel",
                "AutoModelForCausalLM": "modeling_part.ScaledForCausalLM",
            },
            "architectures": ["ScaledForCausalLM"],
            "scale_emb": 6,
            "torch_dtype": "float32",
        },
        AutoModelForCausalLM,
    ),
    "tower": (
        {
            "model_type": "made_up_tower",
            "auto_map": {"AutoConfig": "configuration_part.PartConfig", "AutoModel": "modeling_part.MadeUpTower"},
            "architectures": ["MadeUpTower"],
            "torch_dtype": "float32",
        },
        AutoModel,
    ),
}

#: As Qwen-7B-Chat's: fields that transformers does not know, and sampling by default.
CHAT_GENERATION_CONFIG = {
    "chat_format": "chatml",
    "eos_token_id": 2,
    "pad_token_id": 2,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "repetition_penalty": 1.0,
}


def write_remote_part(directory: Path, part: str) -> Path:
    """Write a made-up part with random weights, and a tokenizer if it is a language model; returns its folder."""
    config, _ = PARTS[part]
    shutil.copytree(SOURCES / part, directory, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "config.json").write_text(json.dumps(config))
    if part == "old_style_lm":
        tiny_tokenizer(bos_token=None, pad_token=None).save_pretrained(directory)
        (directory / "generation_config.json").write_text(json.dumps(CHAT_GENERATION_CONFIG))
    elif part == "scaled_lm":
        tiny_tokenizer().save_pretrained(directory)
    model = _build(directory, part)
    make_sensitive(model, seed=2 if part == "tower" else 1)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if part == "scaled_lm":  # tied
        del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def load_reference(directory: Path, part: str) -> PreTrainedModel:
    """The part alone, built by its own `__init__`, with its weights put in: transformers 5 would leave what code of this
    kind computes uninitialised."""
    model = _build(directory, part)
    missing, unexpected = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model.eval()


def _build(directory: Path, part: str) -> PreTrainedModel:
    config, auto_class = AutoConfig.from_pretrained(directory, trust_remote_code=True), PARTS[part][1]
    # As an Auto class does; the second time in a process, that one would forget to add `generate`.
    model_class = get_class_from_dynamic_module(config.auto_map[auto_class.__name__], directory)
    model_class.register_for_auto_class(auto_class)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return add_generation_mixin_to_remote_model(model_class)._from_config(config)


def use_remote_tokenizer(directory: Path) -> None:
    """Replace the tokenizer of an `old_style_lm` by the one whose class is in its folder."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    (directory / "words.made_up").write_text("\n".join(VOCABULARY))
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_part.PartTokenizer", None]},
        "tokenizer_class": "PartTokenizer",
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "model_max_length": 256,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def use_remote_image_processor(directory: Path) -> None:
    """Give the `tower` the image processor whose class is in its folder."""
    config = {
        "auto_map": {"AutoImageProcessor": "image_processing_part.PartImageProcessor"},
        "image_processor_type": "PartImageProcessor",
        "edge": 32,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
