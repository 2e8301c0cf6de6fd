"""What the demo composes: two small parts with random weights, or pretrained ones."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast, ResNetConfig

from ..composition.compose import compose
from ..composition.errors import CompositionError
from .data import KINDS, PICTURE_HEIGHT, PICTURE_WIDTH, WORDINGS


#: Pixels `(height, width)` that pretrained towers get. Their usual 224 would make the demo twenty times as long.
PRETRAINED_IMAGE_SIZE = (56, 112)
UNKNOWN, BEGIN, END, PADDING = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Parts:
    """The parts to compose. `None` is a small one with random weights; else a Hub id or a path."""

    vision: str | None = None
    text: str | None = None
    projector: str | dict = "mlp"
    image_size: int | tuple[int, int] | None = None
    trust_remote_code: bool = False

    @property
    def pretrained(self) -> bool:
        return self.vision is not None or self.text is not None


def compose_parts(parts: Parts, seed: int = 0):
    """Compose the demo's model and processor, in float32.

    A pretrained tower is frozen: a few minutes on digits would only make it forget. What is random is trained.

    Raises:
        CompositionError: the parts cannot be composed.
    """
    arguments = {
        "vision": parts.vision or small_tower(),
        "text": parts.text or small_language_model(),
        "tokenizer": None if parts.text else small_tokenizer(),
        "projector": parts.projector,
        "dtype": torch.float32,
        "trust_remote_code": parts.trust_remote_code,
        "seed": seed,
    }
    default_size = PRETRAINED_IMAGE_SIZE if parts.vision else (PICTURE_HEIGHT, PICTURE_WIDTH)
    try:
        model, processor = compose(**arguments, image_size=parts.image_size or default_size)
    except CompositionError:
        if parts.image_size is not None or parts.vision is None:
            raise
        # Not every tower takes small pictures; each takes those of its own image processor.
        model, processor = compose(**arguments)
    if parts.vision:
        model.vision_tower.requires_grad_(False)
    return model, processor


def small_tower() -> ResNetConfig:
    """A residual network of three stages: 8 features of width 128 for a picture of 32x64 pixels."""
    return ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic")


def small_language_model() -> LlamaConfig:
    """A llama of two layers, for the vocabulary of `small_tokenizer`."""
    return LlamaConfig(
        vocab_size=len(small_tokenizer()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer made on the spot from the demo's questions: any text goes in and comes out again."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, pad_token=PADDING
    )


def _tokenizer_texts() -> Iterable[str]:
    for kind in KINDS:
        for wording in WORDINGS[kind]:
            yield f"User: {wording}\n"
    for answer in ("even", "odd", "yes", "no", *map(str, range(19))):
        # More often than questions, so that each answer becomes one token.
        yield from [f"Assistant: {answer}"] * 4
