"""The demo from end to end."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import DemoError, fresh_answers
from .data import Question, TrainingQuestions, held_out_questions, shuffled_pictures, split_digits
from .description import describe_parts
from .parts import Parts, compose_parts
from .report import versions, write_report, write_results, written_aside
from .scores import Score, score
from .sheet import draw_sheet
from .train import PRETRAINED_PARTS, SIZES, SMALL_PARTS, Recipe, progress_bar, train


CHECKPOINT, PICTURES, SHEET, REPORT, RESULTS = "checkpoint", "pictures", "sheet.png", "report.md", "results.json"
#: Longest answer in tokens. Right answers take one to three and the end; a wrong one may ramble.
MAX_NEW_TOKENS = 6
#: Questions answered together.
ANSWER_BATCH_SIZE = 64


@dataclass
class _Clock:
    """Seconds on the wall and of processor time, this process and its children together."""

    wall_start: float = field(default_factory=time.perf_counter)
    cpu_start: float = field(default_factory=lambda: sum(os.times()[:4]))
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - start

    def seconds(self) -> dict[str, Any]:
        return {
            "wall": time.perf_counter() - self.wall_start,
            "cpu": sum(os.times()[:4]) - self.cpu_start,
            "phases": self.phases,
        }


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """torch computes with so many threads; `None` for as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recipe_for(parts: Parts, size: str) -> Recipe:
    """How long and on how much these parts are trained in a demo of this size.

    Raises:
        ValueError: unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"Unknown size {size!r}. Choose one of: {', '.join(SIZES)}.")
    return (PRETRAINED_PARTS if parts.pretrained else SMALL_PARTS)[size]


def run_demo(
    output: str | os.PathLike,
    recipe: Recipe,
    parts: Parts | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compose, train, ask with right and with shuffled pictures, save, reload in a fresh process, ask again, report.

    Args:
        output: Folder for `checkpoint/`, `pictures/`, `sheet.png`, `report.md` and `results.json`. What an earlier run
            left there is replaced.
        recipe: How long to train, and on how much.
        parts: What to compose. Default: small parts with random weights.
        seed: For the split, the questions, the weights and the order.
        console: Where progress is shown.

    Returns:
        What `results.json` holds.

    Raises:
        CompositionError: the parts cannot be composed.
        DemoError: the fresh process failed, or answered differently than the trained model.
        ValueError: `output` holds files that are not the demo's.
    """
    output = Path(output)
    _check_output(output)
    with _threads(recipe.num_threads):
        return _run(output, recipe, parts or Parts(), seed, console or Console())


