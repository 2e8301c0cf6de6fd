"""Kill a training at random moments, start it again each time, and compare every loss with an uninterrupted training's.

The training is small and has what makes resuming hard: dropout, a cosine schedule, gradient accumulation, layers that are
unfrozen one after the other, a second loss with a head of its own, a cache of features, adapters, logs that do not fall on
checkpoints. Checkpoints are written after every other step, so that many kills fall into one being written.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from enum import Enum
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


#: What the process that trains writes beside its checkpoints: every log as it comes, and at the end the weights' digest.
LOG_NAME, DONE_NAME = "log.jsonl", "done.json"
STEPS, SAVE_STEPS, LOGGING_STEPS = 40, 2, 3
#: Trainings are new processes, forked from one that has imported the libraries and done nothing else.
_PROCESSES = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "anyvlm.training.trainer",
    "anyvlm.training.parts.adapters",
    "anyvlm.compatibility.tiny_configs",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "peft",
)

app = typer.Typer(add_completion=False, help=__doc__)


class Kind(str, Enum):
    """Two trainings that together have all that a checkpoint must hold."""

    parts = "parts"  # unfreezing and layer-wise rates, a contrastive loss with its head
    adapters = "adapters"  # LoRA, features of the frozen tower from a cache


def train(folder: Path, kind: Kind, steps: int, ready: Any) -> None:
    """The training that is killed, in a process of its own; resumes from the last whole checkpoint in the folder."""
    with open(folder / "output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    trainer = _trainer(folder, kind, steps)
    ready.send(True)
    trainer.train(resume_from_checkpoint=True)
    weights = {name: tensor.double().sum().item() for name, tensor in trainer.model.state_dict().items()}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    partial = folder / f"{DONE_NAME}.partial"
    partial.write_text(json.dumps({"weights": weights, "history": history}))
    partial.rename(folder / DONE_NAME)


def _trainer(folder: Path, kind: Kind, steps: int):
    import numpy as np
    from PIL import Image
    from transformers import TrainerCallback, TrainingArguments, set_seed

    import anyvlm
    from anyvlm.compatibility import tiny_configs
    from anyvlm.compatibility.tiny_tokenizer import tiny_tokenizer
    from anyvlm.training.feature_cache import FeatureCache
    from anyvlm.training.objectives.contrastive import ContrastiveObjective
    from anyvlm.training.parts.adapters import add_adapters
    from anyvlm.training.parts.trained_parts import train_parts

    class WriteLogs(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            with open(folder / LOG_NAME, "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    set_seed(0)
    text = tiny_configs.text_config("llama")
    text.attention_dropout = 0.1
    model, processor = anyvlm.compose(
        vision=tiny_configs.vision_config("clip_vision_model"), text=text, tokenizer=tiny_tokenizer()
    )
    samples = []
    for index in range(24):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        answer = " ".join(f"w{(index * place) % 60}" for place in range(1, 3 + index % 3))
        question = [{"type": "image"}, {"type": "text", "text": f"w{index % 7} ?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        samples.append({"messages": messages, "images": [Image.fromarray(pixels).resize((32, 32))]})
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        logging_steps=LOGGING_STEPS,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    cache, objectives, callbacks = None, {}, [WriteLogs()]
    if kind is Kind.adapters:
        model = add_adapters(model, {"language_model": {"r": 4, "lora_dropout": 0.1}}, base_model="not needed here")
        trained = train_parts(model, {"language_model": "lora", "multi_modal_projector": 1e-2})
        cache = FeatureCache(folder / "features", model.get_base_model(), processor)
    else:
        objectives["contrastive"] = ContrastiveObjective(model, embedding_size=8)
        trained = train_parts(
            model,
            {
                "multi_modal_projector": 1e-2,
                "vision_tower": {
                    "train": "all",
                    "learning_rate": 1e-3,
                    "layer_decay": 0.9,
                    "unfreeze": [0.2, 0.5, 0.8],
                },
                "language_model": 3e-3,
            },
        )
    from anyvlm.training.trainer import AnyVlmTrainer

    return AnyVlmTrainer(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=anyvlm.AnyVlmDataCollator(processor, objectives=objectives, feature_cache=cache),
        processing_class=processor,
        objectives=objectives,
        parameter_groups=trained.parameter_groups(arguments.learning_rate, arguments.weight_decay),
        callbacks=[*trained.callbacks(), *callbacks],
    )


def _start(folder: Path, kind: Kind, steps: int) -> BaseProcess:
    """Start the training, and wait until it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    ready, to_tell = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=train, args=(folder, kind, steps, to_tell))
    process.start()
    while not ready.poll(0.05):
        if not process.is_alive():
            raise RuntimeError("The training did not begin:\n" + (folder / "output.txt").read_text()[-2000:])
    return process


