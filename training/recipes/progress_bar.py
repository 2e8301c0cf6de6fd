"""Where a stage is: a bar in a terminal, else a line now and then."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Steps and the last losses of a stage, on standard error, from the main process."""

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        self.bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.console.is_terminal or args.disable_tqdm:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self.console,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step, losses="")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = "  ".join(
            f"{key.removeprefix('loss/')} {value:.3f}"
            for key, value in (logs or {}).items()
            if key in ("loss", "eval_loss") or key.startswith("loss/")
        )
        if not losses or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(self.task, losses=losses)
        elif not self.console.is_terminal:
            line = f"{self.name}: step {state.global_step} of {state.max_steps}  {losses}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
