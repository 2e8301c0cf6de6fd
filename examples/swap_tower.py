"""Take the vision tower out of a trained model, put another in, and measure what is left of what the model knew.

    python examples/swap_tower.py --models ../shared/models --output runs/swap_tower

A model of DINOv2-S and stories-15m learns to name the pictures of Fashion-MNIST; then ResNet-50 takes the tower's place,
with 100 pictures and no label. And the other way round. Rows of the table: the trained model; the same with pictures
exchanged; the new tower with a new projector (the control); fitted in closed form; and after a short distillation. All seeds
take about half an hour on 2 cores. Every stage is kept in `--output`, so a run that was stopped goes on where it was.

`--models` is a folder with `dinov2-small`, `resnet-50` and `stories-15m`, each loadable with transformers. The pictures are
those of Debian's package dataset-fashion-mnist: found where it is installed, fetched with `apt-get download` otherwise,
or in `--data`.
"""

import argparse
import gzip
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from debian_packages import package_files
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoModelForCausalLM, AutoProcessor

import anyvlm
from anyvlm.modeling.image_features import AnyVlmImageFeatures
from anyvlm.swapping.distillation import distil
from anyvlm.swapping.picture_paths import PicturePath


QUESTION = "What is this?"
#: Of Fashion-MNIST (Xiao et al. 2017), in the order of its labels.
NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PACKAGE = "dataset-fashion-mnist"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
#: The pictures without labels are taken from behind those that the model was trained on.
FIRST_UNLABELLED = 50_000
BEGIN, END = "<!-- made by examples/swap_tower.py: begin -->", "<!-- made by examples/swap_tower.py: end -->"
console = Console()


@dataclass(frozen=True)
class Tower:
    """A tower and how it is used: pictures of `size` pixels, and where a model is trained with it, features of a `layer`."""

    name: str
    folder: str
    size: int
    layer: int | None = None


#: The tower that a model is trained with, and the one that takes its place. The old one gives a grid of 4 by 4 features. The
#: new one sees twice as large pictures: its features are brought to that grid. The swap finds which of its layers to read.
DIRECTIONS = {
    "there": (Tower("DINOv2-S", "dinov2-small", 56), Tower("ResNet-50", "resnet-50", 128)),
    "back": (Tower("ResNet-50", "resnet-50", 64, layer=-2), Tower("DINOv2-S", "dinov2-small", 112)),
}
ROWS = {
    "teacher": "trained with {old}",
    "shuffled": "the same, pictures exchanged",
    "random": "{new}, new projector (control)",
    "closed": "{new}, closed form, {pictures} pictures, no gradient step",
    "distilled": "{new}, and {seconds:.0f} s of distillation",
}


