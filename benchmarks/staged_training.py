"""Models, pictures and stages of `staged.py`."""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoProcessor, ProcessorMixin, TrainingArguments, set_seed

import anyvlm
from anyvlm.training.feature_cache import FeatureCache
from anyvlm.training.parts.trained_parts import train_parts
from anyvlm.training.trainer import AnyVlmTrainer


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from swap_tower import NAMES, QUESTION, as_pictures, fashion_mnist  # noqa: E402


#: Pictures that rates are chosen with, and that a swap is fitted on.
VALIDATION, UNLABELLED = 300, 100
OLD_TOWER, NEW_TOWER, TEXT = "resnet-50", "dinov2-small", "stories-15m"
#: Pixels of a picture. The new tower was made for 224 and more.
OLD_SIZE, NEW_SIZE = 64, 28


@dataclass(frozen=True)
class Run:
    """What is asked for on the command line."""

    models: Path
    output: Path
    data: Path | None
    steps: int
    tower_steps: int
    batch_size: int
    test: int

    @property
    def train(self) -> int:
        """Every training picture is seen once."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Stage:
    """Steps, and what is trained in them (`train_parts`)."""

    steps: int
    parts: dict[str, Any]


class Samples(Dataset):
    """Pictures `(n, 28, 28)` with the question and the answer."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        answer = {"role": "assistant", "content": NAMES[self.labels[index]]}
        return {"messages": [*question(), answer], "images": as_pictures(self.pixels[index : index + 1])}


def question() -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]


def samples(run: Run, split: str) -> Samples:
    """`train`, `validation` (behind it), or `test`."""
    pixels, labels, test_pixels, test_labels = fashion_mnist(run.data, run.output)
    if split == "test":
        return Samples(test_pixels[: run.test], test_labels[: run.test])
    start, number = (0, run.train) if split == "train" else (run.train, min(VALIDATION, run.test))
    return Samples(pixels[start : start + number], labels[start : start + number])


def new_model(run: Run, seed: int) -> tuple[nn.Module, ProcessorMixin]:
    """ResNet-50 and stories-15m behind a new projector; four tokens for a picture of 64 pixels."""
    return anyvlm.compose(
        vision=str(run.models / OLD_TOWER),
        text=str(run.models / TEXT),
        projector={"type": "avg_pool", "ratio": 2},
        image_size=OLD_SIZE,
        vision_feature_layer=-2,
        dtype=torch.float32,
        seed=seed,
    )


def swapped_model(run: Run, seed: int) -> tuple[nn.Module, ProcessorMixin]:
    """The model that was kept, with the other tower in the place of the one it was trained with."""
    folder = run.output / f"swapped-{seed}"
    if not (folder / "config.json").exists():
        model, processor = load(run.output / f"trained-{seed}")
        pictures = as_pictures(samples(run, "train").pixels[:UNLABELLED])
        model, processor, _ = anyvlm.swap(
            model,
            processor,
            vision=str(run.models / NEW_TOWER),
            image_size=NEW_SIZE,
            images=pictures,
            seconds=0,
            seed=seed,
        )
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return load(folder)


def load(folder: Path) -> tuple[nn.Module, ProcessorMixin]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def keep(run: Run, model: nn.Module, processor: ProcessorMixin, seed: int) -> None:
    """Keep a trained model, for the swap."""
    processor.save_pretrained(run.output / f"trained-{seed}")
    model.save_pretrained(run.output / f"trained-{seed}")


def is_kept(run: Run, seed: int) -> bool:
    return (run.output / f"trained-{seed}" / "config.json").exists()


def train(run: Run, model: nn.Module, processor: ProcessorMixin, stages: Sequence[Stage], seed: int) -> list[float]:
    """Train the stages one after the other; returns the loss at the end of each. Features of a frozen tower are kept."""
    set_seed(seed)
    order = torch.randperm(run.train, generator=torch.Generator().manual_seed(seed)).tolist()
    dataset, losses, start = samples(run, "train"), [], 0
    for stage in stages:
        trained = train_parts(model, stage.parts)
        part = torch.utils.data.Subset(dataset, order[start * run.batch_size : (start + stage.steps) * run.batch_size])
        start += stage.steps
        is_frozen = not any(parameter.requires_grad for parameter in model.vision_tower.parameters())
        cache = FeatureCache(run.output / "features", model, processor) if is_frozen else None
        if cache:
            cache.fill(dataset, model, batch_size=50)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=stage.steps,
                per_device_train_batch_size=run.batch_size,
                lr_scheduler_type="cosine",
                warmup_steps=stage.steps // 10,
                logging_steps=max(stage.steps // 5, 1),
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            )
            trainer = AnyVlmTrainer(
                model=model,
                args=arguments,
                train_dataset=part,
                data_collator=anyvlm.AnyVlmDataCollator(processor, feature_cache=cache),
                parameter_groups=trained.parameter_groups(learning_rate=1e-4),
                callbacks=trained.callbacks(),
            )
            with contextlib.redirect_stdout(sys.stderr):
                trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])
    return losses


@torch.no_grad()
def exact_answers(model: nn.Module, processor: ProcessorMixin, held_out: Samples) -> float:
    """Share of pictures about which greedy decoding gives exactly the right answer and ends there."""
    model.eval()
    prompt = processor.apply_chat_template(question(), add_generation_prompt=True, tokenize=False)
    longest = max(len(ids) for ids in processor.tokenizer(list(NAMES))["input_ids"])
    right = 0
    for start in range(0, len(held_out), 100):
        pictures = as_pictures(held_out.pixels[start : start + 100])
        inputs = processor(text=[prompt] * len(pictures), images=[[one] for one in pictures], return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
        answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        names = [NAMES[label] for label in held_out.labels[start : start + 100]]
        right += sum(answer.strip() == name for answer, name in zip(answers, names))
    return right / len(held_out)
