"""Check that a language model can be given image features, before anything is built around it."""

import torch
from torch import nn

from ..modeling.language_models import LanguageModelInterface
from .errors import CompositionError


@torch.no_grad()
def check_language_model(language_model: nn.Module) -> None:
    """Run the model on eight tokens, and refuse it if it cannot be the text part.

    Raises:
        CompositionError: it sees later tokens (an encoder), it cannot be given embeddings, or embeddings give other
            logits than the ids they were looked up from.
    """
    name = type(language_model).__name__
    interface = LanguageModelInterface(language_model)
    if "inputs_embeds" not in interface.argument_names:
        raise CompositionError(
            f"{name} takes no inputs_embeds, so image features cannot reach it. The nearest that works: a decoder such "
            "as llama, qwen3 or gpt2."
        )
    was_training = language_model.training
    language_model.eval()
    try:
        _check(language_model, interface, name)
    finally:
        language_model.train(was_training)


def _check(language_model: nn.Module, interface: LanguageModelInterface, name: str) -> None:
    embeddings = language_model.get_input_embeddings()
    device = embeddings.weight.device
    vocab_size = embeddings.weight.shape[0]
    input_ids = torch.arange(8, device=device).unsqueeze(0) % vocab_size
    position_ids = torch.arange(8, device=device).unsqueeze(0)

    def logits(**inputs) -> torch.Tensor:
        arguments = interface.arguments(position_ids=position_ids, use_cache=False, **inputs)
        return language_model(**arguments, return_dict=True).logits.float()

    from_ids = logits(input_ids=input_ids)
    if not bool(torch.isfinite(from_ids).all()):
        raise CompositionError(f"{name} gives logits that are not finite for plain text. Are its weights loaded?")
    # Equal runs differ by rounding at most (experts see other numbers of tokens); a leak is far above that.
    tolerance = 32 * torch.finfo(language_model.dtype).eps * float(from_ids.abs().max())

    other_end = input_ids.clone()
    other_end[:, -1] = (other_end[:, -1] + 1) % vocab_size
    if float((logits(input_ids=other_end) - from_ids)[:, :-1].abs().max()) > tolerance:
        raise CompositionError(
            f"{name} is an encoder: each token sees the tokens after it, so it cannot generate text. If its family has "
            "a decoder form, pass a config with is_decoder=True; the nearest that works: a decoder such as llama, "
            "qwen3 or gpt2."
        )
    no_image = torch.zeros_like(input_ids, dtype=torch.bool)
    from_embeddings = logits(
        inputs_embeds=embeddings(input_ids),
        **interface.embedding_arguments(language_model, input_ids, no_image, pad_token_id=0),
    )
    if float((from_embeddings - from_ids).abs().max()) > tolerance:
        raise CompositionError(
            f"{name} gives other logits for the embeddings of a text than for its ids, so image features would not "
            "reach it as text does. It is not supported yet; the nearest that works: llama, qwen3 or gemma3."
        )
