"""`anyvlm train`: a recipe, from its stages to the trained model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..cli_options import DebugOption
from .running import calm_transformers, naming, progress


def train(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe: a YAML file.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with it, or what each stage would train; train nothing.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Another value, such as stages.0.epochs=2; repeat for several."
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="The recipes that come with anyvlm.")] = False,
    show: Annotated[str | None, typer.Option(metavar="NAME", help="Print one of them.")] = None,
    copy: Annotated[str | None, typer.Option(metavar="NAME", help="Write one of them to the path RECIPE.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again, where a run of it was interrupted or is done.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Train a model by a recipe: what is trained in which stage, on which data, at which rates, with which losses.

    The recipe is checked as a whole before anything runs. Interrupted, the same command goes on where it was; a recipe that
    was changed since is refused. The trained model is in the folder `output` of the recipe, with summary.md, summary.json
    and summary.png; the stages on the way, with TensorBoard's files, are in stages inside it.

    To begin: write one of the recipes that come along to a file of your own, fill in the model and the data, and check it.
    Every key is explained in docs/recipes.md. Several graphics cards: accelerate launch -m anyvlm.cli train my.yaml

    Example: anyvlm train --list

    Example: anyvlm train --copy llava my.yaml

    Example: anyvlm train my.yaml --check

    Example: anyvlm train my.yaml --set stages.0.max_steps=10 --set output=out/trial
    """
    modes = [name for name, given in (("--list", list_), ("--show", show), ("--copy", copy)) if given]
    if len(modes) > 1:
        raise typer.BadParameter(f"{' and '.join(modes)} exclude each other.")
    if list_ or show:
        return _shipped(show)
    if recipe is None:
        raise typer.BadParameter("Which recipe? Give a YAML file, or --list for those that come with anyvlm.")
    if copy:
        return _copy(copy, recipe)
    if not recipe.is_file():
        from anyvlm.training.recipes.shipped import shipped

        also = f" To begin with the one that comes with anyvlm: anyvlm train --copy {recipe.stem} my.yaml"
        raise typer.BadParameter(f"There is no file {recipe}." + (also if recipe.stem in shipped() else ""))
    _train(recipe, list(set_ or ()), check, restart)


def _train(path: Path, overrides: list[str], check: bool, restart: bool) -> None:
    calm_transformers()
    from anyvlm.training.recipes.model_checks import plan
    from anyvlm.training.recipes.progress_bar import ProgressBar
    from anyvlm.training.recipes.run import train_recipe
    from anyvlm.training.recipes.summary import table_of
    from anyvlm.training.recipes.validation import load_recipe
    from anyvlm.training.recipes.yaml_file import RecipeError

    try:
        recipe = load_recipe(path, overrides)
        with progress.status("Checking the recipe…"), naming(recipe.model, *recipe.compose.values()):
            planned = plan(recipe)
    except RecipeError as error:
        # All of them, a line each: one line would hold only one.
        if _is_main():
            for problem in error.problems:
                typer.echo(str(problem), err=True)
            count = len(error.problems)
            typer.echo(
                f"anyvlm: error: {count} mistake{'s' if count > 1 else ''} in {path}; nothing was run.", err=True
            )
        raise typer.Exit(1) from error
    console = Console(quiet=not _is_main())
    if check:
        for table in planned.tables:
            console.print(table)
        console.print(f"{path} is right.", highlight=False)
        return
    if not progress.is_terminal:
        _no_bars_of_datasets()
    results = train_recipe(
        recipe,
        restart=restart,
        callbacks=lambda stage: [ProgressBar(progress, stage.folder)],
        say=lambda line: progress.print(line, markup=False, highlight=False),
        loaded=planned.loaded,
    )
    console.print(table_of(results))
    if _is_main():
        typer.echo(f"Saved to {recipe.output}, with summary.md")


def _no_bars_of_datasets() -> None:
    """In a file they are noise."""
    import importlib.util

    if importlib.util.find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()


def _is_main() -> bool:
    from accelerate.state import PartialState

    return not PartialState._shared_state or PartialState().is_main_process


def _shipped(name: str | None) -> None:
    from anyvlm.training.recipes.shipped import first_line, shipped, shipped_recipe

    if name is not None:
        typer.echo(shipped_recipe(name), nl=False)
        return
    table = Table("recipe", "what for", box=None)
    for known, text in shipped().items():
        table.add_row(known, first_line(text))
    Console().print(table)
    typer.echo("Copy one to begin with: anyvlm train --copy llava my.yaml")


def _copy(name: str, destination: Path) -> None:
    from anyvlm.training.recipes.shipped import shipped_recipe

    text = shipped_recipe(name)
    if destination.exists():
        raise typer.BadParameter(f"{destination} is there already; write to another path.", param_hint="'RECIPE'")
    destination.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {destination}. Fill in the model and the data, then: anyvlm train {destination} --check")
