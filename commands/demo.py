"""`anyvlm demo`: compose, train and show."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..cli_options import DebugOption, ImageSizeOption, ProjectorOption, TrustOption, image_size_of, name_or_json
from .running import calm_transformers, naming


class Size(str, Enum):
    """How much the demo trains and asks."""

    quick = "quick"
    small = "small"
    large = "large"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for what the demo writes.")] = Path(
        "out/demo"
    ),
    vision: Annotated[
        str | None,
        typer.Option(help="A pretrained vision tower: a Hub id or a folder. Default: a small untrained one."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="A pretrained language model: a Hub id or a folder. Default: a small untrained one."),
    ] = None,
    size: Annotated[
        Size, typer.Option(help="How much to train and to ask; quick only shows that it runs.")
    ] = Size.small,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps. Default: by --size.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="For the split, the weights and the order.")] = 0,
    projector: ProjectorOption = "mlp",
    image_size: ImageSizeOption = None,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Compose a model, train it on questions about handwritten digits, and show that it reads the pictures.

    Needs no network: the pictures are scikit-learn's. Writes a checkpoint that loads without this package, a sheet of
    pictures with answers, a report, and all numbers. With --vision or --text, pretrained parts take the small ones'
    place; a pretrained tower is frozen.

    Example: anyvlm demo

    Example: anyvlm demo --vision facebook/dinov2-small --text HuggingFaceTB/SmolLM2-135M-Instruct
    """
    arguments = {"projector": name_or_json(projector), "image_size": image_size_of(image_size)}
    calm_transformers()
    try:
        from anyvlm.demo.run import Parts, recipe_for, run_demo
    except ModuleNotFoundError as error:
        if error.name not in ("sklearn", "matplotlib"):
            raise
        raise ValueError(f"The demo needs {error.name}. Install it with: pip install 'anyvlm[demo]'") from error

    parts = Parts(vision=vision, text=text, trust_remote_code=trust_remote_code, **arguments)
    recipe = recipe_for(parts, size.value)
    with naming(vision, text):
        run_demo(output, recipe if steps is None else replace(recipe, steps=steps), parts, seed, Console())
