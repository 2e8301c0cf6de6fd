"""What is compared: the same samples, trained with transformers' LLaVA and with ours, by `Trainer`."""

import copy
import gc
import io
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from llava_pair import Sizes, build_native, compose_with_processor, copy_weights, small_tokenizer
from measure import PeakMemory, PeakMeter, _return_freed_memory, synchronize
from PIL import Image
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import anyvlm
from anyvlm.training.packing import enable_packing


#: Words of the texts, beside the special tokens. The vocabulary of the models is as large as it is said to be.
WORDS = ("User", "Assistant", ":", *(f"w{number}" for number in range(1000)))

SIDES = {
    "native": "transformers' LLaVA",
    "ours": "anyvlm",
    "packing": "anyvlm, packed",
    "cache": "anyvlm, features cached",
}


@dataclass(frozen=True)
class Comparison:
    """One setting, in which several sides do the same work.

    Args:
        name: What it shows.
        side: The side that has the target; see `SIDES`.
        target: Time of its step divided by native's, at most.
        sides: All that are measured.
        sizes: Of the models and pictures.
        vocab_size: Of the language model.
        lengths: Tokens of a sample, from and to, drawn evenly.
        answer_share: Of a text's words, how many are the answer.
        frozen_tower: On all sides.
    """

    name: str
    side: str
    target: float
    sides: tuple[str, ...]
    sizes: Sizes
    vocab_size: int
    lengths: tuple[int, int]
    answer_share: float
    frozen_tower: bool = False


def make_samples(comparison: Comparison, processor, number: int, seed: int) -> list[dict[str, Any]]:
    """Conversations with one picture each (a JPEG, which is decoded whenever it is read), of exact lengths."""
    generator = np.random.default_rng(seed)
    collator = anyvlm.AnyVlmDataCollator(processor)

    def sample(prompt: list[str], answer: list[str]) -> dict[str, Any]:
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG")
        question = [{"type": "image"}, {"type": "text", "text": " " + " ".join(prompt)}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(answer)}]
        return {"messages": messages, "images": [file.getvalue()]}

    fixed = collator([sample(["w0"], ["w0"])])["input_ids"].shape[1] - 2
    shortest, longest = comparison.lengths
    found = []
    for length in generator.integers(shortest, longest + 1, number).tolist():
        words = [f"w{word}" for word in generator.integers(0, 1000, length - fixed)]
        of_answer = max(1, round(comparison.answer_share * len(words)))
        found.append(sample(words[:-of_answer], words[-of_answer:]))
    lengths = [collator([one])["input_ids"].shape[1] for one in found]
    if not all(shortest <= length <= longest for length in lengths):
        raise RuntimeError(f"Samples have {min(lengths)} to {max(lengths)} tokens, not {shortest} to {longest}.")
    return found


@dataclass
class Side:
    """A model and how it is trained."""

    name: str
    model: nn.Module
    processor: Any
    collator: anyvlm.AnyVlmDataCollator
    directory: str

    def trainer(self, samples: list, epochs: int, sizes: Sizes, device: torch.device, **kwargs) -> Trainer:
        """Ours by `AnyVlmTrainer`, native by `Trainer`; the samples in their order."""
        arguments = TrainingArguments(
            output_dir=self.directory,
            per_device_train_batch_size=sizes.batch_size,
            num_train_epochs=epochs,
            learning_rate=1e-5,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer_class = Trainer if self.name == "native" else anyvlm.AnyVlmTrainer
        trainer = trainer_class(
            model=self.model, args=arguments, train_dataset=samples, data_collator=self.collator, **kwargs
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def compose_for(comparison: Comparison, dtype: torch.dtype, seed: int):
    """Our model and processor for a comparison."""
    sizes = comparison.sizes
    return compose_with_processor(sizes, comparison.vocab_size, dtype, seed, small_tokenizer(WORDS))


def make_sides(
    comparison: Comparison,
    names: tuple[str, ...],
    model: nn.Module,
    processor,
    samples: list,
    device: torch.device,
    directory: str,
    equal_weights: bool = True,
) -> list[Side]:
    """The sides of a comparison, with equal weights.

    Args:
        model: Ours; it is taken apart or used by the last of our sides.
        directory: For features and what trainers write.
        equal_weights: Else native has random ones of its own, and nothing else is in memory then.
    """
    native = None
    if "native" in names:
        native = build_native(model.config, model.dtype).to(device)
        if equal_weights:
            copy_weights(model, native)
    of_ours = [name for name in names if name != "native"]
    sides = []
    for name in names:
        if name == "native":
            own = native
            tower = own.model.vision_tower
        else:
            own = model if name == of_ours[-1] else copy.deepcopy(model)
            own.to(device)
            tower = own.vision_tower
        if comparison.frozen_tower:
            tower.requires_grad_(False)
        collator = anyvlm.AnyVlmDataCollator(processor, packing=name == "packing")
        if name == "packing":
            enable_packing(own, collator, samples[:2])
        if name == "cache":
            collator.feature_cache = anyvlm.FeatureCache(f"{directory}/features", own, processor)
        sides.append(Side(name, own, processor, collator, f"{directory}/{name}"))
    return sides


class _PeakOfSecondStep(TrainerCallback):
    """The first step makes the optimizer's state and whatever is made once."""

    def __init__(self, meter: PeakMeter):
        self.meter = meter
        self.before = self.peak = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            gc.collect()
            synchronize(args.device)
            self.before = self.meter.in_use()
            self.meter.reset()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            synchronize(args.device)
            self.peak = self.meter.peak()


def peak_memory(
    comparison: Comparison, name: str, dtype: torch.dtype, device: torch.device, seed: int, threads: int
) -> PeakMemory:
    """Peak memory of a step of one side, the only one of this process; the same batch twice."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    meter = PeakMeter(device)
    _return_freed_memory()
    libraries = meter.in_use()
    model, processor = compose_for(comparison, dtype, seed)
    samples = make_samples(comparison, processor, comparison.sizes.batch_size, seed)
    with tempfile.TemporaryDirectory() as directory:
        (side,) = make_sides(comparison, (name,), model, processor, samples, device, directory, equal_weights=False)
        del model
        callback = _PeakOfSecondStep(meter)
        side.trainer(samples, 2, comparison.sizes, device, callbacks=[callback]).train()
    return PeakMemory(meter.method, libraries, callback.before, callback.peak)


def quick(comparison: Comparison) -> Comparison:
    """The same with a toy model."""
    sizes = replace(comparison.sizes, hidden_size=64, num_layers=2, num_heads=2, image_size=28, batch_size=2)
    shortest, longest = comparison.lengths
    return replace(comparison, sizes=sizes, vocab_size=2048, lengths=(max(24, shortest // 8), max(24, longest // 8)))
