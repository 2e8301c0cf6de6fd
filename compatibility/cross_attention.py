"""Cross-attention in every type of language model: `python -m anyvlm.compatibility.cross_attention` writes the table.

The claim that is measured: with the gates at zero, where they start, the composed model gives the logits of the bare
language model, to the last bit; with open gates a picture reaches the text after it and none before it, and decoding with a
cache gives what decoding without one gives.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track

import anyvlm

from ..composition.errors import CompositionError
from . import tiny_configs
from .model_under_test import picture, require, set_gates
from .pair_checks import FAILS, NOT_TRIED, REFUSED, WORKS, missing_library, one_line
from .tiny_tokenizer import make_sensitive, tiny_tokenizer


#: Between these markers of the document the table is written.
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

_TOWER = "clip_vision_model"


@dataclass
class Found:
    """What was found about one type.

    Args:
        text_type: Model type of the language model.
        status: `WORKS`, `REFUSED`, `NOT_TRIED` for want of a library, or `FAILS`.
        difference: Largest difference of a logit from the bare language model's with gates at zero.
        layers: The list of decoder layers, with its length.
        reason: Why not.
    """

    text_type: str
    status: str
    difference: float | None = None
    layers: str = ""
    reason: str = ""


def check_cross_attention(text_config, seed: int = 0, every: int = 2) -> Found:
    """Compose a tiny tower with this language model by cross-attention, and measure. Whatever goes wrong is recorded."""
    name = text_config.model_type
    torch.manual_seed(seed)
    try:
        model, processor = anyvlm.compose(
            vision=tiny_configs.vision_config(_TOWER),
            text=text_config,
            tokenizer=tiny_tokenizer(),
            image_size=tiny_configs.picture_size(_TOWER),
            fusion={"type": "cross_attention", "every": every},
            seed=seed,
        )
    except (CompositionError, ImportError) as error:
        missing = missing_library(error)
        return Found(name, NOT_TRIED if missing else REFUSED, reason=missing or one_line(error))
    except Exception as error:  # noqa: BLE001 - that something unforeseen happened is what the table must say
        return Found(name, FAILS, reason=one_line(error))
    config = model.config.image_fusion_config
    found = Found(name, WORKS, layers=f"`{config['decoder_layers']}` ({config['num_decoder_layers']})")
    try:
        make_sensitive(model.language_model, seed=seed + 1)
        found.difference = zero_gate_difference(model, processor)
        require(found.difference == 0, f"with gates at zero the logits differ by {found.difference:.2g}")
        set_gates(model.fusion, 0.7)
        _check_open_gates(model, processor)
    except Exception as error:  # noqa: BLE001 - see above
        found.status, found.reason = FAILS, one_line(error)
    return found


@torch.no_grad()
def zero_gate_difference(model, processor) -> float:
    """Largest difference of a logit from those that the bare language model gives for the same ids: with two pictures,
    with one, and for text alone."""
    bare = copy.deepcopy(model.language_model)
    for module in bare.modules():
        module._forward_pre_hooks.clear()
    offset = model.language_model_interface.spec["position_offset"]
    differences = []
    for text, pictures in (
        ("w1 <image> w2 w3 <image> w4", [picture(0), picture(1)]),
        ("w5 w6 <image> w7 w8 w9", [picture(2)]),
        ("w10 w11 w12 w13", []),
    ):
        inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
        ids = inputs["input_ids"]
        arguments = {"attention_mask": inputs["attention_mask"]}
        if offset is not None:
            arguments["position_ids"] = torch.arange(ids.shape[1]).unsqueeze(0) + offset
        expected = bare(input_ids=ids, **arguments, return_dict=True).logits
        differences.append(float((model(**inputs).logits - expected).abs().max()))
    return max(differences)


def _check_open_gates(model, processor) -> None:
    first, second = (
        processor(text=["w1 w2 <image> w3 w4 w5"], images=[picture(seed)], return_tensors="pt") for seed in (0, 1)
    )
    with torch.no_grad():
        change = (model(**first).logits - model(**second).logits)[0].abs().amax(-1)
    place = int((first["input_ids"][0] == model.config.image_token_id).nonzero())
    require(change[place:].min() > 1e-4, "the text after a picture does not see it")
    # Experts round differently for other numbers of tokens; a leak would be as large as what comes after.
    require(change[:place].max() < 1e-5, "the text before a picture sees it")
    cached, uncached = (
        model.generate(**first, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    require(torch.equal(cached, uncached), "another answer with a cache than without")


def table(rows: list[Found]) -> str:
    """The rows as markdown: what works, then what is refused or fails, with the reason."""
    works = [row for row in rows if row.status == WORKS]
    others = [row for row in rows if row.status != WORKS]
    lines = [
        f"transformers {transformers.__version__}, {len(rows)} types of language model: {len(works)} work, "
        + ", ".join(f"{sum(row.status == status for row in rows)} {status}" for status in (REFUSED, NOT_TRIED, FAILS))
        + ".",
        "",
        "| Language model | Decoder layers (tiny) | Largest difference with gates at zero |",
        "|---|---|---|",
        *(f"| {row.text_type} | {row.layers} | {row.difference:g} |" for row in works),
        "",
        "| Language model | | Reason |",
        "|---|---|---|",
        *(f"| {row.text_type} | {row.status} | {row.reason.replace('|', ' ')} |" for row in others),
    ]
    return "\n".join(lines)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Measure this type alone, and write nothing.")] = None,
    seed: Annotated[int, typer.Option(help="For the weights of the tiny models.")] = 0,
    output: Annotated[Path, typer.Option(help="Document with the table.")] = Path("docs/fusion.md"),
) -> None:
    """Measure cross-attention in every type of language model of transformers, and write the table into the document.

    The exit code is 1 if a type is composed and then fails: each should work, or be refused with a reason.
    """
    transformers.logging.set_verbosity_error()
    console = Console()
    rows = []
    for text_type in track(only or tiny_configs.text_types(), description="Language models", console=console):
        try:
            text_config = tiny_configs.text_config(text_type)
        except ImportError as error:
            rows.append(Found(text_type, NOT_TRIED, reason=missing_library(error) or one_line(error)))
            continue
        row = check_cross_attention(text_config, seed)
        row.text_type = text_type
        rows.append(row)
        if row.status == FAILS or only:
            console.print(f"{row.text_type}: {row.status} {row.layers} {row.difference} {row.reason}", highlight=False)
    if not only:
        before, _, rest = output.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        output.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
        console.print(table(rows).splitlines()[0])
    raise typer.Exit(int(any(row.status == FAILS for row in rows)))


if __name__ == "__main__":
    typer.run(main)
