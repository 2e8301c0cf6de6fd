"""Try a checkpoint as its users will: in a new process, without `anyvlm` and without the network."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from .errors import FreshProcessError, PublishingError
from .fresh_worker import MARK
from .static_checks import check_files, code_files


_FOLDER = Path(__file__).resolve().parent
_LAUNCHER = _FOLDER / "without_package.py"
_WORKER = _FOLDER / "fresh_worker.py"

QUICK_CLASSES = ("AutoModelForCausalLM",)
MODEL_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")

#: What transformers may write besides weights and code; a checkpoint saved again must have those of the first.
_SAVED_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class FreshCheck:
    """What a fresh process found out about a checkpoint.

    Args:
        classes: Auto classes the model was loaded with; all gave the same logits and tokens.
        saved_again: Whether a copy saved from the fresh process was loaded and compared too.
        image_tokens: `(width, height, image tokens)` for pictures of several sizes.
        picture_effect: Largest change of the last position's logits when the picture changes.
        generated_tokens: The first tokens of a greedy answer.
        generated_text: The same as text.
        python_version: Version of Python in the process.
        torch_version: Version of torch in the process.
        transformers_version: Version of transformers in the process.
        seconds: How long it took.
    """

    classes: tuple[str, ...]
    saved_again: bool
    image_tokens: tuple[tuple[int, int, int], ...]
    picture_effect: float
    generated_tokens: tuple[int, ...]
    generated_text: str
    python_version: str
    torch_version: str
    transformers_version: str
    seconds: float


def check_in_fresh_process(
    checkpoint: str | os.PathLike,
    *,
    quick: bool = False,
    timeout: float = 3600,
    on_step: Callable[[str], None] | None = None,
) -> FreshCheck:
    """Check the files of a checkpoint, then load and run it in a fresh process, without `anyvlm`.

    Config, processor and model are loaded with their Auto classes. Logits must be finite, change with the picture and
    be equal through every class, as must the tokens of a greedy answer. Then the checkpoint is saved again from there,
    which takes as much disk as its weights, and the copy must have the same code and give the same logits.

    Args:
        checkpoint: The folder.
        quick: Load the model once, with `AutoModelForCausalLM`, and save nothing. For big checkpoints.
        timeout: Seconds that each of the two processes may take.
        on_step: Called with the name of each step as it begins.

    Raises:
        PublishingError: files are missing or should not be there.
        FreshProcessError: a step failed; the message names it.
    """
    checkpoint = Path(checkpoint).resolve()
    check_files(checkpoint)
    classes = QUICK_CLASSES if quick else MODEL_CLASSES
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="anyvlm-check-") as folder:
        again, logits = Path(folder, "saved_again"), Path(folder, "logits.safetensors")
        if quick:
            result = _run_worker(checkpoint, classes, [], timeout, on_step)
        else:
            _require_disk_space(checkpoint, folder)
            saving = ["--save-to", str(again), "--logits-to", str(logits)]
            result = _run_worker(checkpoint, classes, saving, timeout, on_step)
            compare_saved_files(checkpoint, again)
            _run_worker(
                again, QUICK_CLASSES, ["--expected", str(logits)], timeout, on_step, prefix="second generation: "
            )
    return FreshCheck(
        classes=classes,
        saved_again=not quick,
        image_tokens=tuple(tuple(count) for count in result.pop("image_tokens")),
        generated_tokens=tuple(result.pop("generated_tokens")),
        seconds=time.monotonic() - started,
        **result,
    )


def logits_in_fresh_process(
    checkpoint: str | os.PathLike, *, timeout: float = 3600, on_step: Callable[[str], None] | None = None
) -> dict[str, torch.Tensor]:
    """Load a checkpoint in a fresh process, without `anyvlm`, and run it on the first picture and question of
    `fresh_worker.py`.

    Returns:
        `logits` `(1, sequence, vocabulary)` of the prompt and `tokens` `(1, NEW_TOKENS)` of a greedy answer.

    Raises:
        FreshProcessError: a step failed; the message names it.
    """
    with tempfile.TemporaryDirectory(prefix="anyvlm-check-") as folder:
        logits = Path(folder, "logits.safetensors")
        options = ["--logits-to", str(logits)]
        _run_worker(Path(checkpoint).resolve(), QUICK_CLASSES, options, timeout, on_step)
        return load_file(logits)


def run_in_fresh_process(
    script: str | os.PathLike,
    *arguments: str | os.PathLike,
    extra_env: dict[str, str] | None = None,
    timeout: float | None = 600,
    on_line: Callable[[str], None] | None = None,
) -> subprocess.CompletedProcess:
    """Run a Python script in a new process in which `anyvlm` cannot be imported, although it may be installed.

    The process is isolated from the environment's Python settings (`python -I`). It is offline, has empty Hugging Face
    caches of its own, which are deleted afterwards, and no token.

    Args:
        script: Path of the script.
        *arguments: What the script gets as `sys.argv[1:]`.
        extra_env: Environment variables that are added or override.
        timeout: Seconds after which the process is ended; `None` for no limit.
        on_line: Called with each line of standard output as it comes.

    Returns:
        The finished process, with its `stdout` and `stderr`.

    Raises:
        FreshProcessError: it failed or took too long; the message has the last lines of its standard error.
    """
    command = [sys.executable, "-I", str(_LAUNCHER), os.fspath(script), *map(os.fspath, arguments)]
    lines, timed_out = [], threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="anyvlm-home-") as home,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
    ):
        environment = {**_environment(home), **(extra_env or {})}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(timeout, stop) if timeout is not None else None
        try:
            if timer is not None:
                timer.start()
            for line in process.stdout:
                lines.append(line)
                if on_line is not None:
                    on_line(line.rstrip("\n"))
            process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        stderr = errors.read()
    name = os.path.basename(script)
    if timed_out.is_set():
        raise FreshProcessError(f"{name} took longer than {timeout:g} seconds and was ended.", stderr)
    if process.returncode < 0:
        raise FreshProcessError(
            f"{name} was ended by signal {-process.returncode}. If that is 9, memory most likely ran out.",
            stderr,
            process.returncode,
        )
    if process.returncode > 0:
        raise FreshProcessError(f"{name} failed with exit code {process.returncode}.", stderr, process.returncode)
    return subprocess.CompletedProcess(command, process.returncode, "".join(lines), stderr)


def _environment(home: str) -> dict[str, str]:
    """This process's, with nothing in it that the user of a checkpoint may not have: a token, caches, the network."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    return {
        **kept,
        "HF_HOME": home,
        "HF_HUB_CACHE": os.path.join(home, "hub"),
        "HF_MODULES_CACHE": os.path.join(home, "modules"),
        "HF_TOKEN_PATH": os.path.join(home, "token"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _run_worker(
    checkpoint: Path,
    classes: tuple[str, ...],
    options: list[str],
    timeout: float,
    on_step: Callable[[str], None] | None,
    prefix: str = "",
) -> dict:
    """What the worker found out.

    Raises:
        FreshProcessError: with the step it failed in.
    """
    told: dict = {"step": "start Python"}

    def on_line(line: str) -> None:
        if line.startswith(MARK):
            message = json.loads(line.removeprefix(MARK))
            told.update(message)
            if "step" in message and on_step is not None:
                on_step(prefix + message["step"])

    try:
        run_in_fresh_process(_WORKER, checkpoint, *options, "--classes", *classes, timeout=timeout, on_line=on_line)
    except FreshProcessError as error:
        reason = told.get("error", error.summary)
        summary = f"In a fresh process, the step {prefix + told['step']!r} failed: {reason}"
        raise FreshProcessError(summary, error.stderr, error.returncode) from None
    return told["result"]


def _require_disk_space(checkpoint: Path, folder: str) -> None:
    needed = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise PublishingError(
            f"Saving the checkpoint again takes {needed / 1e9:.1f} GB, but {os.path.dirname(folder)} has "
            f"{free / 1e9:.1f} GB left. Point TMPDIR to a bigger disk, or check with quick=True (--quick)."
        )


def compare_saved_files(checkpoint: Path, again: Path) -> None:
    """Make sure that a copy saved without `anyvlm` has the same code and every file that transformers writes.

    Raises:
        FreshProcessError: a file is lost, or code differs.
    """
    step = "compare the files of the second generation"
    expected = code_files(checkpoint) | {name for name in _SAVED_FILES if (checkpoint / name).is_file()}
    lost = sorted(name for name in expected if not (again / name).is_file())
    if lost:
        raise FreshProcessError(f"The step {step!r} failed: saved again, the checkpoint lacks {', '.join(lost)}.")
    changed = [
        name
        for name in sorted(code_files(checkpoint))
        if (again / name).read_bytes() != (checkpoint / name).read_bytes()
    ]
    if changed:
        raise FreshProcessError(f"The step {step!r} failed: saved again, the code differs in {', '.join(changed)}.")
