"""Answers about pictures of one kind are learnt; how good are they about another kind, with and without adaptation?

    python benchmarks/domain_adaptation.py --output runs/domains.json

A small tower and a small language model, both new, are composed and learn to name the pictures of Fashion-MNIST. Asked about
pictures in half the contrast and with noise, they are worse. With `DomainAdversarialObjective`, other noisy pictures come
along without answers. The table has, for every seed: exact answers about held-out pictures of both kinds (`generate`), and
how well a new classifier (scikit-learn's logistic regression, cross-validated on held-out pictures of both) tells the kinds
apart by the tower's pooled features: before the training, with the source alone, with both kinds but without the loss, and
with it. No training sees an answer about a noisy picture.

`--choose` is for settings: it says how good the answers are about held-out pictures of the source and how well the kinds are
told apart, on other seeds and other pictures than those of the table, and nothing about answers that the target has.

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
from domain_learner import QUESTION, Prepared, new_model, samples_of
from domain_pictures import PAIRS, TEST, TRAINING, VALIDATION, Pair
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    GenerationConfig,
    PrinterCallback,
    TrainingArguments,
)
from transformers.utils import logging

import anyvlm
from anyvlm.training.domains import MixedDomains
from anyvlm.training.objectives.domain_adversarial import DomainAdversarialObjective
from anyvlm.training.trainer import AnyVlmTrainer


#: Of the table, and those on which settings are chosen.
FIRST_SEED, FIRST_TO_CHOOSE = 1000, 500
console = Console(stderr=True)


@dataclass
class Settings:
    """One training: optimiser steps, pictures of each domain in a step, rates of the model and of the classifier."""

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3
    classifier_rate: float = 1e-2
    weight: float = 1.0
    gradient_penalty: float = 0.3


def train(pair: Pair, settings: Settings, seed: int, output: Path, kind: str):
    """The model and its processor, trained on the source's samples (`none`), with the target's pictures beside them
    (`pictures`), with the loss on both (`adapted`)."""
    model, processor = new_model(pair.classes, seed)
    torch.manual_seed(seed)
    source = samples_of(*pair.source.part(TRAINING), pair.classes)
    objectives, lists = {}, [[sample] for sample in source]
    if kind == "adapted":
        objectives["domain"] = DomainAdversarialObjective(
            model,
            ["source", "target"],
            learning_rate=settings.classifier_rate,
            gradient_penalty=settings.gradient_penalty,
        )
    if kind in ("pictures", "adapted"):
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
        loss_weights=dict.fromkeys(objectives, settings.weight),
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
    """Every row of the table."""
    tests = {name: domain.part(TEST) for name, domain in (("source", pair.source), ("target", pair.target))}
    held_out = [domain.part((*VALIDATION, *TEST))[0] for domain in (pair.source, pair.target)]
    found = {}
    for name in ROWS:
        started = time.process_time()
        history = []
        if name == "before":
            model, processor = new_model(pair.classes, seed)
        else:
            model, processor, history = train(pair, settings, seed, output, name)
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


def choose(pair: Pair, settings: Settings, seed: int, output: Path) -> dict[str, float]:
    """What may be known without answers about the target."""
    model, processor, _ = train(pair, settings, seed, output, "adapted")
    answered, shown = pair.source.part(VALIDATION), pair.target.part(VALIDATION)[0]
    found = {
        "source": exact_answers(model, processor, *answered, pair.classes),
        "told_apart": told_apart(model, processor, answered[0], shown),
    }
    console.print(f"seed {seed}: source {found['source']:.1f}, told apart {found['told_apart']:.1f}")
    return found


ROWS = {
    "before": "before the training",
    "none": "source alone",
    "pictures": "both, without the loss",
    "adapted": "domain-adversarial",
}


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
    seeds: Annotated[int, typer.Option(help=f"How many seeds, from {FIRST_SEED} on.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each training.")] = Settings.steps,
    weight: Annotated[float, typer.Option(help="Of the domain-adversarial loss.")] = Settings.weight,
    gradient_penalty: Annotated[float, typer.Option(help="Of its classifier.")] = Settings.gradient_penalty,
    classifier_rate: Annotated[float, typer.Option(help="Learning rate of it.")] = Settings.classifier_rate,
    choosing: Annotated[
        bool,
        typer.Option(
            "--choose", help=f"Only what needs no answers about the target, seeds from {FIRST_TO_CHOOSE} on."
        ),
    ] = False,
    quick: Annotated[bool, typer.Option(help="A few steps on drawn shapes, to see it run.")] = False,
) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if pair not in PAIRS:
        raise typer.BadParameter(f"There is no pair {pair!r}. Choose one of {', '.join(PAIRS)}.")
    settings = Settings(steps=steps, weight=weight, gradient_penalty=gradient_penalty, classifier_rate=classifier_rate)
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
    first, measured = (FIRST_TO_CHOOSE, choose) if choosing else (FIRST_SEED, measure)
    result["seeds"] = {
        str(seed): measured(domains, settings, seed, output.parent) for seed in range(first, first + seeds)
    }
    partial = output.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=2))
    partial.replace(output)
    if choosing:
        return
    table = Table(title=f"{domains.title}, percent")
    for column in ("", "", *(f"seed {seed}" for seed in result["seeds"]), "mean"):
        table.add_column(column, justify="right" if column else "left")
    for line in lines(result):
        table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