def _run(output: Path, recipe: Recipe, parts: Parts, seed: int, console: Console) -> dict[str, Any]:
    clock = _Clock()
    training_digits, held_out_digits = split_digits(seed=seed)
    questions = held_out_questions(held_out_digits, recipe.held_out_per_kind, seed)
    with clock.phase("composing"), console.status("Composing the parts…"):
        model, processor = compose_parts(parts, seed)
        description = describe_parts(model, processor)
    _show_parts(console, description)

    output.mkdir(parents=True, exist_ok=True)
    for name in (SHEET, REPORT, RESULTS):
        # If this run breaks off, an earlier one's report must not be taken for its own.
        (output / name).unlink(missing_ok=True)
    with clock.phase("training"):
        samples = TrainingQuestions(training_digits, recipe.steps * recipe.batch_size, seed)
        losses = train(model, processor, samples, recipe, output, seed, console)
    with clock.phase("answering"):
        pictures = [question.picture for question in questions]
        answers = _answer(model, processor, questions, pictures, "Answering", console)
        shuffled = shuffled_pictures(questions, seed)
        shuffled_answers = _answer(model, processor, questions, shuffled, "Answering, pictures shuffled", console)
    scores = score(questions, answers, shuffled_answers)

    with clock.phase("saving"), written_aside(output / CHECKPOINT) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    with clock.phase("fresh process"), console.status("Loading and asking again, in a fresh process without anyvlm…"):
        conversations = [question.messages() for question in questions]
        try:
            fresh = fresh_answers.answer_in_fresh_process(
                output / CHECKPOINT, conversations, pictures, ANSWER_BATCH_SIZE, MAX_NEW_TOKENS
            )
        except RuntimeError as error:
            raise DemoError(str(error)) from error
    same_answers = sum(before == after for before, after in zip(answers, fresh["answers"], strict=True))

    _write_example_pictures(output / PICTURES, questions)
    total = sum(part["parameters"] for part in description["parts"].values())
    names = " + ".join(f"{description['parts'][name]['type']}" for name in ("vision tower", "language model"))
    with written_aside(output / SHEET) as path:
        draw_sheet(path, questions, answers, scores, losses, f"anyvlm demo: {names}, {total / 1e6:.1f} M parameters")
    results = {
        "seed": seed,
        "recipe": asdict(recipe),
        "requested_parts": asdict(parts),
        "model": description,
        "training_pictures": len(training_digits),
        "held_out_pictures": len(held_out_digits),
        "scores": [entry.to_dict() for entry in scores],
        "fresh_process": {
            "num_questions": len(questions),
            "same_answers": same_answers,
            "model_class": fresh["model_class"],
            "loading_seconds": fresh["seconds"],
        },
        "seconds": clock.seconds(),
        "versions": versions(),
        "losses": losses,
        "answers": [
            {"kind": question.kind, "question": question.text, "truth": question.answer, "answer": answer}
            for question, answer in zip(questions, answers)
        ],
    }
    write_report(output / REPORT, results, scores)
    write_results(output / RESULTS, results)
    _show_scores(console, scores)
    if same_answers != len(questions):
        raise DemoError(
            f"The fresh process gave another answer to {len(questions) - same_answers} of {len(questions)} questions; "
            f"see {output / REPORT}."
        )
    console.print(f"The fresh process gave the same answer to all {len(questions)} questions.")
    console.print(f"{results['seconds']['wall']:.0f} seconds. Written to {output}: {SHEET}, {REPORT}, {CHECKPOINT}/")
    return results


def _check_output(output: Path) -> None:
    """The demo replaces what it finds in its folder, so the folder must hold nothing else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file. Choose a folder for --output.")
    found = {path.name.removesuffix(".partial") for path in output.iterdir()}
    foreign = sorted(found - {CHECKPOINT, PICTURES, SHEET, REPORT, RESULTS})
    if foreign:
        raise ValueError(
            f"{output} holds other files than a demo's ({', '.join(foreign[:3])}). Choose another --output."
        )


def _answer(
    model, processor, questions: Sequence[Question], pictures: Sequence, description: str, console: Console
) -> list[str]:
    """Answers to all questions, given these pictures, with a progress bar."""
    conversations = [question.messages() for question in questions]
    answers: list[str] = []
    with progress_bar(console) as bar:
        task = bar.add_task(description, total=len(questions))
        batches = fresh_answers.answer_in_batches(
            model, processor, conversations, pictures, ANSWER_BATCH_SIZE, MAX_NEW_TOKENS
        )
        for batch in batches:
            answers.extend(batch)
            bar.update(task, completed=len(answers))
    return answers


def _write_example_pictures(folder: Path, questions: Sequence[Question]) -> None:
    """The first picture of each kind as a file, to ask about with `anyvlm generate`."""
    with written_aside(folder) as aside:
        aside.mkdir()
        for kind in dict.fromkeys(question.kind for question in questions):
            first = next(question for question in questions if question.kind == kind)
            first.picture.save(aside / f"{kind.replace(' ', '-')}.png")


def _show_parts(console: Console, description: dict[str, Any]) -> None:
    parts = ", ".join(
        f"{name} {part['type']} ({part['parameters'] / 1e6:.2f} M{'' if part['trained'] else ', frozen'})"
        for name, part in description["parts"].items()
    )
    console.print(f"Composed: {parts}; {description['tokens_per_picture']} tokens per picture.")


def _show_scores(console: Console, scores: Sequence[Score]) -> None:
    table = Table(title="Exact answers about held-out pictures")
    table.add_column("kind of question")
    for heading in ("questions", "exact", "pictures shuffled", "chance"):
        table.add_column(heading, justify="right")
    for entry in scores:
        if entry is scores[-1]:
            table.add_section()
        shares = (f"{100 * share:.1f} %" for share in (entry.exact, entry.shuffled, entry.chance))
        table.add_row(entry.kind, str(entry.num_questions), *shares)
    console.print(table)
