"""The `anyvlm` command.

torch, transformers and the package's own modules are imported inside the commands, so that help comes at once.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cli_options import (
    DebugOption,
    Dtype,
    FurtherTowersOption,
    FusionOption,
    ImageAttentionOption,
    ImageSizeOption,
    ImageTextOption,
    ProjectorOption,
    TrustOption,
    ViewsOption,
    VisionFusion,
    VisionFusionOption,
    bytes_of,
    image_size_of,
    joining_arguments,
    name_or_json,
    towers_of,
)
from .publishing.command import push


app = typer.Typer(
    name="anyvlm",
    help="Join any vision tower and any causal language model of transformers into one Hugging Face model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

#: What a command prints for a person to read; progress goes to stderr, so that stdout can be piped.
_progress = Console(stderr=True)


_VERDICT_STYLES = {"yes": "bold green", "no": "bold red", "not known": "bold yellow"}


class Size(str, Enum):
    """How much the demo trains and asks."""

    quick = "quick"
    small = "small"
    large = "large"


@contextmanager
def _naming(*sources: str | None) -> Iterator[None]:
    """Name what could not be loaded: transformers' messages about the Hub often do not."""
    try:
        yield
    except OSError as error:
        absent = [source for source in sources if source and not Path(source).exists()]
        # A number means that the system refused something: then the message is about a file.
        if error.errno is not None or not absent:
            raise
        raise OSError(
            f"{' or '.join(absent)} is no folder here, and could not be had from the Hub: {error}"
        ) from error


