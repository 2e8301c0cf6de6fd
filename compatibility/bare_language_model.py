"""What a language model can do by itself: the oracle for what a composed model may lack."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def bare_padding_works(
    language_model: nn.Module, side: str, lengths: Sequence[int] = (4, 9), tolerance: float = 1e-4
) -> bool:
    """Whether a language model by itself gives padded texts of these lengths the logits of each text alone, as ids and as
    embeddings, and left-padded ones the same answers.

    With positions that do not count padding where the model takes positions: the best that a caller can do.
    """
    parameters = inspect.signature(language_model.forward).parameters
    texts = [[11 + (10 * row + index) % 70 for index in range(length)] for row, length in enumerate(lengths)]
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), 3)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        columns = slice(longest - len(text), longest) if side == "left" else slice(0, len(text))
        ids[row, columns] = torch.tensor(text)
        mask[row, columns] = 1

    def logits(ids: torch.Tensor, mask: torch.Tensor, embedded: bool) -> torch.Tensor:
        arguments = {"attention_mask": mask}
        if "position_ids" in parameters:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if embedded:
            return language_model(inputs_embeds=language_model.get_input_embeddings()(ids), **arguments).logits
        return language_model(input_ids=ids, **arguments).logits

    for embedded in (False, True) if "inputs_embeds" in parameters else (False,):
        together = logits(ids, mask, embedded)
        for row, text in enumerate(texts):
            alone = torch.tensor([text])
            expected = logits(alone, torch.ones_like(alone), embedded)[0]
            if (together[row][mask[row].bool()] - expected).abs().max() >= tolerance:
                return False
    if side == "left":
        generation = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        answers = language_model.generate(ids, attention_mask=mask, **generation)[:, -3:]
        for row, text in enumerate(texts):
            alone = torch.tensor([text])
            answer = language_model.generate(alone, attention_mask=torch.ones_like(alone), **generation)[0, -3:]
            if not torch.equal(answers[row], answer):
                return False
    return True


def bare_cache_works(language_model: nn.Module, new_tokens: int) -> bool:
    """Whether a language model by itself continues a text with a cache as without: a short one and one beyond any
    window here, from ids and from embeddings."""
    for length in (6, 40):
        ids = torch.arange(11, 11 + length).unsqueeze(0)
        with torch.no_grad():
            embeddings = language_model.get_input_embeddings()(ids)
        arguments = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
        }
        for inputs in ({"input_ids": ids}, {"inputs_embeds": embeddings}):
            try:
                cached, uncached = (
                    language_model.generate(**inputs, **arguments, do_sample=False, use_cache=use_cache)
                    for use_cache in (True, False)
                )
            except Exception:  # noqa: BLE001 - however it fails, it does not work
                return False
            if not torch.equal(cached, uncached):
                return False
    return True
