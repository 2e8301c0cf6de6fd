"""Options that several commands of `anyvlm` have, and how what is typed becomes an argument."""

import json
from enum import Enum
from typing import Annotated, Any

import typer


class Dtype(str, Enum):
    """Dtypes of a composed model; `auto` is the language model's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class VisionFusion(str, Enum):
    """How the features of several vision towers are joined."""

    channel = "channel"
    token = "token"


def image_size_of(text: str | None) -> int | tuple[int, int] | None:
    """`"224"` to one edge, `"32x64"` to `(height, width)`."""
    if text is None:
        return None
    edges = text.lower().split("x")
    if len(edges) > 2 or not all(edge.isdecimal() and int(edge) > 0 for edge in edges):
        raise typer.BadParameter(f"{text!r} is not a size in pixels, such as 224 or 32x64 (height x width).")
    return int(edges[0]) if len(edges) == 1 else (int(edges[0]), int(edges[1]))


def towers_of(first: str, further: list[str] | None) -> str | tuple[str, ...]:
    """What `vision=` takes: one tower, or several."""
    return (first, *further) if further else first


def bytes_of(text: str) -> int:
    """`"2GB"` to a number of bytes."""
    from transformers.utils.hub import convert_file_size_to_int

    try:
        size = convert_file_size_to_int(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise typer.BadParameter(f"{text!r} is not a size such as 2GB or 500MB.", param_hint="'--shard-size'")
    return size


def name_or_json(text: str) -> str | dict:
    """A name as it is; a JSON object to a dict."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}.") from error


def json_object(text: str) -> dict:
    found = name_or_json(text)
    if not isinstance(found, dict):
        raise typer.BadParameter(f'{text!r} is no JSON object, such as \'{{"start": "<img>"}}\'.')
    return found


ProjectorOption = Annotated[
    str,
    typer.Option(help='Projector between the parts: a name, or JSON, such as \'{"type": "mlp", "num_layers": 3}\'.'),
]
ViewsOption = Annotated[
    str | None,
    typer.Option(
        help="How a picture is shown to the tower: resize, tiles, slices or native, or JSON, such as "
        '\'{"type": "tiles", "layout": "dynamic", "max_tiles": 6}\'.'
    ),
]
ImageTextOption = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="What is written around the tokens of a picture, such as "
        '\'{"start": "<img>", "end": "</img>"}\'; the tokenizer must know it.',
    ),
]
FusionOption = Annotated[
    str,
    typer.Option(
        help="How pictures reach the language model: embed, cross_attention or gated, or JSON, such as "
        '\'{"type": "cross_attention", "every": 2}\'.'
    ),
]
ImageAttentionOption = Annotated[
    str,
    typer.Option(help="What a token sees: causal, bidirectional (all of its picture) or prefix (all of the prompt)."),
]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(metavar="EDGE|HxW", help="Pixels of a picture, such as 224 or 32x64 (height x width)."),
]
FurtherTowersOption = Annotated[
    list[str] | None,
    typer.Option("--vision", help="A further vision tower, fused with the first; repeat for several."),
]
VisionFusionOption = Annotated[
    VisionFusion, typer.Option(help="How features of several towers are joined: at each place, or one after another.")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a part.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="On an error, show the whole traceback.")]


def joining_arguments(
    projector: str,
    fusion: str,
    image_attention: str,
    views: str | None,
    image_text: str | None,
    image_size: str | None,
    vision_fusion: VisionFusion,
) -> dict[str, Any]:
    """How the parts are joined, as typed, to the arguments of `anyvlm.compose` and `anyvlm.check`."""
    return {
        "projector": name_or_json(projector),
        "fusion": name_or_json(fusion),
        "image_attention": image_attention,
        "views": None if views is None else name_or_json(views),
        "image_text": None if image_text is None else json_object(image_text),
        "image_size": image_size_of(image_size),
        "vision_fusion": vision_fusion.value,
    }
