"""Contrastive and matching losses beside the language model's, against the language model's alone: retrieval and LM loss.

    python benchmarks/retrieval.py --vision DINOV2-SMALL --data FOLDER --output retrieval.json

Emoji are learned with their names, as two artists drew them; for some names only one artist's. Those of the other artist
are the test: which of as many names belongs to each picture, and which picture to each name (recall at 1, mean of both). The
tower is frozen; projector and a small language model learn, in both arms from the same start, on the same batches, for the
same number of steps. The language model alone is given credit for the best of five ways to rank with it.
"""

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from emoji_pictures import emoji
from PIL import Image
from retrieval_scores import language_model_scores, recall_at_1, trained_scores
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainingArguments
from transformers.utils import logging

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.training.objectives.registry import build_losses


ARMS = {
    "language model alone": {"language_model": 1.0},
    "with contrastive and matching": {
        "language_model": 1.0,
        # Strong at first, when it teaches the projector most; weaker towards the end, which belongs to the language model.
        "contrastive": {
            "weight": 1.0,
            "schedule": {"type": "cosine", "from": 1.0, "to": 0.3},
            "embedding_size": 128,
        },
        "matching": {"weight": 0.1, "negatives": "text"},
    },
}
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "User", "Assistant", ":")
console = Console(stderr=True)

Named = tuple[str, Image.Image]


def emoji_data(folder: Path, num_test: int) -> tuple[list[Named], list[Named]]:
    """Pictures with names, for training and for the test. The choice of the test is no matter of the seed."""
    google, twitter = emoji("google", folder), emoji("twitter", folder)
    names = sorted(google.keys() & twitter.keys())
    random.Random(0).shuffle(names)
    test = [(name, twitter[name]) for name in names[:num_test]]
    return [(name, google[name]) for name in names] + [(name, twitter[name]) for name in names[num_test:]], test


