"""`anyvlm merge`: an adapter and its base as one checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from ..cli_options import DebugOption, Dtype, TrustOption
from .running import calm_transformers, naming, progress


def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged checkpoint.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model it was trained on: a folder or a Hub id. Default: as written in the adapter."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the merged weights; auto is the base's own.")] = Dtype.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Take the place of a folder that holds files.")
    ] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Work the weights of an adapter (LoRA, DoRA, …) into its base, and save the whole model with processor and code.

    Before anything is written, both are asked about a picture, and their logits have to be equal up to rounding. When
    interrupted, nothing is left behind.

    Example: anyvlm merge out/checkpoint-500 my-tuned-vlm

    Example: anyvlm merge out/checkpoint-500 my-tuned-vlm --base my-vlm --dtype float32
    """
    calm_transformers()
    from anyvlm.training.parts.merging import merge_adapters

    with progress.status("Loading…") as status, naming(adapter, base):
        difference = merge_adapters(
            adapter,
            output,
            base,
            dtype=None if dtype is Dtype.auto else dtype.value,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_step=status.update,
        )
    typer.echo(
        f"The logits of adapter and merged model are equal (largest difference {difference:.0e} of the largest)."
    )
    typer.echo(f"Saved to {output}")
