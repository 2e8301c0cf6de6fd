"""Find out whether a language model carries the masks that `image_attention` asks for, by running it on nine tokens."""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..modeling.image_features import AnyVlmImageFeatures
from .errors import CompositionError
from .language_model_probe import plain_words, relative_error, rounding
from .running import in_mode


_PICTURES = ((1, 4), (5, 7))
_LENGTH, _ANSWER, _PADDING = 9, 7, 3

#: What rounding makes of an equal run of the same shapes is nothing, or in a mixture of experts about this much.
_LEAST_CHANGE, _STEPS = 1e-6, 4


@torch.no_grad()
def probe_image_attention(model: PreTrainedModel) -> None:
    """Run the composed model on a text with two pictures of random tokens, and change some of them.

    Raises:
        CompositionError: image tokens do not see what `image_attention` of the config says, or text sees later text, or
            decoding with the cache gives something else than the whole text does.
    """
    image_attention = model.config.image_attention
    if image_attention == "causal":
        return
    name = type(model.language_model).__name__
    advice = 'Use image_attention="causal", or a language model such as llama, qwen3 or gemma3.'
    with in_mode(model):
        try:
            problem = _problem(model, image_attention)
        except Exception as error:  # noqa: BLE001 - whatever it raises, it does not take such masks
            problem = f"is called with them and fails ({type(error).__name__}: {error})"
    if problem:
        raise CompositionError(
            f"{name} cannot be given the masks that image_attention={image_attention!r} needs: it {problem}. {advice}"
        )


def _problem(model: PreTrainedModel, image_attention: str) -> str | None:
    run = _Run(model)
    plain = run.logits()
    later = run.logits(changed=[2, 3])  # the rest of the first picture
    if not run.differs(plain, later, 1):
        return "lets an image token see no later one"
    if image_attention == "prefix" and not run.differs(plain, later, 0):
        return "lets the text of the prompt see no later token"
    if image_attention == "bidirectional":
        second = run.logits(changed=[5, 6])
        if not all(run.agrees(plain, second, place) for place in range(5)):
            return "lets tokens see a later picture than their own"
        if not run.agrees(plain, later, 0):
            return "lets text see a later picture"
    answer = run.logits(changed=[_LENGTH - 1])
    if not all(run.agrees(plain, answer, place) for place in range(_LENGTH - 1)):
        return "lets tokens see later text"
    if model.language_model_interface.spec["use_cache"] and not run.decodes(plain):
        return "decodes with its cache something else than without"
    for side in ("left", "right"):
        if model.language_model_interface.spec[f"{side}_padding"] and not run.takes_padding(plain, side):
            return f"gives something else for text padded on the {side}"
    return None


class _Run:
    """The model on `text, picture (3 tokens), text, picture (2 tokens), answer (2 tokens)`."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.dtype = model.language_model.dtype
        words = plain_words(model.language_model, _LENGTH + 1, avoid=model.config.image_token_id)
        self.input_ids, self.other_word = words[:, :-1].clone(), words[0, -1]
        embedded = model.get_input_embeddings()(words)[0]
        noise = torch.randn(2, _LENGTH, embedded.shape[-1], generator=torch.Generator().manual_seed(0))
        self.tokens, self.other_tokens = noise.to(embedded) * embedded.float().square().mean().sqrt().to(embedded)
        for start, end in _PICTURES:
            self.input_ids[:, start:end] = model.config.image_token_id
        self.token_type_ids = (torch.arange(_LENGTH, device=words.device) >= _ANSWER).long().unsqueeze(0)

    def logits(self, changed: list[int] | None = None) -> torch.Tensor:
        """`(sequence, vocabulary)` in fp32, with other tokens at the places `changed`."""
        tokens, input_ids = self.tokens.clone(), self.input_ids.clone()
        for place in changed or []:
            tokens[place] = self.other_tokens[place]
            if not any(start <= place < end for start, end in _PICTURES):
                input_ids[:, place] = self.other_word
        return self._forward(input_ids, self._pictures(tokens)).logits[0].float()

    def decodes(self, expected: torch.Tensor) -> bool:
        cache = DynamicCache(config=self.model.language_model.config)
        prompt = self._forward(self.input_ids[:, :_ANSWER], self._pictures(self.tokens), past_key_values=cache)
        steps = [prompt.logits[0, -1]]
        for place in range(_ANSWER, _LENGTH):
            past = prompt.get("past_key_values")
            if past is None:
                return False
            step = self._forward(self.input_ids[:, place : place + 1], None, past_key_values=past)
            steps.append(step.logits[0, -1])
        found = torch.stack(steps).float()
        return relative_error(found, expected[_ANSWER - 1 :]) <= rounding(self.dtype, 4 * _STEPS)

    def takes_padding(self, expected: torch.Tensor, side: str) -> bool:
        before, after = (_PADDING, 0) if side == "left" else (0, _PADDING)
        padding = self.other_word.expand(1, _PADDING)
        input_ids = torch.cat([padding, self.input_ids] if before else [self.input_ids, padding], dim=1)
        attention_mask = torch.nn.functional.pad(torch.ones_like(self.input_ids), (before, after))
        types = torch.nn.functional.pad(self.token_type_ids, (before, after))
        logits = self._forward(input_ids, self._pictures(self.tokens), types, attention_mask=attention_mask).logits
        found = logits[0, before : before + _LENGTH].float()
        return relative_error(found, expected) <= rounding(self.dtype, 4 * _STEPS)

    def differs(self, logits: torch.Tensor, others: torch.Tensor, place: int) -> bool:
        return relative_error(others[place], logits[place]) > _LEAST_CHANGE

    def agrees(self, logits: torch.Tensor, others: torch.Tensor, place: int) -> bool:
        return relative_error(others[place], logits[place]) <= rounding(self.dtype, _STEPS)

    def _pictures(self, tokens: torch.Tensor) -> dict:
        pooler_output = [tokens[start:end] for start, end in _PICTURES]
        grids = [(1, len(tokens)) for tokens in pooler_output]
        return {"image": AnyVlmImageFeatures(pooler_output=pooler_output, token_grids=grids)}

    def _forward(self, input_ids: torch.Tensor, pictures: dict | None, types: torch.Tensor | None = None, **kwargs):
        if types is None:
            types = self.token_type_ids[:, : input_ids.shape[1]]
        return self.model(input_ids=input_ids, mm_encoder_outputs=pictures, token_type_ids=types, **kwargs)
