"""Whether a causal language model's logits are its head's output as it is.

Native vision-language classes put a linear head on the base model and stop there. The causal class of the same config may
scale or cap what the head gives (cohere, granite, gemma2, falcon_h1), and then the two differ; with small weights by less
than any comparison of numbers shows.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...modeling.language_models import base_language_model
from ..errors import CompositionError
from ..language_model_probe import plain_words
from ..running import in_mode


#: Settings of text configs that change logits behind the head -> the value that leaves them alone.
_NEUTRAL = {
    "final_logit_softcapping": None,
    "lm_head_multiplier": 1.0,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}


def remove_scales(text_config: PreTrainedConfig) -> None:
    """Set what changes logits behind the head to values that leave them alone, as a class does that does not read it."""
    for name, value in _NEUTRAL.items():
        if vars(text_config).get(name) is not None:
            setattr(text_config, name, value)


def removed_scales(native: PreTrainedConfig, text_config: PreTrainedConfig) -> dict[str, float]:
    """The settings of the native text config that `text_config` has not any more, so that the way back can bring them
    back: the class does not read them, but other software that runs its checkpoints may."""
    return {
        name: value
        for name in _NEUTRAL
        if (value := vars(native).get(name)) is not None and value != vars(text_config).get(name)
    }


@torch.no_grad()
def are_plain(language_model: PreTrainedModel) -> bool:
    """Run it on a few words with other numbers, of a wide range, in place of what the head gives, and see whether they
    come out as they are, and whether the head gets what the base model gives."""
    seen = {}

    def replace(head, inputs, output):
        seen["head"] = inputs[0]
        seen["replaced"] = torch.linspace(-1000, 1000, output.numel()).to(output).reshape(output.shape)
        return seen["replaced"]

    def remember(base, inputs, output):
        seen["base"] = output.last_hidden_state

    handles = [
        language_model.get_output_embeddings().register_forward_hook(replace),
        base_language_model(language_model).register_forward_hook(remember),
    ]
    try:
        with in_mode(language_model):
            logits = language_model(input_ids=plain_words(language_model, 4), use_cache=False, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
    return (
        logits.shape == seen["replaced"].shape
        and bool((logits == seen["replaced"]).all())
        and bool(torch.equal(seen["head"], seen["base"]))
    )


def require_plain(language_model: PreTrainedModel, class_name: str) -> None:
    """Refuse to import a language model whose logits are not its head's output.

    Raises:
        CompositionError: `class_name`, which takes that output as it is, gave other logits.
    """
    if not are_plain(language_model):
        raise CompositionError(
            f"{type(language_model).__name__} changes the logits that its head gives, and {class_name} does not, so the "
            "converted model would not be equal. To have the parts all the same, compose them with anyvlm.compose and "
            "train the projector."
        )
