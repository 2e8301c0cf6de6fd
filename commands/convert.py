"""`anyvlm convert`: from and to classes of transformers."""

from pathlib import Path
from typing import Annotated

import typer

from ..cli_options import DebugOption, TrustOption, bytes_of
from .running import calm_transformers, naming, progress


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The checkpoint: a folder or a Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder for the converted checkpoint.")],
    to_native: Annotated[
        bool, typer.Option("--to-native", help="The other way: from an anyvlm checkpoint to a class of transformers.")
    ] = False,
    shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Largest file of weights, such as 2GB. Default: as the source's, at most 5GB."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take the place of a folder that holds files.")
    ] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a checkpoint of transformers' own vision-language models to anyvlm's form, or back, without loading it.

    Weights are read and written one after another in their own dtype: a model of any size takes the memory of one of its
    files. Old checkpoints will do whose names of weights transformers changes when it loads them. A weight that is left
    over or missing is an error that names it, before anything is written; when interrupted, nothing is left behind.

    The result loads with AutoModelForCausalLM.from_pretrained(DST, trust_remote_code=True), and is trained, changed and
    swapped like any composed model. With --to-native, an anyvlm checkpoint that a class of transformers can hold becomes
    one of that class, for servers that know the class.

    Example: anyvlm convert llava-hf/llava-1.5-7b-hf my-llava

    Example: anyvlm convert my-llava my-llava-native --to-native --shard-size 2GB
    """
    calm_transformers()
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from anyvlm.composition.native.streaming import convert_checkpoint

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=progress, transient=True, disable=not progress.is_terminal) as bar,
        naming(source),
    ):
        task = bar.add_task("", total=None)
        name = convert_checkpoint(
            source,
            destination,
            to_native=to_native,
            max_shard_size=None if shard_size is None else bytes_of(shard_size),
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_progress=lambda done, total, what: bar.update(
                task, completed=done, total=total or None, description=f"{what}…"
            ),
        )
    typer.echo(f"Saved {name} to {destination}")