def _logs(folder: Path) -> list[dict]:
    """All logs that any of the processes wrote; the last line of a killed one may be cut off."""
    entries = []
    for line in (folder / LOG_NAME).read_text().splitlines() if (folder / LOG_NAME).is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry:
            entries.append(entry)
    return entries


def _finish(process: BaseProcess, folder: Path) -> dict:
    process.join()
    if process.exitcode != 0:
        raise RuntimeError("The training failed:\n" + (folder / "output.txt").read_text()[-2000:])
    return json.loads((folder / DONE_NAME).read_text())


def interrupt(folder: Path, kind: Kind, kills: int, seed: int, steps: int, on_kill=lambda: None) -> list[dict]:
    """Kill trainings `kills` times, resume each time, and compare.

    Returns:
        For each kill: `kind`, `after` (seconds since the training began or went on), `last_step` whose loss was logged,
        `saving` (whether a checkpoint was being written), `resumed_from` (step), and `equal`: whether every loss, gradient
        norm and rate that was logged from then to the end, and the weights at the end, are those of the uninterrupted
        training.
    """
    moments = random.Random(f"{seed} {kind.value}")
    began = time.monotonic()
    process = _start(folder / "uninterrupted", kind, steps)
    loaded = time.monotonic()
    expected = _finish(process, folder / "uninterrupted")
    seconds = time.monotonic() - loaded
    reference = {entry["step"]: entry for entry in _logs(folder / "uninterrupted")}
    rows: list[dict] = []
    number = 0
    while len(rows) < kills:
        run, number, killed = folder / f"killed-{number}", number + 1, []
        process = _start(run, kind, steps)
        while len(rows) + len(killed) < kills:
            after = moments.uniform(0, seconds / 3)
            process.join(after)
            if not process.is_alive():
                break  # it was done before
            process.kill()  # SIGKILL
            process.join()
            aside = run / ".incomplete"
            logs = _logs(run)
            killed.append(
                {
                    "kind": kind.value,
                    "after": round(after, 3),
                    "last_step": logs[-1]["step"] if logs else 0,
                    "saving": aside.is_dir() and any(aside.iterdir()),
                    "logs_before": len(logs),
                }
            )
            on_kill()
            process = _start(run, kind, steps)
        done = _finish(process, run)
        logs = _logs(run)
        same_end = done == expected
        for row in killed:
            row["logs_compared"] = len(logs) - row.pop("logs_before")
            equal = all(entry == reference[entry["step"]] for entry in logs[-row["logs_compared"] :])
            row["equal"] = same_end and equal
        rows += killed
        shutil.rmtree(run)
    print(f"{kind.value}: {seconds:.1f} s uninterrupted, {time.monotonic() - began:.0f} s in all", file=sys.stderr)
    return rows


@app.command()
def run(
    kills: Annotated[int, typer.Option(min=2, help="How often a training is killed, half for each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="For the moments.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and 3 kills: does it run?")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the rows as JSON.")] = None,
) -> None:
    """Kill, resume, compare, and print a table; exits with 1 if one loss differs.

    Example: python benchmarks/interrupted.py --output interrupted.json
    """
    steps = 16 if quick else STEPS
    shares = (
        {Kind.parts: 2, Kind.adapters: 1} if quick else {Kind.parts: kills - kills // 2, Kind.adapters: kills // 2}
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    # Of a killed process something is always left, which Python warns of and clears away.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    _PROCESSES.set_forkserver_preload(list(_IMPORTED))
    console = Console()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("killed", total=sum(shares.values()))
        for kind, share in shares.items():
            rows += interrupt(Path(folder) / kind.value, kind, share, seed, steps, lambda: bar.advance(task))
    table = Table("training", "killed after", "last loss of step", "while saving", "logs compared", "equal")
    for row in rows:
        table.add_row(
            row["kind"],
            f"{row['after']:.2f} s",
            str(row["last_step"]),
            "yes" if row["saving"] else "",
            str(row["logs_compared"]),
            "yes" if row["equal"] else "NO",
        )
    console.print(table)
    equal, saving = sum(row["equal"] for row in rows), sum(row["saving"] for row in rows)
    console.print(f"{equal} of {len(rows)} resumed with the same losses; {saving} were killed while saving.")
    if output is not None:
        output.write_text(
            json.dumps({"kills": len(rows), "equal": equal, "while_saving": saving, "rows": rows}, indent=1)
        )
    raise typer.Exit(0 if equal == len(rows) else 1)


if __name__ == "__main__":
    app()
