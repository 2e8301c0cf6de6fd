"""What `anyvlm.check` found out, as fields, as JSON and as text."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PartReport:
    """One part of the model that `compose` would make.

    Args:
        name: The sub-module: `vision_tower`, `multi_modal_projector`, `language_model`, `fusion`; or the parameter
            `image_newline`.
        model_class: Its class.
        model_type: Its config's model type; `None` for the projector.
        parameters: Number of parameters, tied ones once.
        bytes_per_dtype: dtype -> bytes of its weights; what a part keeps in fp32 is counted so.
        gradient_checkpointing: Whether the part supports it; `None` where it does not matter.
        sdpa: Whether it runs on PyTorch's scaled dot product attention.
        flash_attention: Whether it can be loaded with flash attention.
        known_from: How it is known whether the part works.
    """

    name: str
    model_class: str
    model_type: str | None
    parameters: int
    bytes_per_dtype: dict[str, int]
    gradient_checkpointing: bool | None = None
    sdpa: bool | None = None
    flash_attention: bool | None = None
    known_from: str = "not known"


@dataclass
class CacheReport:
    """What the language model keeps of the text while it generates, for one sample in the model's dtype.

    `first_1000_bytes` are for 1,000 tokens; `next_1000_bytes` for each 1,000 after those, 0 where the state has one size.
    `extrapolated` if 1,000 tokens were too slow to run and the numbers follow from fewer.
    """

    first_1000_bytes: int
    next_1000_bytes: int
    extrapolated: bool = False


@dataclass
class CompatibilityReport:
    """Whether a vision tower and a language model can be composed, and what the model would be like.

    Nothing is estimated that is not said to be; what could not be learned is `None` and printed as "unknown".

    Args:
        vision: What was asked about, as text.
        text: Likewise.
        works: True, False, or `None` where it could not be found out; then `reasons` says why.
        reasons: Why not: first the message that `compose` would raise.
        nearest: What comes nearest and works.
        notes: What is worth knowing before composing.
        dtype: dtype of all weights.
        parts: The parts that could be built.
        embedding_parameters: Of the language model, its input embeddings.
        head_parameters: Of the language model, its head; 0 if it is tied to the embeddings.
        new_embedding_rows: Rows that composing adds for the image token; `None` without a tokenizer.
        image_size: Pixels `(height, width)` of a picture, as the tower gets it.
        grid: Rows and columns of the tokens that the projector makes of one view of that size.
        tokens_per_picture: Image tokens that a picture of that size takes in the text; with another fusion than `"embed"`
            the one placeholder.
        one_size: Whether every picture is brought to `image_size`; else that, `grid` and `tokens_per_picture` are an
            example, and a picture's own size decides.
        tokens_of_sizes: Image tokens of pictures of some usual sizes, `"height x width"` -> tokens.
        image_views: How a picture is cut into views, complete; `None` for one view of one size or of its own.
        fusion: How pictures reach the language model.
        image_attention: What image tokens see.
        max_position_embeddings: Tokens that the language model was made for, where its config says so.
        training_bytes: What is trained -> weights, gradients and AdamW's two moments, all in `dtype`, without
            activations.
        cache: The language model's cache.
        trainable: Sub-modules that can be trained.
        native_classes: Class of transformers -> whether it could hold the same pair, and what was tried.
        servers: Server -> what is known.
        seconds: How long this took.
    """

    vision: str
    text: str
    works: bool | None = None
    reasons: list[str] = field(default_factory=list)
    nearest: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dtype: str | None = None
    parts: list[PartReport] = field(default_factory=list)
    embedding_parameters: int | None = None
    head_parameters: int | None = None
    new_embedding_rows: int | None = None
    image_size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    tokens_per_picture: int | None = None
    one_size: bool | None = None
    tokens_of_sizes: dict[str, int] = field(default_factory=dict)
    image_views: dict[str, Any] | None = None
    fusion: str = "embed"
    image_attention: str = "causal"
    max_position_embeddings: int | None = None
    training_bytes: dict[str, int] = field(default_factory=dict)
    cache: CacheReport | None = None
    trainable: list[str] = field(default_factory=list)
    native_classes: dict[str, str] = field(default_factory=dict)
    servers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def parameters(self) -> int | None:
        """All parameters of the model; `None` unless every part is known."""
        needed = {"vision_tower", "multi_modal_projector", "language_model"}
        needed |= {"fusion"} if self.fusion != "embed" else set()
        known = needed <= {part.name for part in self.parts}
        return sum(part.parameters for part in self.parts) if known else None

    @property
    def context_share(self) -> float | None:
        """Share of the language model's context that one picture takes."""
        if not self.tokens_per_picture or not self.max_position_embeddings:
            return None
        return self.tokens_per_picture / self.max_position_embeddings

    def part(self, name: str) -> PartReport | None:
        """The part of this name, or `None` if it could not be built."""
        return next((part for part in self.parts if part.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """All fields and properties, of JSON's types."""
        return {**asdict(self), "parameters": self.parameters, "context_share": self.context_share}

    def __str__(self) -> str:
        return "\n".join(f"{name + ':' if name else '':<17}{value}".rstrip() for name, value in self.lines())

    def verdict(self) -> str:
        return {True: "yes", False: "no", None: "not known"}[self.works]

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of every line of the report as text. A name of "" continues the line above."""
        return [
            ("works", self.verdict()),
            *_several("because", self.reasons),
            *_several("nearest", self.nearest),
            *self._part_lines(),
            *self._picture_lines(),
            *self._memory_lines(),
            *_several("native class", [f"{name}: {what}" for name, what in self.native_classes.items()]),
            *_several("servers", [f"{name}: {what}" for name, what in self.servers.items()]),
            *_several("note", self.notes),
        ]

    def _part_lines(self) -> list[tuple[str, str]]:
        lines = []
        for part in self.parts:
            line = f"{part.model_class}, {count(part.parameters)} parameters"
            if part.name == "language_model" and self.embedding_parameters is not None:
                head = "head tied" if self.head_parameters == 0 else f"head {count(self.head_parameters or 0)}"
                line += f" (embeddings {count(self.embedding_parameters)}, {head})"
            lines.append((_TITLES[part.name], line))
            if part.gradient_checkpointing is not None:
                supports = {
                    "gradient checkpointing": part.gradient_checkpointing,
                    "SDPA": part.sdpa,
                    "flash attention": part.flash_attention,
                }
                lines.append(("", ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in supports.items())))
                lines.append(("", f"known from: {part.known_from}"))
        return lines

    def _picture_lines(self) -> list[tuple[str, str]]:
        if self.image_size is None:
            return []
        pixels = f"{self.image_size[0]}x{self.image_size[1]} pixels"
        if self.tokens_per_picture is None or self.grid is None:
            return [("picture", f"{pixels}; number of tokens unknown, the vision tower could not be run here")]
        rows, columns = self.grid
        if self.fusion != "embed":
            of_views = "" if self.image_views is None else " of each view"
            line = f"{pixels}: {rows * columns} tokens ({rows}x{columns}){of_views} beside the text, 1 in it"
        elif self.image_views is None:
            line = f"{pixels}: {self.tokens_per_picture} tokens ({rows}x{columns})"
        else:
            line = f"{pixels}: {self.tokens_per_picture} tokens, a view of them {rows}x{columns}"
        if self.context_share is not None:
            line += f", {self.context_share:.1%} of {self.max_position_embeddings:,} positions"
        lines = [("picture", line)]
        if self.image_views is not None:
            lines.append(("", f"an example: pictures are shown as {self.image_views['type']}"))
        elif not self.one_size:
            lines.append(("", "an example: pictures keep their own sizes unless image_size is set"))
        if len(set(self.tokens_of_sizes.values())) > 1:
            lines += [("", f"{pixels} pixels: {tokens} tokens") for pixels, tokens in self.tokens_of_sizes.items()]
        return lines

    def _memory_lines(self) -> list[tuple[str, str]]:
        if self.parameters is None:
            return []
        weights = {
            dtype: sum(part.bytes_per_dtype[dtype] for part in self.parts) for dtype in self.parts[0].bytes_per_dtype
        }
        lines = [("weights", ", ".join(f"{size(number)} in {dtype}" for dtype, number in weights.items()))]
        if self.cache is None:
            lines.append(("cache", "unknown"))
        else:
            following = f"{size(self.cache.next_1000_bytes)} for each 1,000 more"
            rest = following if self.cache.next_1000_bytes else "no more for longer texts"
            how = " (extrapolated)" if self.cache.extrapolated else ""
            lines.append(("cache", f"{size(self.cache.first_1000_bytes)} for 1,000 tokens, {rest}{how}"))
        if self.training_bytes:
            lines.append(("training", f"estimates in {self.dtype} with AdamW, without activations"))
            lines += [("", f"{name}: {size(number)}") for name, number in self.training_bytes.items()]
            lines.append(("trainable", ", ".join(self.trainable)))
        return lines


_TITLES = {
    "vision_tower": "vision tower",
    "multi_modal_projector": "projector",
    "language_model": "language model",
    "fusion": "fusion",
    "image_newline": "image newline",
}


def count(number: int) -> str:
    """A number of parameters to three digits, such as 85.7 M."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:,.0f} {unit}"
    return str(number)


def size(number: int) -> str:
    """A number of bytes to three digits, such as 1.5 GB (powers of 1,000, as disks and cards are sold)."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number} B"


def _several(name: str, values: list[str]) -> list[tuple[str, str]]:
    return [(name if index == 0 else "", value) for index, value in enumerate(values)]
