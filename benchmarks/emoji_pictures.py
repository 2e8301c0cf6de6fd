"""Emoji of one artist with their names, from the npm packages `emoji-datasource-<artist>`."""

import json
import re
import subprocess
import tarfile
from pathlib import Path

from PIL import Image


ARTISTS = ("google", "twitter", "apple", "facebook")
VERSION = "16.0.0"


def emoji(artist: str, folder: Path) -> dict[str, Image.Image]:
    """Name -> picture of 64x64 pixels on white. A name is in lower case, words and numbers alone.

    Args:
        artist: One of `ARTISTS`.
        folder: Where the package is, unpacked or packed; it is fetched into it with `npm pack` if it is not there.

    Raises:
        SystemExit: it is not there, and could not be fetched.
    """
    package = _package(artist, folder)
    pictures = {}
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        name = re.sub(r"[^a-z0-9]+", " ", entry["name"].lower()).strip()
        # Components are tones of skin and hair, which are no pictures of anything.
        if entry[f"has_img_{artist}"] and entry["category"] != "Component" and name not in pictures:
            drawn = Image.open(package / "img" / artist / "64" / entry["image"]).convert("RGBA")
            white = Image.new("RGBA", drawn.size, "white")
            white.alpha_composite(drawn)
            pictures[name] = white.convert("RGB")
    return pictures


def _package(artist: str, folder: Path) -> Path:
    unpacked = folder / artist / "package"
    if (unpacked / "emoji.json").is_file():
        return unpacked
    name = f"emoji-datasource-{artist}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not list(folder.glob(f"{name}-*.tgz")):
            subprocess.run(["npm", "pack", f"{name}@{VERSION}"], cwd=folder, check=True, capture_output=True)
        with tarfile.open(next(folder.glob(f"{name}-*.tgz"))) as archive:
            wanted = f"package/img/{artist}/64/"
            members = [m for m in archive if m.name == "package/emoji.json" or m.name.startswith(wanted)]
            archive.extractall(folder / artist, members=members, filter="data")
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"The emoji of {name} are not in {folder}, and could not be fetched with npm ({error}). Run `npm pack {name}` "
            "where there is a network, and pass the folder with the .tgz file."
        ) from error
    return unpacked
