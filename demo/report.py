"""What a run writes: results, a short report, and files that are whole or not there."""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..configuration.configuration_anyvlm import CODE_VERSION
from .scores import Score


VERSIONED_PACKAGES = ("torch", "transformers", "tokenizers", "scikit-learn", "numpy", "pillow")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder at, which takes its place only if nothing went wrong."""
    aside = path.with_name(f"{path.name}.partial")
    _remove(aside)
    try:
        yield aside
        _remove(path)
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what the result depends on."""
    found = {"python": platform.python_version(), "anyvlm": CODE_VERSION}
    return {**found, **{name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write everything measured as JSON."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_report(path: Path, results: dict[str, Any], scores: Sequence[Score]) -> None:
    """Write the report in Markdown, from the same results."""
    with written_aside(path) as aside:
        aside.write_text(report_text(results, scores), encoding="utf-8")


def report_text(results: dict[str, Any], scores: Sequence[Score]) -> str:
    """The report: what was composed, the table of scores, the fresh process, times, versions, how to load it."""
    model, recipe, seconds, fresh = (results[key] for key in ("model", "recipe", "seconds", "fresh_process"))
    height, width = model["picture_size"]
    total = sum(part["parameters"] for part in model["parts"].values())
    part_rows = [
        f"| {name} | `{part['type']}` | {part['parameters']:,} | {'trained' if part['trained'] else 'frozen'} |"
        for name, part in model["parts"].items()
    ]
    score_rows = [
        f"| {entry.kind} | {entry.num_questions} | {100 * entry.exact:.1f} % | {100 * entry.shuffled:.1f} % "
        f"| {100 * entry.chance:.1f} % |"
        for entry in scores
    ]
    phases = ", ".join(f"{name} {value:.0f} s" for name, value in seconds["phases"].items())
    named_versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"""\
# anyvlm demo

A vision tower and a language model composed into one model, trained on questions about scikit-learn's handwritten
digits, and loaded again in a fresh process without the package. {results["training_pictures"]} pictures were trained
on, {results["held_out_pictures"]} others asked about.

| Part | Type | Parameters | |
|---|---|---:|---|
{chr(10).join(part_rows)}
| all | | {total:,} | |

A picture of {height}x{width} pixels takes {model["tokens_per_picture"]} tokens.
Trained for {recipe["steps"]} steps of {recipe["batch_size"]} questions, with seed {results["seed"]}.

## Exact answers about held-out pictures

| Kind of question | Questions | Exact | Pictures shuffled | Chance |
|---|---:|---:|---:|---:|
{chr(10).join(score_rows)}

*Pictures shuffled*: the same questions, each with the picture of another question of its kind. *Chance*: always giving
the most common answer of the kind. A model that reads its pictures is far above both with its own picture, and not
above chance with another's.

## Fresh process

A new Python process, in which `anyvlm` cannot be imported, loaded `checkpoint/` and gave the same answer to
**{fresh["same_answers"]} of {fresh["num_questions"]}** questions.

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("checkpoint", trust_remote_code=True)
```

`sheet.png` shows some questions with their answers, and the loss; `results.json` has every number.

{seconds["wall"]:.0f} s in all, {seconds["cpu"]:.0f} s of processor time: {phases}.

Made with {named_versions}.
"""
