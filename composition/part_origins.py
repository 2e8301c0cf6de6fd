"""Where parts come from, for the model card."""

import contextlib
import os

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from .parts import PartSource, pretrained_name, source_name


def part_origin(source: PartSource) -> dict[str, str | None]:
    """Hub id and licence of a part, as far as they are known here, for the model card."""
    origin = {"id": source_name(source), "license": None}
    path = pretrained_name(source)
    card = os.path.join(path, "README.md") if path else None
    if card and os.path.isfile(card):
        origin["license"] = ModelCard.load(card, ignore_metadata_errors=True).data.license
    elif origin["id"]:
        # Without a card, or without network, the licence stays unknown, and the model card says so.
        with contextlib.suppress(EntryNotFoundError, HFValidationError, RepositoryNotFoundError, OSError, ValueError):
            origin["license"] = ModelCard.load(origin["id"]).data.license
    return origin
