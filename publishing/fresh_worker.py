"""Load a checkpoint as its users will and try it. Run by path in a fresh process, without `anyvlm`.

Writes one JSON object per line to its standard output, each after `MARK`: the step that begins, the error, the result.
"""

import argparse
import gc
import importlib
import json
import platform
import sys
import traceback

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file


MARK = "anyvlm-check: "
QUESTION = "What is in this picture?"
NEW_TOKENS = 8

#: `(width, height)` of the pictures whose tokens are counted. The first one is asked about.
PICTURE_SIZES = ((320, 240), (64, 64), (1280, 720), (400, 1600))


class CheckFailed(Exception):
    """The checkpoint loads, but does not do what it must."""


def tell(**message) -> None:
    print(MARK + json.dumps(message), flush=True)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """The same patches of colour for the same seed, on every machine."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.NEAREST)


def require_code_of_checkpoint(loaded: object, what: str) -> None:
    """Refuse a class that came from elsewhere: it would prove nothing about the code in the checkpoint."""
    module = type(loaded).__module__
    if not module.startswith("transformers_modules."):
        raise CheckFailed(f"{what} is {module}.{type(loaded).__name__}, which is not the checkpoint's own code.")


def model_inputs(processor, image: Image.Image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def image_token_counts(processor, config) -> list[list[int]]:
    """`[width, height, image tokens]` of pictures of several sizes."""
    counts = []
    for size in PICTURE_SIZES:
        tokens = int((model_inputs(processor, picture(0, size))["input_ids"] == config.image_token_id).sum())
        if tokens == 0:
            raise CheckFailed(f"The chat template leaves a picture of {size[0]}x{size[1]} pixels out of the prompt.")
        counts.append([*size, tokens])
    return counts


def load_model(checkpoint: str, class_name: str):
    """The model, if every weight found its place."""
    model, info = getattr(transformers, class_name).from_pretrained(
        checkpoint, trust_remote_code=True, output_loading_info=True
    )
    require_code_of_checkpoint(model, "The model")
    for problem, meaning in (
        ("missing_keys", "are not in the checkpoint and would be random"),
        ("unexpected_keys", "are in the checkpoint, but the model has no place for them"),
    ):
        if info[problem]:
            names = sorted(info[problem])
            named = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
            raise CheckFailed(f"{len(names)} weights {meaning}: {named}.")
    return model.eval()


@torch.inference_mode()
def logits_and_picture_effect(model, inputs, other_pictures) -> tuple[torch.Tensor, float]:
    """Logits of the prompt, and by how much another picture changes those after its last token."""
    logits = model(**inputs).logits
    if not bool(torch.isfinite(logits).all()):
        raise CheckFailed("The logits are not finite.")
    changed = model(**{**inputs, "pixel_values": other_pictures}).logits
    effect = float((logits[:, -1].float() - changed[:, -1].float()).abs().max())
    if not effect > 0:
        raise CheckFailed("Another picture gives the same logits: the language model does not see pictures.")
    return logits, effect


@torch.inference_mode()
def greedy_tokens(model, inputs) -> torch.Tensor:
    """`NEW_TOKENS` new tokens, whatever the model's own sampling settings are."""
    sequences = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return sequences[:, inputs["input_ids"].shape[1] :]


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], than: str) -> None:
    """Logits and generated tokens, bit for bit."""
    if found["logits"].shape != expected["logits"].shape:
        shapes = f"{tuple(found['logits'].shape)} and {tuple(expected['logits'].shape)}"
        raise CheckFailed(f"Logits have another shape than {than}: {shapes}.")
    difference = float((found["logits"].float() - expected["logits"].float()).abs().max())
    if difference != 0:
        raise CheckFailed(f"Logits differ from those {than} by up to {difference:.3g}; they must be equal.")
    if not torch.equal(found["tokens"], expected["tokens"]):
        raise CheckFailed(f"Other tokens are generated than {than}.")


def check(arguments: argparse.Namespace) -> None:
    checkpoint = arguments.checkpoint
    tell(step="make sure that anyvlm cannot be imported")
    try:
        importlib.import_module("anyvlm")
    except ModuleNotFoundError:
        pass
    else:
        raise CheckFailed("anyvlm can be imported here, so this process proves nothing.")
    tell(step="load the config with AutoConfig")
    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    require_code_of_checkpoint(config, "The config")
    tell(step="load the processor with AutoProcessor")
    processor = transformers.AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    require_code_of_checkpoint(processor, "The processor")
    tell(step="make inputs from a picture and a question")
    inputs = model_inputs(processor, picture(0, PICTURE_SIZES[0]))
    other_pictures = model_inputs(processor, picture(1, PICTURE_SIZES[0]))["pixel_values"]
    token_counts = image_token_counts(processor, config)

    expected, than = None, ""
    if arguments.expected:
        expected, than = load_file(arguments.expected), "before the checkpoint was saved again"
    for class_name in arguments.classes:
        tell(step=f"load the model with {class_name}")
        model = load_model(checkpoint, class_name)
        tell(step=f"compute logits with {class_name}")
        logits, effect = logits_and_picture_effect(model, inputs, other_pictures)
        tell(step=f"generate with {class_name}")
        found = {"logits": logits.contiguous(), "tokens": greedy_tokens(model, inputs).contiguous()}
        if expected is None:
            expected, than = found, f"with {class_name}"
        else:
            tell(step=f"compare {class_name} with the first load")
            require_equal(found, expected, than)
        if class_name != arguments.classes[-1]:
            # Two copies of a big model may not fit.
            del model
            gc.collect()
    if arguments.save_to:
        tell(step="save the checkpoint again")
        model.save_pretrained(arguments.save_to)
        processor.save_pretrained(arguments.save_to)
    if arguments.logits_to:
        save_file(expected, arguments.logits_to)
    tell(
        result={
            "image_tokens": token_counts,
            "picture_effect": effect,
            "generated_tokens": expected["tokens"][0].tolist(),
            "generated_text": processor.decode(expected["tokens"][0], skip_special_tokens=True),
            "python_version": platform.python_version(),
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="folder of the checkpoint")
    parser.add_argument("--classes", nargs="+", required=True, help="Auto classes to load the model with, in turn")
    parser.add_argument("--expected", help="logits and tokens that must come out, written by --logits-to")
    parser.add_argument("--save-to", help="save the loaded checkpoint again, into this folder")
    parser.add_argument("--logits-to", help="write logits and tokens to this file")
    try:
        check(parser.parse_args())
    except Exception as error:
        traceback.print_exc()
        name = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
        tell(error=name + " ".join(str(error).split()))
        sys.exit(1)


if __name__ == "__main__":
    main()
