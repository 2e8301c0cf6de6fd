"""The folder of a run: what is finished, so that the same command goes on, and the model at the end."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..safe_checkpoints import last_complete_checkpoint
from .schema import Recipe, Stage
from .yaml_file import KeyPath, dotted


#: Keys that may differ when a run goes on.
_ANY_TIME = ("why",)


class RunFolder:
    """`output` of a recipe.

    ```
    output/            the trained model, when all is done
      summary.json …
      stages/recipe.json          which recipe this is
      stages/1-projector/         the trainer's checkpoints and logs
        model/                    the model after the stage
        stage.json                what came out; it is there when the stage is finished
    ```
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.output = Path(recipe.output)
        self.stages = self.output / "stages"
        self._record = self.stages / "recipe.json"

    def stage(self, stage: Stage) -> Path:
        return self.stages / stage.folder

    def model(self, stage: Stage) -> Path:
        return self.stage(stage) / "model"

    def result(self, stage: Stage) -> dict[str, Any] | None:
        """What a finished stage's marker says; `None` if it is not finished."""
        marker = self.stage(stage) / "stage.json"
        return json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else None

    def finish(self, stage: Stage, result: dict[str, Any]) -> None:
        write_json(self.stage(stage) / "stage.json", result)

    def last_checkpoint(self, stage: Stage) -> str | None:
        """The trainer's last checkpoint that is whole."""
        return last_complete_checkpoint(self.stage(stage))

    @property
    def is_finished(self) -> bool:
        return (self.output / "summary.json").is_file() and all(
            self.result(stage) is not None for stage in self.recipe.stages
        )

    def open(self, restart: bool) -> None:
        """Begin a run, or go on with one.

        Raises:
            ValueError: the folder holds a run of another recipe, or other files.
        """
        if restart and self.stages.is_dir() and not self._record.is_file():
            raise ValueError(
                f"{self.stages} is no folder of a run, so it is not removed. Write another folder as `output`."
            )
        if restart:
            self._remove_run()
        elif self._record.is_file():
            self._check_same_recipe()
        elif self.output.is_dir() and any(self.output.iterdir()):
            raise ValueError(
                f"{self.output} holds files that are no run of a recipe. Write another folder as `output`, or add "
                "--restart to train into it: files of a model there are replaced."
            )
        self.stages.mkdir(parents=True, exist_ok=True)
        write_json(self._record, {"hash": digest(self.recipe.values), "recipe": self.recipe.values})

    def _check_same_recipe(self) -> None:
        old = json.loads(self._record.read_text(encoding="utf-8"))
        if old["hash"] == digest(self.recipe.values):
            return
        begun = self._begun()
        if begun == 0:  # it failed before there was anything to lose, such as for want of memory
            return
        changed = [
            f"{dotted(path)}: {_shown(before)} -> {_shown(now)}"
            for path, before, now in differences(old["recipe"], self.recipe.values)
            if path[-1] not in _ANY_TIME and not (path[0] == "stages" and len(path) > 1 and path[1] >= begun)
        ]
        if changed:
            raise ValueError(
                f"{self.output} holds a run of this recipe as it was before a change: {'; '.join(changed)}. Undo that to go "
                "on with it, write another `output`, or add --restart to begin again. Stages that have not begun may change."
            )

    def _begun(self) -> int:
        """Number of the last stage of which there is a checkpoint or a result, under whichever name; 0 if there is none."""
        found = [0]
        for folder in self.stages.iterdir():
            number = folder.name.partition("-")[0]
            done = (folder / "stage.json").is_file()
            if number.isdecimal() and (done or last_complete_checkpoint(folder) is not None):
                found.append(int(number))
        return max(found)

    def promote(self, stage: Stage) -> None:
        """Make the model of the last stage that of the run. Stopped in between, it goes on when it is called again: the
        config, without which there is no model, comes last."""
        source = self.model(stage)
        if not source.is_dir():
            return
        for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
            destination = self.output / path.name
            if destination.is_dir() and path.is_dir():
                shutil.rmtree(destination)
            os.replace(path, destination)
        source.rmdir()

    def model_after(self, stage: Stage) -> Path:
        """Where the model behind a finished stage is: that of the last one is the run's own."""
        return self.model(stage) if self.model(stage).is_dir() else self.output

    def model_before(self, stage: Stage) -> Path | str | None:
        """Where the model is that a stage begins with; a composed one is nowhere."""
        if stage.number == 1:
            return self.recipe.model
        return self.model_after(self.recipe.stages[stage.number - 2])

    def _remove_run(self) -> None:
        """What a run left: a model whose weights were in more files would else be beside the new one."""
        if self._record.is_file():
            for pattern in ("*.safetensors", "*.safetensors.index.json", "config.json", "summary.*"):
                for path in self.output.glob(pattern):
                    path.unlink()
        shutil.rmtree(self.stages, ignore_errors=True)


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, Any]]:
    """`(where, before, now)` of all that differs; `None` for what is not there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            pair = (values[index] if index < len(values) else None for values in (old, new))
            yield from differences(*pair, (*path, index))
    elif old != new:
        yield path, old, new


def write_json(path: Path, values: Any) -> None:
    """Written aside, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
