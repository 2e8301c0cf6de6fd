"""A composed model with tiny parts, made so that a check sees whatever goes astray in it."""

import copy
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig

import anyvlm

from ..composition.parts import load_language_model
from ..composition.starting_scale import embedding_rms
from ..modeling.cross_attention import TanhGate
from ..modeling.gated_fusion import GatedFusion
from .tiny_tokenizer import make_sensitive, tiny_tokenizer


#: What the processor makes of the text; everything else is of the pictures.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def require(condition, message: str) -> None:
    """`assert` that also holds where Python runs without assertions."""
    if not bool(condition):
        raise AssertionError(message)


def picture(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A random RGB picture of `(height, width)` pixels with structure at several scales."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


class ModelUnderTest:
    """A composed model and the bare language model it was made from.

    Args:
        vision, text: Configs of the parts, tiny ones.
        image_size: Edge of the pictures in pixels, unless their own is kept.
        seed: For the weights, which are random and large enough for a lost token or picture to show.
        new_tokens: How many tokens are generated where generation is checked.
        picture_size: Height and width of the pictures it is shown.
        compose_arguments: Handed to `anyvlm.compose`.

    Raises:
        CompositionError: the parts cannot be composed.
    """

    #: For `from_pretrained`; parts with code of their own need `trust_remote_code`.
    load_arguments: ClassVar[dict] = {}

    def __init__(
        self,
        vision: PreTrainedConfig,
        text: PreTrainedConfig,
        image_size: int,
        seed: int = 0,
        new_tokens: int = 6,
        picture_size: tuple[int, int] = (50, 40),
        **compose_arguments,
    ):
        self.new_tokens = new_tokens
        self.picture_size = picture_size
        torch.manual_seed(seed)
        language_model = load_language_model(text).eval()
        make_sensitive(language_model, seed=3 * seed + 1)
        self.bare_language_model = copy.deepcopy(language_model)
        views = compose_arguments.get("views")
        keeps_sizes = (views["type"] if isinstance(views, dict) else views) == "native"
        self.model, self.processor = anyvlm.compose(
            vision=vision,
            text=language_model,
            tokenizer=tiny_tokenizer(),
            image_size=None if keeps_sizes else image_size,
            seed=seed,
            **compose_arguments,
        )
        make_sensitive(self.model.vision_tower, seed=3 * seed + 2)
        make_sensitive(self.model.multi_modal_projector, seed=3 * seed + 3)
        if self.model.fusion is not None:
            set_gates(self.model.fusion, 0.7)  # closed ones would hide whatever goes astray
        self._fit_batch_norms()
        self._match_embedding_scale()

    @torch.no_grad()
    def _match_embedding_scale(self) -> None:
        """Scale the image tokens as composing does, for the tower as it is now; somewhat larger than the text's
        embeddings, so that a tiny model with random weights tells pictures apart."""
        inputs = self.one_picture()
        tokens = torch.cat(list(self.model.get_image_features(**self.image_inputs(inputs)).pooler_output))
        scale = 3 * embedding_rms(self.model.language_model) / tokens.square().mean().sqrt()
        output_layer = self.model.multi_modal_projector.output_layer
        if output_layer is not None:
            output_layer.weight.mul_(scale)

    @torch.no_grad()
    def _fit_batch_norms(self) -> None:
        """Give batch norms the statistics of some pictures, as training would; with none, deep random maps are
        constant."""
        norms = [
            module
            for module in self.model.vision_tower.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        ]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        # Several pictures: the variance of a few values can be tiny, and rounding would be blown up by it.
        inputs = self.inputs([" ".join(["<image>"] * 8)], [self.picture(seed) for seed in range(5, 13)])
        self.model.get_image_features(**self.image_inputs(inputs))
        self.model.vision_tower.eval()
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum

    def inputs(self, texts: list[str], pictures: list, **kwargs):
        return self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt", **kwargs)

    @staticmethod
    def image_inputs(inputs) -> dict:
        return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}

    def picture(self, seed: int) -> Image.Image:
        return picture(seed, self.picture_size)

    def one_picture(self, seed: int = 0):
        return self.inputs(["w1 w2 <image> w3 w4 w5"], [self.picture(seed)])

    def logits(self, inputs) -> torch.Tensor:
        return self.logits_of(self.model, inputs)

    @staticmethod
    @torch.no_grad()
    def logits_of(model: nn.Module, inputs) -> torch.Tensor:
        return model(**inputs).logits

    def generate(self, inputs, model=None, **kwargs) -> torch.Tensor:
        """Greedy new tokens `(batch, new_tokens)`; eos is off, so that every run has the same length."""
        sequences = (model or self.model).generate(
            **inputs, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens, do_sample=False, **kwargs
        )
        return sequences[:, inputs["input_ids"].shape[1] :]

    def checkpointing_parts(self) -> list[str]:
        """The parts that support gradient checkpointing."""
        parts = {"tower": self.model.vision_tower, "language model": self.model.language_model}
        return [name for name, part in parts.items() if part.supports_gradient_checkpointing]

    def uses_cache(self) -> bool:
        return self.model.language_model_interface.spec["use_cache"]


@torch.no_grad()
def set_gates(fusion: nn.Module, openness: float) -> None:
    """Set the gates of a fusion: 0 closes them. A tanh gate gets the value, a sigmoid gate is closed by its bias."""
    for module in fusion.modules():
        if isinstance(module, TanhGate):
            module.gate.fill_(openness)
        elif isinstance(module, GatedFusion):
            module.gate.bias.fill_(2.0 if openness else -100.0)


def is_tied(model: nn.Module) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
