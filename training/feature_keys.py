"""What features of pictures depend on, as keys: the tower with all that is done before it, and the picture's content."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import nn

from ..processing.pictures import to_rgb_picture
from .objectives.fingerprint import weights_fingerprint


#: Counts up when the same model and picture no longer give the same features, or they are kept in another way.
_FORMAT = 1

#: Of configs: who wrote them and where they came from, and not what is computed.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def tower_facts(model: nn.Module, processor: Any, **more: Any) -> dict[str, Any]:
    """All that the features of a picture depend on beside the picture, as JSON can say it.

    Args:
        model: A composed model.
        processor: Its processor.
        more: Whatever else matters.
    """
    vision_config = model.config.vision_config.to_dict()
    facts = {
        "format": _FORMAT,
        "weights": bytes(weights_fingerprint(model.vision_tower).tolist()).hex(),
        "vision_config": {key: value for key, value in vision_config.items() if key not in _NOT_COMPUTED},
        "vision_tower_spec": model.config.vision_tower_spec,
        "vision_feature_layer": model.config.vision_feature_layer,
        "image_processor": processor.image_processor.to_dict(),
        "image_views": processor.image_views,
        **more,
    }
    return json.loads(json.dumps(facts, sort_keys=True, default=str))


def facts_hash(facts: dict[str, Any]) -> str:
    """The key of a tower, from `tower_facts`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def picture_key(picture: Any) -> tuple[str, Any]:
    """The key of a picture's content, and the picture: decoded, if that was needed to know it.

    Files and bytes are taken as they are, undecoded; of anything else the pixels count. So the same picture has one key as a
    file and another one as pixels.
    """
    key = file_key(picture)
    if key is not None:
        return key, picture
    decoded: Image.Image = to_rgb_picture(picture)
    return _hash(f"pixels {decoded.width}x{decoded.height}", decoded.tobytes()), decoded


def file_key(picture: Any) -> str | None:
    """The key of a picture that is a file, or its bytes; `None` for any other."""
    if isinstance(picture, Mapping):  # `datasets.Image(decode=False)`, as `to_rgb_picture` takes it
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, (str, os.PathLike)) and os.path.isfile(picture):
        with open(picture, "rb") as file:
            picture = file.read()
    return _hash("file", picture) if isinstance(picture, (bytes, bytearray)) else None


def _hash(kind: str, content: bytes) -> str:
    return hashlib.sha256(kind.encode() + b";" + content).hexdigest()[:32]
