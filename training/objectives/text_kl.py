"""The language model stays near itself as it was, on text: learning without forgetting (Li & Hoiem 2016)."""

import contextlib
import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, ProcessorMixin
from transformers.utils import is_peft_available

from ..collator import AnyVlmDataCollator, place_media
from ..text_replay import BESIDE
from .base import Objective, ObjectiveBatch
from .fingerprint import weights_fingerprint
from .picture_features import composed_model


#: So many batches without any text are one too many to say nothing.
_BATCHES_WITHOUT_TEXT = 50


class TextKLObjective(Objective):
    """Kullback-Leibler divergence of the language model from itself as it was, `KL(original ‖ trained)`, at every token of
    the samples without pictures: what the original thinks probable must stay probable.

    The samples are plain text (`{"text": …}`) or conversations without pictures, as `mix_text_replay` puts them among
    the others; and the texts that `put_texts_beside` puts beside them, which have no other loss. They run by themselves, the
    former a second time, so the measure is the same with packed batches.

    The original is a frozen copy; for a model with adapters, and nothing else of the language model trained, it is the same
    model with the adapters switched off, and takes no memory. It is in no checkpoint. A run that goes on after a break makes
    it as it was made at first, from the model that the run began with, or from `original`; a fingerprint of its weights
    in the checkpoint is compared, so that an original that is another one by then is an error.

    Args:
        model: What is trained. Without `original`, its language model is copied as it is now.
        original: A composed model, or a causal language model with the same tokens, or the path of one: such as what the
            first stage of a training began with.
        dtype: Of the copy: `"bfloat16"` takes half the memory. Default: as it is.
        chunk_size: Tokens at which both distributions are in single precision at one time; the backward pass computes them
            again. What remains are the logits of both, in the model's dtype.

    Raises:
        ValueError: adapters are on the model, but other weights of its language model are trained, too, and there is no
            `original`.
    """

    def __init__(
        self,
        model: nn.Module,
        original: PreTrainedModel | str | os.PathLike | None = None,
        dtype: torch.dtype | str | None = None,
        chunk_size: int = 256,
    ):
        super().__init__()
        self.chunk_size = chunk_size
        self._batches_without_text = 0
        # In a list, so that it is no module of this one: no checkpoint holds it.
        self._copy: list[nn.Module] = []
        if original is None and _has_adapters(model):
            with model.disable_adapter():
                trained = [
                    name for name, p in composed_model(model).language_model.named_parameters() if p.requires_grad
                ]
            if trained:
                raise ValueError(
                    f"The language model has adapters, but {', '.join(trained[:3])}, … are trained beside them, so it is "
                    "not the original with the adapters switched off. Pass original=…, or freeze them."
                )
            return
        if isinstance(original, (str, os.PathLike)):
            original = AutoModelForCausalLM.from_pretrained(original)
        language_model = _language_model(model if original is None else original)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        frozen = copy.deepcopy(language_model).to(dtype=dtype or language_model.dtype)
        self._copy.append(frozen.eval().requires_grad_(False))

    def get_extra_state(self) -> torch.Tensor:
        return weights_fingerprint(self._copy[0]) if self._copy else torch.zeros(32, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise ValueError(
                "The original language model is not the one that this training began with. Make TextKLObjective with the "
                "model as it was then, not as a checkpoint of the training has it, or pass that one as original=…."
            )

    def collate(
        self, samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], processor: ProcessorMixin
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` `(samples without pictures, length)`; nothing if there are none."""
        texts = [sample for sample in samples if _is_text(sample)]
        texts += [text for sample in samples for text in sample.get(BESIDE, ())]
        if not texts:
            return {}
        rows = AnyVlmDataCollator(processor)(texts)
        return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}

    def forward(self, batch: ObjectiveBatch) -> torch.Tensor | None:
        """The divergence in nats, mean over the tokens that are followed by another."""
        if not batch.extra:
            self._batches_without_text += 1
            if self._batches_without_text == _BATCHES_WITHOUT_TEXT:
                warnings.warn(
                    f"TextKLObjective has seen no text in {_BATCHES_WITHOUT_TEXT} batches, so nothing keeps the language "
                    "model near itself. Mix samples without pictures into the training (mix_text_replay, put_texts_beside).",
                    stacklevel=2,
                )
            return None
        inputs = {**batch.extra, "use_cache": False}
        original = self._original_logits(batch.model, inputs)
        # Not through what wraps the model in a run of several processes: that counts on one forward pass per step.
        trained = composed_model(batch.model)(**inputs).logits
        mask = batch.extra["attention_mask"]
        weights = nn.functional.pad(mask[:, :-1] * mask[:, 1:], (0, 1)).flatten().float()
        width = min(original.shape[-1], trained.shape[-1])  # one of them may have words that were added later
        total = trained.new_zeros((), dtype=torch.float32)
        pieces = (tensor[..., :width].flatten(0, 1).split(self.chunk_size) for tensor in (trained, original))
        for own, others, weight in zip(*pieces, weights.split(self.chunk_size)):
            total = total + checkpoint(_weighted_divergence, own, others, weight, use_reentrant=False)
        return total / weights.sum().clamp(min=1)

    @torch.no_grad()
    def _original_logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        if self._copy:
            self._copy[0].to(inputs["input_ids"].device)
            return self._copy[0](**inputs).logits
        adapted = extract_model_from_parallel(model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(adapted.disable_adapter())
            adapted.eval()
            stack.callback(adapted.train)
            return composed_model(adapted)(**inputs).logits


def _weighted_divergence(trained: torch.Tensor, original: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of `KL(original ‖ trained)`, from logits `(tokens, vocabulary)`."""
    logs = trained.float().log_softmax(-1), original.float().log_softmax(-1)
    return (nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1) * weights).sum()


def _language_model(model: nn.Module) -> PreTrainedModel:
    """Of a composed model in whatever wraps it; or the model itself."""
    try:
        return composed_model(model).language_model
    except ValueError:
        return model


def _has_adapters(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _is_text(sample: Mapping[str, Any]) -> bool:
    return sample.get("messages") is None or not any(place_media(sample)[1].values())
