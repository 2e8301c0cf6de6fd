"""The command that publishes a checkpoint: `anyvlm push`, and `scripts/push_to_hub.py`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import FreshProcessError, PublishingError


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that save_pretrained of model and processor wrote.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub. Made if it is not there.")],
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is private unless this is given.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(help="Such as apache-2.0. Default: that of the parts, if they are known to have the same one."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but the upload: checks, card, list of files.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Load the model once only and do not save it again. For big checkpoints.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help='JSON for the card\'s results: {"data set": {"metric": 0.5}}.')
    ] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a README.md that was written by hand.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to. Default: the main one.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit on the Hub.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that each fresh process may take.")] = 3600,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="When a fresh process fails, show the last lines of its errors.")
    ] = False,
) -> None:
    """Check a checkpoint in a fresh process without anyvlm, write its model card and upload it, private by default.

    See first what would happen:

        anyvlm push out/my-model me/my-model --dry-run

    Then log in once with `hf auth login`, and publish:

        anyvlm push out/my-model me/my-model --license apache-2.0

    The card is written to README.md in the checkpoint. Edit it as you like: once edited, it is kept.
    """
    from .hub import push as push_checkpoint

    console, errors = Console(), Console(stderr=True, soft_wrap=True)
    started = time.monotonic()

    def show_step(step: str) -> None:
        console.print(f"{time.monotonic() - started:6.1f} s  {step}", markup=False, highlight=False)

    def show_warning(warning: str) -> None:
        errors.print(f"Warning: {warning}", style="yellow", markup=False, highlight=False)

    try:
        report = push_checkpoint(
            checkpoint,
            repo_id,
            private=not public,
            license=license,
            results=results,
            dry_run=dry_run,
            quick=quick,
            overwrite_card=overwrite_card,
            revision=revision,
            commit_message=commit_message,
            timeout=timeout,
            on_step=show_step,
            on_warning=show_warning,
        )
    except PublishingError as error:
        message = error.summary if isinstance(error, FreshProcessError) and not verbose else str(error)
        errors.print(f"Error: {message}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    report.print(console)
