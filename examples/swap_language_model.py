"""Take the language model out of a trained model, put another in, and let the old model teach the new projector.

    python examples/swap_language_model.py --models ../shared/models --output runs/swap_language_model

DINOv2-S and stories-15m learn to name the pictures of Fashion-MNIST (as in `swap_tower.py`, whose trained models are used
if `--output` is the same). Then a language model trained on a dictionary, with another tokenizer and another chat template,
takes the place of stories-15m (`dictionary_language_model.py`), and its projector learns from what the old model answers
about pictures without labels. The language model itself is not changed: its logits for text are compared with those before
the swap. Three starts are compared: a new projector, one with the first layer of the old one, and one whose last layer is
solved in closed form.

`--models` is a folder with `dinov2-small` and `stories-15m`; pictures and dictionary are Debian's packages
dataset-fashion-mnist and wordnet-base, fetched if they are not installed. About 10 minutes on 2 cores for each seed.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import dictionary_language_model
import torch
from rich.console import Console
from swap_tower import (
    DIRECTIONS,
    FIRST_UNLABELLED,
    QUESTION,
    Questions,
    as_pictures,
    check_generate,
    fashion_mnist,
    features_of,
    spread,
    teacher_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyvlm.swapping.picture_paths import PicturePath
from anyvlm.swapping.teaching import teach
from anyvlm.swapping.text_swap import swap_language_model


STARTS = {
    "random": "new projector",
    "kept": "first layer of the old projector kept",
    "closed_form": "first layer kept, last layer in closed form",
}
TEXTS = ("a canvas shoe with a pliable rubber sole. Name it.", "coat. Explain it.", "What is this?")
console = Console()


def text_logits(model, tokenizer) -> list[torch.Tensor]:
    """Of some texts without pictures, for the words that the tokenizer had before the image token joined them."""
    logits = []
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(f"<|user|>{text}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
            logits.append(model(input_ids=ids).logits[..., : dictionary_language_model.VOCABULARY_SIZE])
    return logits


def measure(seed: int, run: argparse.Namespace, data: list) -> dict:
    """All starts with one seed."""
    kept = run.output / f"language-model-{run.pictures}-{run.seconds:.0f}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    pixels, labels, test_pixels, test_labels = data
    test_pixels, test_labels = test_pixels[: run.test], test_labels[: run.test]
    tower = DIRECTIONS["there"][0]
    model, processor = teacher_of("there", seed, run, pixels[: run.train], labels[: run.train])
    model.requires_grad_(False)
    features = features_of(
        PicturePath(model, processor), test_pixels, run.output / f"{tower.folder}-{tower.size}-taught-{run.test}.pt"
    )
    old = Questions(model, processor)
    result = {
        "old": old.exact(features, test_labels),
        "shuffled": old.exact(features, test_labels, shuffled=True),
        "starts": {},
    }
    unlabelled = random.Random(seed).sample(range(FIRST_UNLABELLED, len(pixels)), run.pictures)
    pictures = as_pictures(pixels[unlabelled])
    folder = run.output / "dictionary-lm"
    for start in STARTS:
        bare, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        before = text_logits(bare, tokenizer)
        new_model, new_processor = swap_language_model(
            model, processor, str(folder), projector={"type": "mlp"} if start == "random" else None, seed=seed
        )
        questions = Questions(new_model, new_processor)
        at_once = questions.exact(features, test_labels)
        report = teach(
            model,
            processor,
            new_model,
            new_processor,
            pictures,
            texts=[QUESTION],
            seconds=run.seconds,
            steps=run.teaching_steps,
            start="closed_form" if start == "closed_form" else "kept",
            seed=seed,
        )
        after = text_logits(new_model, new_processor.tokenizer)
        difference = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
        weights = bare.state_dict()
        changed = [
            name
            for name, tensor in new_model.language_model.state_dict().items()
            # The image token's row is the only one that was added.
            if not torch.equal(tensor[: len(weights[name])] if tensor.ndim else tensor, weights[name])
        ]
        if changed:
            raise RuntimeError(f"The language model was changed: {', '.join(changed)}.")
        check_generate(new_model, new_processor, test_pixels[:24], test_labels[:24])
        result["starts"][start] = {
            "at_once": at_once,
            "after": questions.exact(features, test_labels),
            "shuffled": questions.exact(features, test_labels, shuffled=True),
            "text_difference": difference,
            "report": report,
        }
    kept.write_text(json.dumps(result, indent=2) + "\n")
    return result


def reached(report: dict, loss: float) -> list[float] | None:
    """Steps and seconds until the held-out loss was this low, as measured from time to time; `None` if never."""
    return next(([step, seconds] for step, value, seconds in report["held_out_losses"] if value <= loss), None)


def table(results: list[dict], run: argparse.Namespace) -> str:
    """Markdown."""
    old = [100 * result["old"] for result in results]
    shuffled = [100 * result["shuffled"] for result in results]
    lines = [
        f"Fashion-MNIST, {run.pictures:,} pictures without labels and {run.test:,} test pictures; means over {len(results)} "
        f"seeds ± standard deviation; {run.seconds:.0f} s on {torch.get_num_threads()} threads, the old model's answers "
        "included.",
        "",
        "| | exact answers | retained | agreement with the old model | pictures exchanged | steps |",
        "|---|---|---|---|---|---|",
        f"| old model, stories-15m | {spread(old)} % | | | {spread(shuffled)} % | |",
    ]
    # What every start reached: the highest of the losses at the end.
    levels = [max(one["report"]["held_out_loss"]["after"] for one in r["starts"].values()) for r in results]
    losses = [
        "",
        "| start | loss at once | loss in the end | steps to the same loss | seconds to the same loss |",
        "|---|---|---|---|---|",
    ]
    for start, words in STARTS.items():
        ones = [result["starts"][start] for result in results]
        after = [100 * one["after"] for one in ones]
        share = [100 * one["after"] / result["old"] for one, result in zip(ones, results)]
        agreement = [100 * one["report"]["agreement"]["after"] for one in ones]
        exchanged = [100 * one["shuffled"] for one in ones]
        steps = [one["report"]["steps"] for one in ones]
        lines.append(
            f"| {words}: at once | {spread([100 * one['at_once'] for one in ones])} % | | | | 0 |",
        )
        lines.append(
            f"| {words}: taught | {spread(after)} % | {statistics.mean(share):.1f} % (lowest {min(share):.1f} %) | "
            f"{spread(agreement)} % | {spread(exchanged)} % | {statistics.mean(steps):.0f} |"
        )
        found = [reached(one["report"], level) for one, level in zip(ones, levels)]
        at_once, end = ([one["report"]["held_out_loss"][when] for one in ones] for when in ("started", "after"))
        losses.append(
            f"| {words} | {spread(at_once, 2)} | {spread(end, 2)} | {statistics.mean(one[0] for one in found):.0f} | "
            f"{statistics.mean(one[1] for one in found):.0f} |"
        )
    worst = max(one["text_difference"] for result in results for one in result["starts"].values())
    lines += losses
    lines += ["", f"Largest difference of the language model's logits for text alone, before and after: {worst:g}."]
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """Held-out losses over the seconds, one line for each seed and start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, (start, words) in enumerate(STARTS.items()):
        for index, result in enumerate(results):
            _, values, seconds = zip(*result["starts"][start]["report"]["held_out_losses"])
            axes.plot(seconds, values, color=f"C{number}", marker=".", label=words if index == 0 else None)
    axes.set(xlabel="seconds", ylabel="loss of the old model's answers (nats per token)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the trained parts")
    parser.add_argument("--output", type=Path, required=True, help="where checkpoints and results are kept")
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--wordnet", type=Path, help="folder with the files of WordNet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=6000, help="labelled pictures that the old model is trained on")
    parser.add_argument("--test", type=int, default=1000, help="held-out pictures that both are asked about")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures without labels to teach with")
    parser.add_argument("--steps", type=int, default=700, help="steps of training of the old model")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures per step of that")
    parser.add_argument("--dictionary_steps", type=int, default=1300, help="steps of training of the language model")
    parser.add_argument("--seconds", type=float, default=90.0, help="time for the teaching")
    parser.add_argument(
        "--teaching_steps", type=int, help="most steps of the teaching; default: as many as there is time"
    )
    run = parser.parse_args()
    for folder in ("dinov2-small", "stories-15m"):
        if not (run.models / folder).is_dir():
            raise SystemExit(f"There is no {folder} in {run.models}. Pass --models with a folder that has it.")
    run.output.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist(run.data, run.output)
    dictionary_language_model.train(run.output / "dictionary-lm", run.wordnet, run.output, run.dictionary_steps)
    results = []
    for seed in run.seeds:
        started = time.monotonic()
        result = measure(seed, run, data)
        results.append(result)
        shares = ", ".join(f"{start} {100 * one['after']:.1f} %" for start, one in result["starts"].items())
        console.print(f"Seed {seed}: old {100 * result['old']:.1f} %, {shares} ({time.monotonic() - started:.0f} s)")
    text = table(results, run)
    print(text)
    (run.output / "language-model.md").write_text(text + "\n", "utf-8")
    draw(results, run.output / "language-model-losses.png")


if __name__ == "__main__":
    main()
