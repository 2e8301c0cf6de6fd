"""Which files of a folder are a published checkpoint, and which are what training left beside them."""

import os
from pathlib import Path

from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects


#: Never uploaded. As in huggingface_hub, `*` also matches across folders.
IGNORE_PATTERNS = (
    # State of the Trainer, of accelerate and of DeepSpeed, to go on training.
    "checkpoint-*/*",
    "global_step*/*",
    "optimizer.*",
    "optimizer_*",
    "rng_state*.pth",
    "random_states_*.pkl",
    "scaler.pt",
    "scheduler.*",
    "trainer_state.json",
    "training_args.bin",
    "zero_to_fp32.py",
    # Logs.
    "events.out.tfevents*",
    "*/events.out.tfevents*",
    "runs/*",
    "wandb/*",
    # Half-written files, caches and secrets.
    "*.tmp",
    "*.pyc",
    ".DS_Store",
    "*/.DS_Store",
    ".env*",
    "*/.env*",
)


def files_to_publish(checkpoint: str | os.PathLike) -> tuple[dict[str, int], dict[str, int]]:
    """Files that are uploaded, and files that are left out: names relative to the folder, with sizes in bytes."""
    checkpoint = Path(checkpoint)
    sizes = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    patterns = [*IGNORE_PATTERNS, *DEFAULT_IGNORE_PATTERNS]
    published = {name: sizes[name] for name in filter_repo_objects(sizes, ignore_patterns=patterns)}
    return published, {name: size for name, size in sizes.items() if name not in published}


def readable_size(num_bytes: float) -> str:
    """`1234567` -> `"1.2 MB"`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            break
        num_bytes, unit = num_bytes / 1000, "TB"
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