@app.command()
def compose(
    vision: Annotated[str, typer.Argument(help="The vision tower: a Hub id or a folder.")],
    text: Annotated[str, typer.Argument(help="The causal language model: a Hub id or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the composed checkpoint.")],
    further_towers: FurtherTowersOption = None,
    vision_fusion: VisionFusionOption = VisionFusion.channel,
    projector: ProjectorOption = "mlp",
    views: ViewsOption = None,
    image_text: ImageTextOption = None,
    fusion: FusionOption = "embed",
    image_attention: ImageAttentionOption = "causal",
    image_size: ImageSizeOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of all weights; auto is the language model's own.")] = Dtype.auto,
    tokenizer: Annotated[
        str | None, typer.Option(help="Another tokenizer than the language model's: a Hub id or a folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For the new weights, those of the projector.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds files.")] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Join a vision tower and a language model, and save the model with its processor and its code.

    The parts keep their weights. The projector between them is new: the model has to be trained before it can see.

    Example: anyvlm compose facebook/dinov2-small HuggingFaceTB/SmolLM2-135M-Instruct --output my-vlm

    Example: anyvlm compose facebook/dinov2-small Qwen/Qwen3-0.6B --vision google/siglip-base-patch16-224 -o my-vlm
    """
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; choose a folder.", param_hint="'--output'")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise typer.BadParameter(
            f"{output} is not empty; choose another, or add --overwrite.", param_hint="'--output'"
        )
    arguments = joining_arguments(projector, fusion, image_attention, views, image_text, image_size, vision_fusion)
    towers = towers_of(vision, further_towers)
    _calm_transformers()
    from anyvlm.composition.compose import compose as compose_model
    from anyvlm.demo.description import describe_parts

    named = " and ".join([vision, *(further_towers or []), text])
    with _progress.status(f"Composing {named}…"), _naming(vision, *(further_towers or []), text, tokenizer):
        model, processor = compose_model(
            towers,
            text,
            tokenizer=tokenizer,
            dtype=None if dtype is Dtype.auto else dtype.value,
            trust_remote_code=trust_remote_code,
            seed=seed,
            **arguments,
        )
    with _progress.status(f"Saving to {output}…"):
        model.save_pretrained(output)
        processor.save_pretrained(output)

    description = describe_parts(model, processor)
    table = Table("part", "type")
    table.add_column("parameters", justify="right")
    for name, part in description["parts"].items():
        table.add_row(name, part["type"], f"{part['parameters']:,}")
    table.add_section()
    table.add_row("all", str(model.dtype).removeprefix("torch."), f"{model.num_parameters():,}")
    console = Console()
    console.print(table)
    height, width = description["picture_size"]
    others = "" if description["one_size"] else " Of another size or shape it takes more or fewer."
    tokens = description["tokens_per_picture"]
    count = "1 token" if tokens == 1 else f"{tokens} tokens"
    console.print(f"A picture of {height}x{width} pixels takes {count} in the text.{others}", highlight=False)
    typer.echo(f"Saved to {output}")


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A composed model: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say to the model.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", exists=True, dir_okay=False, help="A picture; repeat for several, in order."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", "-v", exists=True, dir_okay=False, help="A video file; repeat for several, in order."),
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of each video to look at. Default: the checkpoint's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a composed model about pictures and videos, and print its answer.

    The answer is the most probable one (no sampling). Pictures come first in the message, in their order, then videos,
    then the prompt. Reading videos needs PyAV: pip install 'anyvlm[video]'.

    Example: anyvlm generate out/demo/checkpoint --image digit.png --prompt "Which digit is this?"

    Example: anyvlm generate my-vlm --video clip.mp4 --num-frames 16 --prompt "What happens?"
    """
    _calm_transformers()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

    from anyvlm import AnyVlmConfig

    with _progress.status(f"Loading {checkpoint}…"), _naming(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        if config.model_type != AnyVlmConfig.model_type:
            raise ValueError(
                f"{checkpoint} is a {config.model_type!r} model, not a composed one. Make one with: anyvlm compose."
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust_remote_code).to(device)
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)

    pictures, videos = ([str(path) for path in paths or []] for paths in (image, video))
    content = [{"type": "image"}] * len(pictures) + [{"type": "video"}] * len(videos)
    content.append({"type": "text", "text": prompt})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=[pictures] if pictures else None,
        videos=[videos] if videos else None,
        **({} if num_frames is None else {"num_frames": num_frames}),
        # Most chat templates write the bos themselves; a second one would be another prompt.
        add_special_tokens=not (bos and text.startswith(bos)),
        return_tensors="pt",
    ).to(device)
    with _progress.status("Generating…"):
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    typer.echo(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


@app.command()
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
    _calm_transformers()
    try:
        from anyvlm.demo.run import Parts, recipe_for, run_demo
    except ModuleNotFoundError as error:
        if error.name not in ("sklearn", "matplotlib"):
            raise
        raise ValueError(f"The demo needs {error.name}. Install it with: pip install 'anyvlm[demo]'") from error

    parts = Parts(vision=vision, text=text, trust_remote_code=trust_remote_code, **arguments)
    recipe = recipe_for(parts, size.value)
    with _naming(vision, text):
        run_demo(output, recipe if steps is None else replace(recipe, steps=steps), parts, seed, Console())


@app.command()
def check(
    vision: Annotated[
        str, typer.Argument(help="The vision tower: a Hub id, a folder, or a model type such as dinov2.")
    ],
    text: Annotated[
        str, typer.Argument(help="The language model: a Hub id, a folder, or a model type such as qwen3.")
    ],
    further_towers: FurtherTowersOption = None,
    vision_fusion: VisionFusionOption = VisionFusion.channel,
    projector: ProjectorOption = "mlp",
    fusion: FusionOption = "embed",
    image_attention: ImageAttentionOption = "causal",
    views: ViewsOption = None,
    image_text: ImageTextOption = None,
    image_size: ImageSizeOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of all weights; auto is the language model's own.")] = Dtype.auto,
    tokenizer: Annotated[
        str | None, typer.Option(help="Another tokenizer than the language model's: a Hub id or a folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Say whether two parts can be composed, and what the model would be like, without downloading weights.

    Only configs are read (and tokenizer and image processor where there are some). The answer has the reason and the
    nearest that works if they cannot, tokens per picture, parameters and memory, what can be trained, and which class of
    transformers would hold the same pair. A model type stands for its default config.

    Exits with 0 if they can be composed, with 1 if not.

    Example: anyvlm check facebook/dinov2-small HuggingFaceTB/SmolLM2-135M-Instruct

    Example: anyvlm check dinov2 qwen3 --dtype bfloat16 --image-size 448

    Example: anyvlm check siglip qwen3 --projector pixel_shuffle --views tiles

    Example: anyvlm check siglip xlnet --json
    """
    arguments = joining_arguments(projector, fusion, image_attention, views, image_text, image_size, vision_fusion)
    towers = towers_of(vision, further_towers)
    _calm_transformers()
    from anyvlm.composition.check import check as check_parts

    with _progress.status(f"Checking {vision} and {text}…"):
        report = check_parts(
            towers,
            text,
            tokenizer=tokenizer,
            dtype=None if dtype is Dtype.auto else dtype.value,
            trust_remote_code=trust_remote_code,
            **arguments,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        console = Console()
        if console.is_terminal:
            table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in report.lines():
                table.add_row(name, Text(value, style=_VERDICT_STYLES.get(value, "") if name == "works" else ""))
            console.print(table)
        else:
            typer.echo(str(report))
    raise typer.Exit(0 if report.works else 1)


@app.command()
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
    _calm_transformers()
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from anyvlm.composition.native.streaming import convert_checkpoint

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=_progress, transient=True, disable=not _progress.is_terminal) as bar,
        _naming(source),
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


app.command()(push)


def _calm_transformers() -> None:
    """Leave out what transformers says while it loads: its bars and advice would bury the one line that matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line, and exit: 0 if all went well, 2 if it was called wrongly, 1 on any other bad input.

    Args:
        arguments: What stands after `anyvlm`. Default: the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(app(arguments, prog_name="anyvlm", standalone_mode=False) or 0)
    except typer.Abort:
        _fail("interrupted", 130)
    except Exception as error:  # noqa: BLE001 - what is not the user's doing is raised again
        if "--debug" in arguments or not _is_expected(error):
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "anyvlm")
        if hasattr(error, "format_message"):
            _fail(f"{error.format_message()} See {where} --help", error.exit_code)
        _fail(str(error) or type(error).__name__, 1)


def _is_expected(error: Exception) -> bool:
    """Whether an error tells its reader what to do: wrong arguments, parts that do not fit, files that are not there.

    A wrong call of the command line is known by its `format_message`, in every version of typer.
    """
    if hasattr(error, "format_message"):
        return True
    from safetensors import SafetensorError

    from anyvlm.demo import DemoError

    return isinstance(error, (ValueError, OSError, ImportError, SafetensorError, DemoError))


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"anyvlm: error: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