def read_idx(path: Path) -> np.ndarray:
    """Pictures `(n, 28, 28)` or labels `(n,)` of one file, packed or not."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, content[3] + 1)]
    return np.frombuffer(content, np.uint8, offset=4 * (1 + content[3])).reshape(shape)


def fashion_mnist(data: Path | None, output: Path) -> list[np.ndarray]:
    """Training pictures and labels, test pictures and labels."""
    installed = Path("/usr/share/datasets/fashion-mnist")
    return [read_idx(path) for path in package_files(FILES, PACKAGE, installed, data, output / "data", "--data")]


def as_pictures(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(one).convert("RGB") for one in pixels]


def features_of(path: PicturePath, pixels: np.ndarray, kept: Path) -> torch.Tensor:
    """Features `(n, places, width)` of a frozen tower, computed once and kept in a file in half precision."""
    if kept.exists():
        return torch.load(kept).float()
    made = []
    for start in track(range(0, len(pixels), 100), f"Features: {kept.stem}", console=console):
        features, _ = path.features(path.inputs(as_pictures(pixels[start : start + 100])))
        made.append(torch.stack(features).half())
    torch.save(torch.cat(made), kept)
    return torch.cat(made).float()


class Questions:
    """The question with each of the answers, as token ids; the pictures come as features or tokens."""

    def __init__(self, model, processor):
        self.model, self.path = model, PicturePath(model, processor)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        samples = [
            {
                "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": name}],
                "images": [Image.new("RGB", (28, 28))],
            }
            for name in NAMES
        ]
        self.rows = anyvlm.AnyVlmDataCollator(processor)(samples)
        self.rows.pop("pixel_values")

    def tokens(self, features: torch.Tensor) -> torch.Tensor:
        return self.path.project(features, tuple(self.model.config.vision_tower_spec["grid"]))[0]

    def batch(self, labels: torch.Tensor, tokens: torch.Tensor) -> dict:
        encoded = AnyVlmImageFeatures(pooler_output=list(tokens))
        return {**{key: rows[labels] for key, rows in self.rows.items()}, "mm_encoder_outputs": {"image": encoded}}

    @torch.no_grad()
    def exact(self, features: torch.Tensor, labels: np.ndarray, shuffled: bool = False) -> float:
        """Share of pictures about which greedy decoding gives exactly the right answer and ends there.

        One forward pass with the right answer in place tells: greedy decoding gives it if and only if each of its tokens is
        the most probable one behind those before it.
        """
        self.model.eval()
        labels, right = torch.tensor(labels.astype(np.int64)), 0
        # Each picture's tokens go to the picture one place on, in a random order.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        given = features.clone()
        if shuffled:
            given[order] = features[order.roll(1)]
        for start in range(0, len(labels), 100):
            part = slice(start, start + 100)
            batch = self.batch(labels[part], self.tokens(given[part]))
            wanted = batch.pop("labels")[:, 1:]
            asked = (wanted != -100).any(0).nonzero().squeeze(1)
            best = self.model(**batch, logits_to_keep=asked).logits.argmax(-1)
            right += int(((best == wanted[:, asked]) | (wanted[:, asked] == -100)).all(1).sum())
        return right / len(labels)


def train_teacher(model, processor, features, labels, seed: int, steps: int, batch_size: int) -> None:
    """Train the projector and the language model on cached features."""
    questions = Questions(model, processor)
    model.vision_tower.requires_grad_(False)
    parts = (model.language_model, 5e-4), (model.multi_modal_projector, 1e-3)
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    warm = 30
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    labels, queue = torch.tensor(labels.astype(np.int64)), []
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in track(range(steps), f"Training, seed {seed}", console=console):
        if len(queue) < batch_size:
            queue += torch.randperm(len(labels), generator=generator).tolist()
        chosen, queue = queue[:batch_size], queue[batch_size:]
        model(**questions.batch(labels[chosen], questions.tokens(features[chosen]))).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def teacher_of(direction: str, seed: int, run: argparse.Namespace, pixels: np.ndarray, labels: np.ndarray):
    """The trained model and its processor, from the folder where it was left if there is one."""
    folder = run.output / f"teacher-{direction}-{seed}"
    if (folder / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model.eval(), AutoProcessor.from_pretrained(folder)
    tower = DIRECTIONS[direction][0]
    model, processor = anyvlm.compose(
        vision=str(run.models / tower.folder),
        text=str(run.models / "stories-15m"),
        image_size=tower.size,
        vision_feature_layer=tower.layer,
        dtype=torch.float32,
        seed=seed,
    )
    torch.manual_seed(seed)
    kept = run.output / f"{tower.folder}-{tower.size}-train-{len(labels)}.pt"
    features = features_of(PicturePath(model, processor), pixels, kept)
    train_teacher(model, processor, features, labels, seed, run.steps, run.batch_size)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return model, processor


def measure(direction: str, seed: int, run: argparse.Namespace, data: list[np.ndarray]) -> dict:
    """One direction with one seed: the shares of exact answers, and what was fitted."""
    kept = run.output / f"result-{direction}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    old_tower, new_tower = DIRECTIONS[direction]
    pixels, labels, test_pixels, test_labels = data
    test_pixels, test_labels = test_pixels[: run.test], test_labels[: run.test]
    model, processor = teacher_of(direction, seed, run, pixels[: run.train], labels[: run.train])
    unlabelled = random.Random(seed).sample(range(FIRST_UNLABELLED, len(pixels)), run.pictures)
    pictures = as_pictures(pixels[unlabelled])

    def exact(model, processor, tower: Tower, **kwargs) -> float:
        name = f"{tower.folder}-{tower.size}-layer{model.config.vision_feature_layer}-test-{run.test}"
        features = features_of(PicturePath(model, processor), test_pixels, run.output / f"{name}.pt")
        return Questions(model, processor).exact(features, test_labels, **kwargs)

    result = {
        "teacher": exact(model, processor, old_tower),
        "shuffled": exact(model, processor, old_tower, shuffled=True),
    }
    arguments = {"vision": str(run.models / new_tower.folder), "image_size": new_tower.size, "seed": seed}
    new_model, new_processor, _ = anyvlm.swap(model, processor, **arguments)
    result["random"] = exact(new_model, new_processor, new_tower)
    new_model, new_processor, report = anyvlm.swap(model, processor, images=pictures, seconds=0, **arguments)
    result["closed"] = exact(new_model, new_processor, new_tower)
    words = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    distillation = distil(
        model, processor, new_model, new_processor, pictures, texts=[QUESTION], seconds=run.seconds, seed=seed
    )
    if not all(torch.equal(tensor, words[name]) for name, tensor in new_model.language_model.state_dict().items()):
        raise RuntimeError("The language model was changed by the distillation.")
    result["distilled"] = exact(new_model, new_processor, new_tower)
    result["alignment"] = {key: report.alignment[key] for key in ("explained_variance", "target", "seconds")}
    result["layers"] = report.layers
    result["distillation"] = {key: distillation[key] for key in ("steps", "seconds", "examples", "agreement")}
    check_generate(new_model, new_processor, test_pixels[:24], test_labels[:24])
    kept.write_text(json.dumps(result, indent=2) + "\n")
    return result


def check_generate(model, processor, pixels: np.ndarray, labels: np.ndarray) -> None:
    """What is counted as exact is what `generate` answers."""
    questions = Questions(model, processor)
    path = questions.path
    features = torch.stack(path.features(path.inputs(as_pictures(pixels)))[0])
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[prompt] * len(pixels), images=[[one] for one in as_pictures(pixels)], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [answer.strip() for answer in processor.batch_decode(generated, skip_special_tokens=True)]
    right = sum(answer == NAMES[label] for answer, label in zip(answers, labels)) / len(labels)
    counted = questions.exact(features, labels)
    if abs(right - counted) > 1e-6:
        raise RuntimeError(f"generate answers {right:.3f} of the pictures exactly, but {counted:.3f} were counted.")


def table(results: dict[str, list[dict]], run: argparse.Namespace) -> str:
    """Markdown: means and deviations over the seeds, and what is retained of the trained model's answers."""
    lines = []
    for direction, measured in results.items():
        if not measured:
            continue
        old, new = (tower.name for tower in DIRECTIONS[direction])
        words = {"old": old, "new": new, "pictures": run.pictures, "seconds": run.seconds}
        lines += [
            "",
            f"**{old} → {new}**",
            "",
            "| | exact answers | retained | lowest of the seeds |",
            "|---|---|---|---|",
        ]
        for row, text in ROWS.items():
            shares = [100 * result[row] for result in measured]
            kept = [100 * result[row] / result["teacher"] for result in measured]
            lines.append(
                f"| {text.format(**words)} | {spread(shares)} % | {statistics.mean(kept):.1f} % | {min(kept):.1f} % |"
            )
        explained = [result["alignment"]["explained_variance"] for result in measured]
        agreement = [100 * result["distillation"]["agreement"]["after"] for result in measured]
        steps = [result["distillation"]["steps"] for result in measured]
        lines += [
            "",
            f"Explained variance on held-out pictures: {spread(explained, 2)}. Distillation: "
            f"{statistics.mean(steps):.0f} steps; afterwards {statistics.mean(agreement):.0f} % of the held-out pictures' "
            "answers are the old path's, word for word.",
        ]
    count = max(map(len, results.values()))
    head = (
        f"Fashion-MNIST, {run.train:,} training and {run.test:,} test pictures, {len(NAMES)} answers; stories-15m is the "
        f"language model; means over {count} seeds ± standard deviation. {torch.get_num_threads()} threads."
    )
    return "\n".join([head, *lines])


