"""The small model that `domain_adaptation.py` trains, and pictures as samples for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from domain_pictures import EDGE
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import ConvNextConfig, LlamaConfig, PreTrainedTokenizerFast, ViTImageProcessorPil

import anyvlm


QUESTION = "kind ?"


def new_model(classes: Sequence[str], seed: int):
    """A ConvNeXt of three stages, whose pooled features are one image token of a llama of two layers. Both from configs."""
    words = sorted({word for text in (QUESTION, *classes) for word in text.replace("-", " - ").split()})
    vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", "<pad>", *words))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    processor = ViTImageProcessorPil(size={"height": EDGE, "width": EDGE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return anyvlm.compose(
        vision=ConvNextConfig(
            patch_size=4, num_stages=3, hidden_sizes=[48, 64, 32], depths=[1, 1, 1], layer_scale_init_value=1.0
        ),
        text=LlamaConfig(
            vocab_size=len(vocabulary) + 1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        tokenizer=tokenizer,
        image_processor=processor,
        projector={"type": "avg_pool", "tokens_per_side": 1},
        seed=seed,
    )


def samples_of(pictures: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": classes[label]},
            ],
            "images": [Image.fromarray(picture)],
        }
        for picture, label in zip(pictures, labels)
    ]


class Prepared(torch.utils.data.Dataset):
    """What the collator makes of all samples at once, by rows: the same few words around every picture are not put into
    tokens again at every step."""

    def __init__(self, lists: Sequence[Sequence[dict]], collator: anyvlm.AnyVlmDataCollator):
        self.size = len(lists[0])
        self.batch = collator(list(lists))
        self.length = len(lists)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[int]:
        return list(range(index * self.size, (index + 1) * self.size))

    def collate(self, items: Sequence[list[int]]) -> dict[str, Any]:
        # Those of the source first, as in a batch of its own.
        rows = torch.tensor(items).T.flatten()
        extra = self.batch.get("objective_inputs", {})
        batch = {name: tensor[rows] for name, tensor in self.batch.items() if name != "objective_inputs"}
        if extra:
            batch["objective_inputs"] = {
                name: {key: tensor[rows] for key, tensor in tensors.items()} for name, tensors in extra.items()
            }
        return batch
