"""What learning about pictures costs a language model in text alone, and what helps.

    python benchmarks/forgetting.py --models ../shared/models --output runs/forgetting.json

A model of the first layers of DINOv2-S, frozen, and stories-15m, a language model of children's stories, learns to name the
pictures of Fashion-MNIST. Three ways: `plain`; `replay`, with stories among the pictures; and `kl`, where the language model
stays near itself as it was on these stories (TextKLObjective), which stand beside the pictures and have no other loss. All
make as many steps, with the same pictures and rates. Told are the share of test pictures with exactly the right answer,
and the perplexity on held-out stories before and after.

The stories are the language model's own, drawn at temperature 1 from its start token: no text has to be fetched, and
its own words are what one has when its data are not at hand. Stories beside the pictures and held-out ones are drawn with
different seeds, and each of the former is read once.

Rates and steps were sought with seed 100; docs/training_forgetting.md says what was tried.

`--models` is a folder with `dinov2-small` and `stories-15m`. The pictures are those of Debian's package
dataset-fashion-mnist: found where it is installed, fetched with `apt-get download` otherwise, or in `--data`. All seeds take
about 12 minutes of one core.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from few_labels import LAYERS, SIZE, Pictures, exact_answers, word_tokenizer, write_between_marks
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    LlamaConfig,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import anyvlm
from anyvlm.training.forgetting import ForgettingCallback
from anyvlm.training.objectives.text_kl import TextKLObjective
from anyvlm.training.parts.trained_parts import train_parts
from anyvlm.training.text_replay import mix_text_replay, put_texts_beside


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from swap_tower import NAMES, fashion_mnist  # noqa: E402 - it is beside, and no package


ARMS = {"plain": "plain tuning", "replay": "with text replay", "kl": "with KL on text"}
BEGIN, END = "<!-- made by benchmarks/forgetting.py: begin -->", "<!-- made by benchmarks/forgetting.py: end -->"
console = Console()


@torch.no_grad()
def stories(folder: Path, count: int, tokens: int, seed: int) -> list[str]:
    """Beginnings of stories that the language model tells, `tokens` long with the start token, or shorter if they end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    told = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens - 1,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(told, skip_special_tokens=True)


def tiny_language_model(folder: Path) -> Path:
    """One with random weights, for --quick."""
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(arm: str, seed: int, data: list[np.ndarray], folders: dict, texts: dict, settings: dict) -> dict:
    """One arm with one seed."""
    pixels, labels, test_pixels, test_labels = data
    set_seed(seed)
    order = np.random.default_rng(seed).permutation(len(labels))[: settings["pictures"]]
    if folders["tower"] is None:
        tower, image_processor = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2), None
    else:
        tower = AutoModel.from_pretrained(folders["tower"], num_hidden_layers=LAYERS, dtype=torch.float32)
        image_processor = AutoImageProcessor.from_pretrained(folders["tower"], backend="pil")
    model, processor = anyvlm.compose(
        vision=tower,
        text=str(folders["text"]),
        image_processor=image_processor,
        image_size=SIZE,
        dtype=torch.float32,
        seed=seed,
    )
    rates = {"multi_modal_projector": settings["projector_rate"], "language_model": settings["language_model_rate"]}
    trained = train_parts(model, rates)
    dataset = Pictures(pixels[order], labels[order], names=NAMES)
    objectives = {"text_kl": TextKLObjective(model)} if arm == "kl" else {}
    samples = [{"text": text, "complete": False} for text in texts["beside"]]
    batch_size, texts_each = settings["batch_size"], settings["texts"]
    if arm == "replay":
        dataset = mix_text_replay(dataset, samples, texts_each / (1 + texts_each), seed)
        batch_size = round(batch_size * (1 + texts_each))  # as many pictures in a step
    elif arm == "kl":
        dataset = put_texts_beside(dataset, samples, texts_each, seed)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # of all
            adam_beta2=0.98,  # the first gradients, of an untrained projector, are large and must be forgotten soon
            logging_steps=20,
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
            loss_weights=dict.fromkeys(objectives, settings["kl_weight"]),
            parameter_groups=trained.parameter_groups(arguments.learning_rate, arguments.weight_decay),
        )
        forgetting = ForgettingCallback(trainer, texts["held_out"], warn_above=None)
        trainer.add_callback(forgetting)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    test = Pictures(test_pixels[: settings["test"]], test_labels[: settings["test"]], names=NAMES)
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": exact_answers(model, processor, test),
        "before": forgetting.result.before,
        "after": forgetting.result.after,
        "change": forgetting.result.change,
        "steps": trainer.state.global_step,
        "seconds": seconds,
    }


