"""Semi-supervised training against the labels alone, when there are few of them.

    python benchmarks/few_labels.py --models ../shared/models --output runs/few_labels.json

Of 1,497 pictures of scikit-learn's handwritten digits 2 % have an answer to "What is this?". A model of the first layers of
DINOv2-S, frozen, and a small language model with random weights learns from these 30 (`labels alone`), or from these and,
through the answers that it is sure of, from the other pictures (`semi-supervised`). Both make the same number of steps
with the same settings and the same augmentation of the labelled pictures. What counts is the share of test pictures about
which greedy decoding gives exactly the right answer.

`--models` is a folder with `dinov2-small`. All seeds take about 3 minutes of one core.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageEnhance
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Dinov2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import anyvlm
from anyvlm.training.semi_supervised import SemiSupervisedObjective, WithUnlabelled


QUESTION = "What is this?"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ARMS = {"labels": "labels alone", "semi_supervised": "semi-supervised"}
BEGIN, END = "<!-- made by benchmarks/few_labels.py: begin -->", "<!-- made by benchmarks/few_labels.py: end -->"
#: Layers of DINOv2-S that are used, and pixels of an edge: early ones tell small pictures apart best (a linear classifier on
#: 150 labels of Fashion-MNIST at this size: 80 % behind 5 layers, 67 % behind all 12).
LAYERS, SIZE = 5, 28
#: Pictures that are asked about at the end; no one else sees them.
TEST = 300
console = Console()


def augment(picture: Image.Image) -> Image.Image:
    """Shifted by up to 2 of 28 pixels."""
    x, y = (int(number) for number in torch.randint(-2, 3, (2,)))
    return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))


def augment_strongly(picture: Image.Image) -> Image.Image:
    """And turned by up to 10 degrees, magnified by up to 15 %, and with another brightness and contrast."""
    angle, scale, light, contrast = (float(number) for number in torch.rand(4))
    picture = augment(picture).rotate(20 * angle - 10, Image.Resampling.BILINEAR)
    width, height = picture.size
    cut = 0.15 * scale * width / 2
    picture = picture.resize(picture.size, Image.Resampling.BILINEAR, box=(cut, cut, width - cut, height - cut))
    picture = ImageEnhance.Brightness(picture).enhance(0.7 + 0.6 * light)
    return ImageEnhance.Contrast(picture).enhance(0.7 + 0.6 * contrast)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures `(1797, 28, 28)`, uint8, and labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = [Image.fromarray(np.uint8(picture * 255 / 16)) for picture in found.images]
    return np.stack([np.asarray(one.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in small]), found.target


class Pictures(torch.utils.data.Dataset):
    """Questions about pictures with their answers; the pictures changed by `change`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, change=None, names: tuple[str, ...] = NAMES):
        self.pixels, self.labels, self.change, self.names = pixels, labels, change, names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        picture = Image.fromarray(self.pixels[index]).convert("RGB")
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": self.names[self.labels[index]]},
        ]
        return {"messages": messages, "images": [picture if self.change is None else self.change(picture)]}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the question, the answers and the plain chat format."""
    pieces = pre_tokenizers.Whitespace()
    words = [piece for text in (QUESTION, *NAMES, "User: Assistant:") for piece, _ in pieces.pre_tokenize_str(text)]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", "<pad>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pieces
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def new_model(folder: Path | None, seed: int):
    """The model with its frozen tower, and its processor."""
    tokenizer = word_tokenizer()
    if folder is None:
        tower = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
        image_processor = None
    else:
        tower = AutoModel.from_pretrained(folder, num_hidden_layers=LAYERS, dtype=torch.float32)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, processor = anyvlm.compose(
        vision=tower, text=text, tokenizer=tokenizer, image_processor=image_processor, image_size=SIZE, seed=seed
    )
    model.vision_tower.requires_grad_(False)
    return model, processor


@torch.no_grad()
def exact_answers(model, processor, samples: Pictures) -> float:
    """Share of samples for which greedy decoding gives exactly the right answer and ends there: each of its tokens is the
    most probable one behind those before it."""
    model.eval()
    collator, right = anyvlm.AnyVlmDataCollator(processor), 0
    for start in range(0, len(samples), 100):
        batch = collator([samples[index] for index in range(start, min(start + 100, len(samples)))])
        wanted = batch.pop("labels")[:, 1:]
        best = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((best == wanted) | (wanted == -100)).all(1).sum())
    return right / len(samples)


def train(arm: str, seed: int, data: tuple[np.ndarray, np.ndarray], folder: Path | None, settings: dict) -> dict:
    """One arm with one seed."""
    pixels, labels = data
    set_seed(seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, few, rest = np.split(order, [settings["test"], settings["test"] + settings["labels"]])
    model, processor = new_model(folder, seed)
    labelled = Pictures(pixels[few], labels[few], augment)
    objectives, dataset = {}, labelled
    if arm == "semi_supervised":
        dataset = WithUnlabelled(
            labelled, Pictures(pixels[rest], labels[rest]), settings["unlabelled_per_label"], seed
        )
        objectives["unlabelled"] = SemiSupervisedObjective(
            model,
            processor,
            NAMES,
            answer_shares="equal",
            threshold=settings["threshold"],
            decay=settings["decay"],
            weak=augment,
            strong=augment_strongly,
        )
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=settings["steps"] // 10,
            weight_decay=0.05,
            logging_steps=max(settings["steps"] // 10, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=seed,
        )
        trainer = anyvlm.AnyVlmTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=objectives),
            processing_class=processor,
            objectives=objectives,
            loss_weights=dict.fromkeys(objectives, settings["weight"]),
        )
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    held_out = Pictures(pixels[test], labels[test])
    result = {"arm": arm, "seed": seed, "accuracy": exact_answers(model, processor, held_out), "seconds": seconds}
    if objectives:
        logged = [entry for entry in trainer.state.log_history if "unlabelled/confident" in entry]
        result["log"] = [{key: entry[key] for key in entry if key.startswith("unlabelled/")} for entry in logged]
        with objectives["unlabelled"].teacher.applied(model):
            result["teacher"] = exact_answers(model, processor, held_out)
    return result


def markdown(results: list[dict], settings: dict) -> str:
    """The table of the docs."""
    seeds = sorted({result["seed"] for result in results})
    by = {(result["arm"], result["seed"]): result for result in results}
    rows = {text: [100 * by[arm, seed]["accuracy"] for seed in seeds] for arm, text in ARMS.items()}
    rows["semi-supervised, the teacher"] = [100 * by["semi_supervised", seed]["teacher"] for seed in seeds]
    gains = [one - other for one, other in zip(rows["semi-supervised"], rows["labels alone"])]
    lines = [
        f"Handwritten digits: {settings['labels']} of {settings['pictures']:,} training pictures with their answer, "
        f"{settings['test']} test pictures, {settings['steps']} steps; exact answers.",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for text, values in rows.items():
        lines.append(
            f"| {text} | " + " | ".join(f"{value:.1f} %" for value in values) + f" | {statistics.mean(values):.1f} % |"
        )
    lines.append(
        "| gain, points | " + " | ".join(f"{gain:+.1f}" for gain in gains) + f" | {statistics.mean(gains):+.1f} |"
    )
    logs = [by["semi_supervised", seed]["log"][-1] for seed in seeds]
    used, right = (
        statistics.mean(log.get(key, 0) for log in logs) for key in ("unlabelled/confident", "unlabelled/accuracy")
    )
    lines += [
        "",
        f"At the end {100 * used:.0f} % of the pictures without answers are used, and {100 * right:.0f} % of the answers "
        "used are right.",
    ]
    return "\n".join(lines)


def write_between_marks(path: Path, text: str, begin: str, end: str) -> None:
    """Put a text in its marked place of a page."""
    before, _, rest = path.read_text("utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise typer.BadParameter(f"{path} has no place for the table, between {begin!r} and {end!r}.")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")


def main(
    output: Annotated[Path, typer.Option(help="JSON with every run; the folder is made.")] = Path(
        "runs/few_labels.json"
    ),
    models: Annotated[Path | None, typer.Option(help="Folder with dinov2-small. Needed without --quick.")] = None,
    docs: Annotated[Path | None, typer.Option(help="File whose marked place gets the table.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    labels: Annotated[int, typer.Option(help="Pictures with answers.")] = 30,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each arm.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Pictures with answers in a step.")] = 16,
    unlabelled_per_label: Annotated[int, typer.Option(help="Pictures without answers for each of them.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of both arms.")] = 1e-3,
    threshold: Annotated[float, typer.Option(help="Least confidence of an answer that is learnt.")] = 0.8,
    decay: Annotated[float, typer.Option(help="Of the teacher's moving average.")] = 0.95,
    weight: Annotated[float, typer.Option(help="Of the loss on pictures without answers.")] = 1.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few pictures and a tiny tower, 2 steps: does it run?")
    ] = False,
) -> None:
    """Semi-supervised training against the labels alone, with 2 % of the labels."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    settings = {
        "labels": labels,
        "steps": steps,
        "batch_size": batch_size,
        "unlabelled_per_label": unlabelled_per_label,
        "learning_rate": learning_rate,
        "threshold": threshold,
        "decay": decay,
        "weight": weight,
        "test": TEST,
    }
    made = digits()
    if quick:
        made, folder = tuple(part[:60] for part in made), None
        settings.update(labels=10, steps=2, batch_size=4, test=20, threshold=0.5)
    elif models is None:
        raise typer.BadParameter("name the folder with dinov2-small", param_hint="--models")
    else:
        folder = models / "dinov2-small"
    settings["pictures"] = len(made[1]) - settings["test"]
    output.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in range(first_seed, first_seed + seeds):
        for arm in ARMS:
            results.append(train(arm, seed, made, folder, settings))
            shown = ", ".join(
                f"{key} {results[-1][key]:.3f}" for key in ("accuracy", "teacher", "seconds") if key in results[-1]
            )
            console.print(f"{ARMS[arm]}, seed {seed}: {shown}")
    output.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    table = Table("", *(f"seed {seed}" for seed in range(first_seed, first_seed + seeds)), title="exact answers")
    for arm, text in ARMS.items():
        table.add_row(text, *(f"{100 * result['accuracy']:.1f} %" for result in results if result["arm"] == arm))
    console.print(table)
    if docs:
        write_between_marks(docs, markdown(results, settings), BEGIN, END)


if __name__ == "__main__":
    typer.run(main)
