"""Answers about pictures of one kind are learnt; how good are they about another kind, with and without adaptation?

    python benchmarks/domain_adaptation.py --output runs/domains.json

A small tower and a small language model, both new, are composed and learn to name the pictures of Fashion-MNIST. Asked about
pictures in half the contrast and with noise, they are worse. With `DomainAdversarialObjective`, other noisy pictures come
along without answers. The table has, for every seed: exact answers about held-out pictures of both kinds (`generate`), and
how well a new classifier (scikit-learn's logistic regression, cross-validated on held-out pictures of both) tells the kinds
apart by the tower's pooled features: before the training, without and with adaptation.

No training sees an answer about a noisy picture. Settings were compared on part 0 of the pictures and seed 100, also by
answers about noisy pictures, which are none of those in the table (part 1, seeds 0 to 2). The tower has no batch statistics,
so pictures without answers change nothing unless there is a loss on them.

Data: Debian's dataset-fashion-mnist, unpacked in --data. `--pair emoji`: Google's emoji to Twitter's, of npm's packages
emoji-datasource-google and -twitter, fetched into --data if they are not there.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from domain_pictures import EDGE, PAIRS, TEST, TRAINING, VALIDATION, Pair
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    ConvNextConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
    ViTImageProcessorPil,
)
from transformers.utils import logging

import anyvlm
from anyvlm.training.domains import MixedDomains
from anyvlm.training.objectives.domain_adversarial import DomainAdversarialObjective
from anyvlm.training.trainer import AnyVlmTrainer


QUESTION = "kind ?"
console = Console(stderr=True)


@dataclass
class Settings:
    """One training: optimiser steps, pictures of each domain in a step, rates of the model and of the classifier."""

    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 2e-3
    classifier_rate: float = 1e-3
    weight: float = 0.3


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


def train(pair: Pair, settings: Settings, seed: int, output: Path, adapted: bool):
    """The model and its processor, trained on the source's samples, with the target's pictures if `adapted`."""
    model, processor = new_model(pair.classes, seed)
    torch.manual_seed(seed)
    source = samples_of(*pair.source.part(TRAINING), pair.classes)
    objectives, lists = {}, [[sample] for sample in source]
    if adapted:
        objectives = {
            "domain": DomainAdversarialObjective(model, ["source", "target"], learning_rate=settings.classifier_rate)
        }
        target = samples_of(*pair.target.part(TRAINING), pair.classes)
        lists = list(MixedDomains(source, {"target": target}, seed=seed))
    prepared = Prepared(lists, anyvlm.AnyVlmDataCollator(processor, objectives=objectives))
    trainer = AnyVlmTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=1e-3,
            warmup_steps=20,
            max_grad_norm=0.0,
            seed=seed,
            logging_steps=max(settings.steps // 8, 1),
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_drop_last=True,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=prepared,
        data_collator=prepared.collate,
        objectives=objectives,
        loss_weights={"domain": settings.weight} if adapted else {},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval(), processor, trainer.state.log_history


def pictures_as_inputs(processor, pictures: np.ndarray, with_text: bool = True) -> dict[str, torch.Tensor]:
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    images = [[Image.fromarray(picture)] for picture in pictures]
    inputs = processor(text=[text] * len(images), images=images, return_tensors="pt", add_special_tokens=False)
    return dict(inputs) if with_text else {"pixel_values": inputs["pixel_values"]}


@torch.no_grad()
def exact_answers(model, processor, pictures: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> float:
    """Percent of pictures about which greedy decoding gives exactly the right words."""
    wanted = [
        processor.tokenizer.decode(processor.tokenizer(name, add_special_tokens=False).input_ids) for name in classes
    ]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=3)
    right = 0
    for start in range(0, len(pictures), 200):
        inputs = pictures_as_inputs(processor, pictures[start : start + 200])
        answers = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        right += sum(answer == wanted[label] for answer, label in zip(said, labels[start : start + 200]))
    return 100 * right / len(pictures)


@torch.no_grad()
def pooled(model, processor, pictures: np.ndarray) -> np.ndarray:
    found = []
    for start in range(0, len(pictures), 200):
        inputs = pictures_as_inputs(processor, pictures[start : start + 200], with_text=False)
        found.append(model.get_image_features(**inputs).last_hidden_state.mean(1))
    return torch.cat(found).double().numpy()


def told_apart(model, processor, source: np.ndarray, target: np.ndarray) -> float:
    """Percent of pictures that a new linear classifier, not trained on them, puts into their domain: each fifth by one that
    was trained on the other four. Chance is 50."""
    count = min(len(source), len(target))
    features = np.concatenate([pooled(model, processor, pictures[:count]) for pictures in (source, target)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return 100 * float(cross_val_score(classifier, features, np.repeat([0, 1], count), cv=folds).mean())


def measure(pair: Pair, settings: Settings, seed: int, output: Path) -> dict[str, dict[str, Any]]:
    """Before the training, without adaptation, and with it."""
    tests = {name: domain.part(TEST) for name, domain in (("source", pair.source), ("target", pair.target))}
    held_out = [domain.part((*VALIDATION, *TEST))[0] for domain in (pair.source, pair.target)]
    found = {}
    for name in ("before", "none", "adapted"):
        started = time.process_time()
        history = []
        if name == "before":
            model, processor = new_model(pair.classes, seed)
        else:
            model, processor, history = train(pair, settings, seed, output, adapted=name == "adapted")
        seconds = time.process_time() - started
        found[name] = {
            "told_apart": told_apart(model, processor, *held_out),
            **{key: exact_answers(model, processor, *test, pair.classes) for key, test in tests.items()},
            "seconds": seconds,
            "classifier": [entry["domain/accuracy"] for entry in history if "domain/accuracy" in entry],
        }
        shown = ", ".join(f"{key} {found[name][key]:.1f}" for key in ("source", "target", "told_apart", "seconds"))
        console.print(f"seed {seed}, {name}: {shown}")
    return found


ROWS = {"before": "before the training", "none": "source alone", "adapted": "domain-adversarial"}


def lines(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table: every seed, and their mean."""
    seeds = result["seeds"]
    rows = []
    for key, title in ROWS.items():
        for column in ("source", "target", "told_apart"):
            values = [seeds[seed][key][column] for seed in seeds]
            label = {"source": "exact answers, source", "target": "exact answers, target"}.get(column, "told apart")
            rows.append([title, label, *(f"{value:.1f}" for value in values), f"{statistics.mean(values):.1f}"])
    return rows