def markdown(results: list[dict], settings: dict) -> str:
    """The table of the docs."""
    lines = [
        f"stories-15m, all weights tuned on {settings['pictures']:,} questions about pictures, in "
        f"{results[0]['steps']} steps; perplexity on {settings['held_out']} held-out stories, {results[0]['before']:.2f} "
        f"before; {round(settings['pictures'] * settings['texts'])} other stories where there is text.",
        "",
        "| | seed | perplexity after | change | exact answers |",
        "|---|---|---|---|---|",
    ]
    for arm, text in ARMS.items():
        own = [result for result in results if result["arm"] == arm]
        for result in own:
            lines.append(
                f"| {text} | {result['seed']} | {result['after']:.2f} | {result['change']:+.1%} | {result['accuracy']:.1%} |"
            )
        if len(own) > 1:
            after, change, right = (
                statistics.mean(result[key] for result in own) for key in ("after", "change", "accuracy")
            )
            lines.append(f"| {text} | mean | {after:.2f} | **{change:+.1%}** | {right:.1%} |")
    return "\n".join(lines)


def main(
    output: Annotated[Path, typer.Option(help="JSON with every run; the folder is made.")] = Path(
        "runs/forgetting.json"
    ),
    models: Annotated[
        Path | None, typer.Option(help="Folder with dinov2-small and stories-15m. Needed without --quick.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the files of Fashion-MNIST.")] = None,
    docs: Annotated[Path | None, typer.Option(help="File whose marked place gets the table.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    arms: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(ARMS),
    pictures: Annotated[int, typer.Option(help="Pictures to learn from, each seen once.")] = 480,
    texts: Annotated[float, typer.Option(help="Stories for each picture, where there are any.")] = 2.0,
    tokens: Annotated[int, typer.Option(help="Most tokens of a story.")] = 48,
    held_out: Annotated[int, typer.Option(help="Held-out stories.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Pictures in a step.")] = 4,
    language_model_rate: Annotated[float, typer.Option(help="Learning rate of the language model.")] = 5e-5,
    projector_rate: Annotated[float, typer.Option(help="Learning rate of the projector.")] = 1e-3,
    kl_weight: Annotated[float, typer.Option(help="Weight of the KL term.")] = 10.0,
    test: Annotated[int, typer.Option(help="Test pictures.")] = 300,
    quick: Annotated[bool, typer.Option("--quick", help="Random pictures, tiny random parts: does it run?")] = False,
) -> None:
    """What learning about pictures costs a language model in text alone, and what helps."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    if quick:
        pictures, test, held_out, tokens = 12, 8, 4, 8
        random = np.random.default_rng(0)
        made = [random.integers(0, 256, (20, 28, 28), np.uint8), random.integers(0, 10, 20)] * 2
        folders = {"tower": None, "text": tiny_language_model(output.parent / "tiny")}
    else:
        if models is None:
            raise typer.BadParameter("name the folder with dinov2-small and stories-15m", param_hint="--models")
        made = fashion_mnist(data, output.parent)
        folders = {"tower": models / "dinov2-small", "text": models / "stories-15m"}
    settings = {
        "pictures": pictures,
        "texts": texts,
        "tokens": tokens,
        "held_out": held_out,
        "batch_size": batch_size,
        "language_model_rate": language_model_rate,
        "projector_rate": projector_rate,
        "kl_weight": kl_weight,
        "test": test,
    }
    beside = round(pictures * texts)
    kept = output.parent / f"stories-{'quick' if quick else 'trained'}-{beside}-{held_out}-{tokens}.json"
    if not kept.exists():
        told = {
            "beside": stories(folders["text"], beside, tokens, seed=1000),
            "held_out": stories(folders["text"], held_out, tokens, seed=2000),
        }
        kept.write_text(json.dumps(told))
    read = json.loads(kept.read_text())
    results = []
    for seed in range(first_seed, first_seed + seeds):
        for arm in arms.split(","):
            results.append(train(arm, seed, made, folders, read, settings))
            numbers = {key: round(value, 4) for key, value in results[-1].items() if key not in ("arm", "seed")}
            console.print(f"{ARMS[arm]}, seed {seed}: {numbers}")
            output.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    table = Table("", "seed", "perplexity before", "after", "change", "exact answers", title="forgetting")
    for result in results:
        cells = (
            f"{result['before']:.2f}",
            f"{result['after']:.2f}",
            f"{result['change']:+.1%}",
            f"{result['accuracy']:.1%}",
        )
        table.add_row(ARMS[result["arm"]], str(result["seed"]), *cells)
    console.print(table)
    if docs:
        write_between_marks(docs, markdown(results, settings), BEGIN, END)


if __name__ == "__main__":
    typer.run(main)
