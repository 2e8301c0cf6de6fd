"""Pictures of two domains with the same classes, for `domain_adaptation.py`."""

import gzip
import io
import json
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


EDGE = 32
#: Parts of a data set, by a checksum of each picture's name: no picture is in two, whoever drew it.
TRAINING, VALIDATION, TEST = (2, 3, 4), (0,), (1,)
NOISE, CONTRAST = 80, 0.5


@dataclass
class Domain:
    """Pictures `(n, EDGE, EDGE, 3)`, uint8; the class `(n,)` of each, int64, and the part `(n,)` that it is in, 0 to 4."""

    pictures: np.ndarray
    labels: np.ndarray
    parts: np.ndarray

    def part(self, numbers: tuple[int, ...], limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        chosen = np.isin(self.parts, numbers).nonzero()[0][:limit]
        return self.pictures[chosen], self.labels[chosen]


@dataclass
class Pair:
    """Two domains, the names of their classes, and what they are called."""

    source: Domain
    target: Domain
    classes: tuple[str, ...]
    title: str


def emoji(data: Path) -> Pair:
    """Google's emoji and Twitter's, and their categories (npm packages emoji-datasource-google and -twitter)."""
    found = {artist: _emoji_of(artist, data) for artist in ("google", "twitter")}
    classes = sorted({category for _, categories, _ in found.values() for category in categories})
    domains = [
        Domain(
            np.stack(pictures),
            np.array([classes.index(category) for category in categories]),
            np.array([zlib.crc32(name.encode()) % 5 for name in names]),
        )
        for pictures, categories, names in found.values()
    ]
    spoken = tuple(name.lower().replace(" & ", " and ") for name in classes)
    return Pair(*domains, spoken, "Google's emoji → Twitter's")


def _emoji_of(artist: str, data: Path) -> tuple[list, list[str], list[str]]:
    package = f"emoji-datasource-{artist}"
    archive = next(iter(sorted(data.rglob(f"{package}-*.tgz"))), None)
    if archive is None:
        data.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", "--silent", f"{package}@16.0.0"], cwd=data, check=True, capture_output=True)
            archive = next(data.glob(f"{package}-*.tgz"))
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"{package}-*.tgz is not in {data}, and `npm pack {package}` failed ({error}). Fetch it there, or pass "
                "--data with a folder that has it."
            ) from error
    with tarfile.open(archive) as files:
        members = {member.name: member for member in files.getmembers()}
        entries = json.load(files.extractfile("package/emoji.json"))
        shown = [entry for entry in entries if entry[f"has_img_{artist}"] and entry["category"] != "Component"]
        pictures = []
        for entry in shown:
            stored = files.extractfile(members[f"package/img/{artist}/64/{entry['image']}"]).read()
            drawn = Image.open(io.BytesIO(stored)).convert("RGBA")
            page = Image.new("RGBA", drawn.size, "white")
            page.alpha_composite(drawn)
            pictures.append(np.asarray(page.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BILINEAR)))
    return pictures, [entry["category"] for entry in shown], [entry["unified"] for entry in shown]


def fashion(data: Path) -> Pair:
    """Fashion-MNIST, and other pictures of it in half the contrast with noise (Debian's package dataset-fashion-mnist).
    Those of the test are of its own test set."""
    names = "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
    kinds = [f"{which}-{kind}" for which in ("train", "t10k") for kind in ("images", "labels")]
    files = [next(iter(sorted(data.rglob(f"{kind}*"))), None) for kind in kinds]
    if None in files:
        raise SystemExit(
            f"The files of Fashion-MNIST are not in {data}. Install Debian's package dataset-fashion-mnist and pass "
            "--data /usr/share/datasets/fashion-mnist."
        )
    pixels, labels, test_pixels, test_labels = (_read_idx(path) for path in files)
    noise = np.random.default_rng(0)

    def domain(first: int, first_held_out: int, first_of_test: int, is_noisy: bool) -> Domain:
        """3000 pictures for the training, 800 for choosing settings, 1000 for the test."""
        chosen = [slice(first, first + 3000), slice(first_held_out, first_held_out + 800)]
        tested = slice(first_of_test, first_of_test + 1000)
        drawn = np.concatenate([*(pixels[rows] for rows in chosen), test_pixels[tested]])
        drawn = np.pad(drawn, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=-1)
        if is_noisy:
            drawn = (CONTRAST * drawn + noise.normal(64, NOISE, drawn.shape)).clip(0, 255).astype(np.uint8)
        classes = np.concatenate([*(labels[rows] for rows in chosen), test_labels[tested]]).astype(np.int64)
        return Domain(drawn, classes, np.repeat([TRAINING[0], VALIDATION[0], TEST[0]], [3000, 800, 1000]))

    source, target = domain(8000, 40000, 0, is_noisy=False), domain(20000, 45000, 5000, is_noisy=True)
    return Pair(source, target, names, "Fashion-MNIST → in half the contrast, with noise")


def _read_idx(path: Path) -> np.ndarray:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, content[3] + 1)]
    return np.frombuffer(content, np.uint8, offset=4 * (1 + content[3])).reshape(shape)


def shapes(data: Path) -> Pair:
    """Drawn here, for a look at how the benchmark runs: tall and wide bars, in black on white and in colour."""
    chance = np.random.default_rng(0)

    def drawn(paper: str, ink: str) -> Domain:
        pictures = []
        for number in range(60):
            page = Image.new("RGB", (EDGE, EDGE), paper)
            left, top, edge = chance.integers(2, 10, 2).tolist() + [int(chance.integers(10, 18))]
            draw = ImageDraw.Draw(page)
            width, height = (edge, 4) if number % 2 else (4, edge)
            draw.rectangle((left, top, left + width, top + height), fill=ink)
            pictures.append(np.asarray(page))
        return Domain(np.stack(pictures), np.arange(60) % 2, np.arange(60) // 2 % 5)

    return Pair(drawn("white", "black"), drawn("gold", "navy"), ("tall", "wide"), "Black on white → in colour")


PAIRS = {"emoji": emoji, "fashion": fashion, "shapes": shapes}