def main(
    output: Annotated[Path, typer.Option(help="JSON with every figure.")] = Path("runs/domain_adaptation.json"),
    data: Annotated[Path, typer.Option(help="Folder with the data, or where it is fetched to.")] = Path("runs/data"),
    pair: Annotated[str, typer.Option(help=f"One of {', '.join(PAIRS)}.")] = "fashion",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each training.")] = 300,
    weight: Annotated[float, typer.Option(help="Of the domain-adversarial loss.")] = 0.3,
    quick: Annotated[bool, typer.Option(help="A few steps on drawn shapes, to see it run.")] = False,
) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if pair not in PAIRS:
        raise typer.BadParameter(f"There is no pair {pair!r}. Choose one of {', '.join(PAIRS)}.")
    settings = Settings(steps=steps, weight=weight)
    if quick:
        pair, settings = "shapes", Settings(steps=3, batch_size=4)
    domains = PAIRS[pair](data)
    result: dict[str, Any] = {"pair": domains.title, "pictures": {}}
    for name, domain in (("source", domains.source), ("target", domains.target)):
        result["pictures"][name] = {
            "training": len(domain.part(TRAINING)[0]),
            "test": len(domain.part(TEST)[0]),
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    result["settings"] = asdict(settings)
    result["seeds"] = {str(seed): measure(domains, settings, seed, output.parent) for seed in range(seeds)}
    partial = output.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=2))
    partial.replace(output)
    table = Table(title=f"{domains.title}, percent")
    for column in ("", "", *(f"seed {seed}" for seed in result["seeds"]), "mean"):
        table.add_column(column, justify="right" if column else "left")
    for line in lines(result):
        table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
