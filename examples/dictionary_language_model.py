"""A small language model trained on a dictionary: the second language model of `swap_language_model.py`.

Its words are WordNet's explanations of man-made things (Miller 1995), not stories; it has a tokenizer, a chat template and
an end-of-text token of its own, and another architecture, width and depth than stories-15m. It has seen no picture and none
of the questions that are asked about pictures. A few minutes on 2 cores.
"""

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from debian_packages import package_files
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config


PACKAGE, NOUNS = "wordnet-base", "data.noun"
#: WordNet's number for nouns that denote man-made things.
ARTEFACTS = "06"
#: Every second entry is learnt, and these: what fashion pictures show should not be words that it never met.
ALWAYS = ("bag", "boot", "coat", "dress", "pullover", "sandal", "shirt", "sneaker", "T-shirt", "trouser")
ORDERS = ("Name it.", "Which word is meant?", "What do you call it?")
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message.role + '|>' -}}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{- message.content + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message.content + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
VOCABULARY_SIZE, LENGTH, BATCH_SIZE, LEARNING_RATE = 4000, 64, 16, 3e-3


def nouns_file(data: Path | None, output: Path) -> Path:
    """WordNet's file of nouns: where Debian's package puts it, or fetched with `apt-get download`."""
    return package_files((NOUNS,), PACKAGE, Path("/usr/share/wordnet"), data, output / "wordnet", "--wordnet")[0]


def entries(path: Path) -> list[tuple[str, str]]:
    """Words with short explanations: `(word, explanation)`."""
    found: dict[str, str] = {}
    for line in path.read_text("latin-1").splitlines():
        head, _, explanation = line.partition(" | ")
        fields = head.split(" ")
        if line.startswith("  ") or fields[1] != ARTEFACTS:
            continue
        words = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
        words = sorted((word for word in words if "_" not in word and word.isascii()), key=lambda w: w not in ALWAYS)
        explanation = explanation.split(";")[0].strip()
        if words and 4 <= len(explanation.split()) <= 12:
            found.setdefault(words[0], explanation)
    return [entry for index, entry in enumerate(found.items()) if index % 2 == 0 or entry[0] in ALWAYS]


def conversation(entry: tuple[str, str], chance: random.Random) -> str:
    word, explanation = entry
    if chance.random() < 0.75:
        return f"<|user|>{explanation}. {chance.choice(ORDERS)}<|end|><|assistant|>{word}<|end|>"
    return f"<|user|>{word}. Explain it.<|end|><|assistant|>{explanation}<|end|>"


def train_tokenizer(dictionary: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{word} {explanation}" for word, explanation in dictionary), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=TEMPLATE,
    )


def batches(dictionary, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Token ids `(BATCH_SIZE, LENGTH)`, one conversation after the other, without end."""
    chance, buffer = random.Random(seed), []
    while True:
        texts = [conversation(entry, chance) for entry in chance.sample(dictionary, len(dictionary))]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            buffer += ids
            if len(buffer) >= BATCH_SIZE * LENGTH:
                yield torch.tensor(buffer[: BATCH_SIZE * LENGTH]).view(BATCH_SIZE, LENGTH)
                buffer = buffer[BATCH_SIZE * LENGTH :]


def train(folder: Path, data: Path | None, output: Path, steps: int = 1300, seed: int = 0) -> None:
    """Train the language model and its tokenizer, and save both in `folder`; nothing to do if they are there."""
    if (folder / "config.json").exists():
        return
    dictionary = entries(nouns_file(data, output))
    tokenizer = train_tokenizer(dictionary)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))),
    )
    source = batches(dictionary, tokenizer, seed)
    for _ in track(range(steps), f"Training a language model on {len(dictionary):,} entries of a dictionary"):
        ids = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
