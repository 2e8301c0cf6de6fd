"""Checkpoints that are whole or not there, whenever the training is stopped."""

import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

#: Beside the checkpoints: where one is while it is written.
INCOMPLETE = ".incomplete"
#: In a checkpoint: losses that were counted and not yet logged, one file for each process.
LOGGING_STATE = "logging_state_{}.json"


def what_is_torn(checkpoint: str | os.PathLike) -> str | None:
    """Why a checkpoint of `Trainer` cannot be resumed from; `None` if it is whole.

    `Trainer` writes its state last. Sizes of all files of tensors are checked too, for disks that filled up.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut off"
    for path in sorted(checkpoint.iterdir()):
        if path.name.endswith(".index.json"):
            try:
                shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            except ValueError:
                return f"{path.name} is cut off"
            missing = sorted(shard for shard in shards if not (checkpoint / shard).is_file())
            if missing:
                return f"{missing[0]} is missing"
        elif path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError):
                return f"{path.name} is cut off"
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint in a trainer's `output_dir` that is whole; `None` if there is none. Torn ones are named in a
    warning and passed over."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        torn = what_is_torn(path)
        if torn is None:
            return str(path)
        logger.warning(f"{path} is passed over: {torn}. Its writer was stopped, or the disk was full.")
    return None


class SafeCheckpointsMixin:
    """Before `Trainer` among the bases: `class MyTrainer(SafeCheckpointsMixin, Trainer)`. `AnyVlmTrainer` has it.

    A checkpoint is written to `.incomplete` in the output folder and renamed when all of it is on the disk; older ones
    are deleted after that. What is logged after resuming is what an uninterrupted training logs, also where a checkpoint
    falls between two logs.
    """

    _written_aside: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer`'s.

        Args:
            resume_from_checkpoint: With `True`, the last checkpoint that is whole; if there is none, the training begins
                at its beginning, with a warning.

        Raises:
            ValueError: the checkpoint named is torn.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(f"{self.args.output_dir} has no complete checkpoint: the training begins at its start.")
        elif resume_from_checkpoint and (torn := what_is_torn(resume_from_checkpoint)):
            last = last_complete_checkpoint(Path(resume_from_checkpoint).parent)
            raise ValueError(
                f"{resume_from_checkpoint} cannot be resumed from: {torn}. "
                + (f"The last whole one is {last}." if last else "There is no whole one beside it.")
            )
        begin = _RestoreLoggingState(self, resume_from_checkpoint or None)
        self.add_callback(begin)
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self.remove_callback(begin)

    def _get_output_dir(self, trial: Any) -> str:
        return self._written_aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As `Trainer`'s, which writes, uploads and deletes; here it writes elsewhere, and the rest follows the renaming."""
        run_folder = self._get_output_dir(trial)
        aside = os.path.join(run_folder, INCOMPLETE)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial, final = os.path.join(aside, name), os.path.join(run_folder, name)
        is_main = self.args.should_save
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(partial)
        self.accelerator.wait_for_everyone()
        best = os.path.join(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step and os.path.isdir(best):
            self.state.best_model_checkpoint = best
        push, self.args.push_to_hub = self.args.push_to_hub, False
        self._written_aside = aside
        try:
            super()._save_checkpoint(model, trial)
            _write_json(os.path.join(partial, LOGGING_STATE.format(self.args.process_index)), self.logging_state())
            self._correct_best_checkpoint(partial, final)
            self.accelerator.wait_for_everyone()
            if is_main:
                _sync(Path(partial))
                _take_place(partial, final)
        except BaseException as error:
            if is_main:
                shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, Exception):
                logger.error(
                    f"{final} could not be written, and nothing of it was left: {error}. Older checkpoints are as they "
                    "were; make room, and train again with resume_from_checkpoint=True."
                )
            raise
        finally:
            self._written_aside, self.args.push_to_hub = None, push
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(final)
        if is_main:
            rotate_checkpoints(
                output_dir=run_folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _correct_best_checkpoint(self, partial: str, final: str) -> None:
        if self.state.best_model_checkpoint == partial:
            self.state.best_model_checkpoint = final
            if self.args.should_save:
                self.state.save_to_json(os.path.join(partial, TRAINER_STATE_NAME))

    def logging_state(self) -> dict[str, Any]:
        """What was counted since the last log, for JSON; a subclass adds what it counts."""
        return {
            "tr_loss": self._tr_loss.item(),
            "globalstep_last_logged": self._globalstep_last_logged,
        }

    def load_logging_state(self, state: dict[str, Any]) -> None:
        """Go on counting from `logging_state`."""
        self._tr_loss.fill_(state["tr_loss"])
        # The mean over this training alone, which `Trainer` makes of it, is not to have what came before.
        self._total_loss_scalar = -state["tr_loss"]
        self._globalstep_last_logged = state["globalstep_last_logged"]


class _RestoreLoggingState(TrainerCallback):
    """`Trainer` begins to count at zero, just before the training begins."""

    def __init__(self, trainer: SafeCheckpointsMixin, checkpoint: str | None):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        path = self.checkpoint and Path(self.checkpoint, LOGGING_STATE.format(args.process_index))
        if path and path.is_file():
            self.trainer.load_logging_state(json.loads(path.read_text(encoding="utf-8")))


def _take_place(partial: str, final: str) -> None:
    """Rename, the old one of the same step out of the way first: it was torn, or the training was begun again earlier."""
    replaced = f"{partial}-replaced"
    if os.path.exists(final):
        os.rename(final, replaced)
    os.rename(partial, final)
    _sync_folder(Path(final).parent)


def _sync(folder: Path) -> None:
    """Have all of a folder on the disk before it gets its name: a power cut must not leave the name without the data."""
    paths = [folder, *folder.rglob("*")]
    with ThreadPoolExecutor(16) as pool:  # file systems put what waits together into one write
        list(pool.map(_sync_file, [path for path in paths if path.is_file()]))
    for path in paths:
        if path.is_dir():
            _sync_folder(path)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: str, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file)