def drawn_data(num_names: int = 12) -> tuple[list[Named], list[Named]]:
    """Plain colours in two tones, for trying the script."""
    colours = [(name // 4 * 80, name % 4 * 60, name * 20) for name in range(num_names)]
    pictures = [
        [
            (f"colour {i}", Image.new("RGB", (32, 32), tuple(c + tone for c in colour)))
            for i, colour in enumerate(colours)
        ]
        for tone in (0, 15)
    ]
    return pictures[0], pictures[1]


def sample(name: str, picture: Image.Image) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": name}],
        "images": [picture],
    }


def word_tokenizer(names: list[str]) -> PreTrainedTokenizerFast:
    """A token for each word of the names."""
    words = sorted({word for name in names for word in name.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def compose(vision: Any, tokenizer: PreTrainedTokenizerFast, size: int, width: int, seed: int):
    """A frozen tower, and a language model of three layers that knows nothing yet."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model, processor = anyvlm.compose(
        vision=vision,
        text=text,
        tokenizer=tokenizer,
        image_size=size,
        projector={"type": "avg_pool", "tokens_per_side": 2},
        dtype=torch.float32,
        seed=seed,
    )
    model.vision_tower.requires_grad_(False)
    return model, processor


def run_arm(
    losses: dict[str, Any], parts: tuple, train: list[Named], test: list[Named], cache: Path, seed: int, options: dict
) -> dict[str, Any]:
    """Train and test one arm; recall in percent by each way, the loss on the test's captions, and CPU seconds."""
    model, processor = parts
    torch.manual_seed(seed)
    objectives, weights = build_losses(losses, model)
    features = anyvlm.FeatureCache(cache, model, processor)
    collator = anyvlm.AnyVlmDataCollator(processor, objectives=objectives, feature_cache=features)
    samples = [sample(*named) for named in train]
    features.fill(samples, model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            seed=seed,
            disable_tqdm=True,
            **options,
        )
        trainer = anyvlm.AnyVlmTrainer(
            model=model,
            args=arguments,
            train_dataset=samples,
            data_collator=collator,
            objectives=objectives,
            loss_weights=weights,
        )
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
    samples = [sample(*named) for named in test]
    captions = [name for name, _ in test]
    batch = anyvlm.AnyVlmDataCollator(processor)(samples)
    scores, loss = language_model_scores(model, processor, batch, captions)
    if objectives:
        scores |= trained_scores(
            objectives["contrastive"], objectives["matching"], model, processor, samples, captions
        )
    recalls = {name: recall_at_1(found) for name, found in scores.items()}
    return {"loss": loss, "recall": recalls, "train_cpu_seconds": seconds}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; the gain is to the best way without heads, of either arm's mean the highest."""
    arms = {}
    for arm in ARMS:
        of_arm = [run for run in runs if run["arm"] == arm]
        ways = {way: [run["recall"][way] for run in of_arm] for way in of_arm[0]["recall"]}
        arms[arm] = {
            "recall": {way: statistics.mean(found) for way, found in ways.items()},
            "spread": {way: statistics.stdev(found) if len(found) > 1 else 0.0 for way, found in ways.items()},
            "loss": statistics.mean(run["loss"] for run in of_arm),
            "train_cpu_seconds": statistics.mean(run["train_cpu_seconds"] for run in of_arm),
        }
    alone, joint = (arms[arm] for arm in ARMS)
    pairs = [[run for run in runs if run["arm"] == arm] for arm in ARMS]
    return {
        "arms": arms,
        "gain": max(joint["recall"].values()) - max(alone["recall"].values()),
        "loss_ratio": joint["loss"] / alone["loss"],
        "loss_ratios": [other["loss"] / one["loss"] for one, other in zip(*pairs)],
    }


def table(result: dict[str, Any], num_test: int) -> Table:
    shown = Table(title=f"Recall at 1 among {num_test}, percent", box=box.SIMPLE_HEAD)
    for column in ("ranked by", *ARMS):
        shown.add_column(column, justify="left" if column == "ranked by" else "right")
    arms = result["arms"]
    for way in list(arms.values())[-1]["recall"]:
        cells = [
            f"{arm['recall'][way]:.1f} ± {arm['spread'][way]:.1f}" if way in arm["recall"] else ""
            for arm in arms.values()
        ]
        shown.add_row(way, *cells)
    shown.add_row("language model's loss", *(f"{arm['loss']:.3f}" for arm in arms.values()), style="bold")
    shown.add_row("CPU seconds of training", *(f"{arm['train_cpu_seconds']:.0f}" for arm in arms.values()))
    return shown


def main(
    vision: Annotated[str, typer.Option(help="Tower that stays frozen: Hub id or path.")] = "facebook/dinov2-small",
    data: Annotated[Path, typer.Option(help="Folder of the emoji; fetched into it with npm if not there.")] = Path(
        "emoji"
    ),
    output: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
    seeds: Annotated[int, typer.Option(help="Repetitions, each with other first weights and another order.")] = 3,
    steps: Annotated[int, typer.Option(help="Of training, in each arm.")] = 450,
    batch_size: Annotated[int, typer.Option(help="Pictures in a step.")] = 48,
    num_test: Annotated[int, typer.Option(help="Pictures of the test, and names to choose from.")] = 100,
    image_size: Annotated[int, typer.Option(help="Of the tower's pictures, in pixels.")] = 56,
    width: Annotated[int, typer.Option(help="Of the language model; a multiple of 32.")] = 128,
    features: Annotated[
        Path | None, typer.Option(help="Folder to keep the tower's features in. Default: they are thrown away.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A few steps on plain colours with a random tower: only whether it runs.")
    ] = False,
):
    """Train two arms, with and without contrastive and matching losses, and compare retrieval at equal steps.

    Needs about ten minutes of one core, and a tower; the figures are in docs/training_objectives.md.
    """
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if quick:
        (train, test), tower, image_size = drawn_data(), tiny_configs.vision_config("clip_vision_model"), 32
        seeds, steps, batch_size, width = 1, 4, 8, 32
    else:
        (train, test), tower = emoji_data(data, num_test), vision
    tokenizer = word_tokenizer([name for name, _ in train])
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        cache = temporary if features is None else features
        for seed in range(seeds):
            for arm, losses in ARMS.items():
                with console.status(f"Seed {seed}: {arm}"):
                    parts = compose(tower, tokenizer, image_size, width, seed)
                    options = {"max_steps": steps, "per_device_train_batch_size": batch_size, "use_cpu": True}
                    found = run_arm(losses, parts, train, test, Path(cache), seed, options)
                runs.append({"arm": arm, "seed": seed, **found})
    result = {"steps": steps, "batch_size": batch_size, "num_test": len(test), "runs": runs, **summary(runs)}
    Console().print(table(result, len(test)))
    Console().print(
        f"Gain: {result['gain']:.1f} points. Loss of the language model: {result['loss_ratio']:.3f} of that alone."
    )
    if output is not None:
        part = output.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(output)


if __name__ == "__main__":
    typer.run(main)