def spread(values: list[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def write_between_marks(path: Path, text: str) -> None:
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{path} has no place for the table, between {BEGIN!r} and {END!r}.")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the trained parts")
    parser.add_argument("--output", type=Path, required=True, help="where checkpoints and results are kept")
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST")
    parser.add_argument("--docs", type=Path, help="file whose marked place gets the table, such as docs/swapping.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--train", type=int, default=6000, help="labelled pictures that the model is trained on")
    parser.add_argument("--test", type=int, default=1000, help="held-out pictures that it is asked about")
    parser.add_argument("--pictures", type=int, default=100, help="pictures without labels for the swap")
    parser.add_argument("--steps", type=int, default=700, help="steps of training")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures per step of training")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the distillation")
    run = parser.parse_args()
    for folder in ("dinov2-small", "resnet-50", "stories-15m"):
        if not (run.models / folder).is_dir():
            raise SystemExit(f"There is no {folder} in {run.models}. Pass --models with a folder that has it.")
    run.output.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist(run.data, run.output)
    results: dict[str, list[dict]] = {direction: [] for direction in run.directions}
    for seed in run.seeds:
        for direction in run.directions:
            started = time.monotonic()
            result = measure(direction, seed, run, data)
            results[direction].append(result)
            shares = ", ".join(f"{row} {100 * result[row]:.1f} %" for row in ROWS)
            console.print(f"{direction}, seed {seed}: {shares} ({time.monotonic() - started:.0f} s)")
    text = table(results, run)
    print(text)
    if run.docs:
        write_between_marks(run.docs, text)


if __name__ == "__main__":
    main()
