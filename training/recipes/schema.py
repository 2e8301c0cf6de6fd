"""Which keys a recipe has, and what may stand there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .yaml_file import YamlFile


@dataclass(frozen=True)
class Key:
    """What may stand at one key.

    Args:
        kind: `"text"`, `"number"`, `"integer"`, `"yes or no"`, `"mapping"`, `"list"`, several joined by ` or `.
        about: A sentence for people.
        required: Whether it must be there.
        least, most: Bounds of a number.
        above: A number must be larger.
        choices: The only texts allowed.
    """

    kind: str
    about: str
    required: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()


RECIPE: dict[str, Key] = {
    "model": Key("text", "the model to train: a folder or a Hub id; or `compose`"),
    "compose": Key("mapping", "parts to compose a new model from, with the arguments of anyvlm.compose; or `model`"),
    "output": Key("text", "folder of the trained model, and of the stages on the way", required=True),
    "seed": Key("integer", "of everything random", least=0),
    "dtype": Key(
        "text",
        "dtype of the weights while they train; float32 unless memory is short",
        choices=("float32", "bfloat16", "float16", "auto"),
    ),
    "trust_remote_code": Key("yes or no", "run code that a part brings along"),
    "data": Key("mapping", "what to train on"),
    "max_length": Key("integer", "most tokens of a sample; longer ones are an error", least=2),
    "training_arguments": Key("mapping", "fields of transformers.TrainingArguments, for all stages"),
    "forgetting": Key("mapping", "text on which the language model is measured before and after every stage"),
    "text_replay": Key("mapping", "text without pictures among the samples, against forgetting"),
    "stages": Key("list", "what is trained, one after another", required=True),
}

STAGE: dict[str, Key] = {
    "name": Key("text", "a short name; its folder is called after it", required=True),
    "why": Key("text", "the reason, for people"),
    "epochs": Key("number", "how often the data is seen; or `max_steps`", above=0),
    "max_steps": Key("integer", "optimizer steps; or `epochs`", least=1),
    "parts": Key("mapping", "what is trained; all else is frozen", required=True),
    "losses": Key("mapping", "name of a loss: its weight, or its settings"),
    "loss_mixing": Key("yes or no or mapping", "how much each loss counts is learnt along, beside the weights"),
    "data": Key("mapping", "of this stage; its keys take the place of the recipe's"),
    "max_length": Key("integer", "of this stage", least=2),
    "training_arguments": Key("mapping", "of this stage; its fields take the place of the recipe's"),
    "packing": Key("yes or no", "the samples of a batch in one row, without padding"),
    "feature_cache": Key("yes or no or text or mapping", "keep what a frozen tower gives: true, or the folder"),
    "forgetting": Key("mapping", "of this stage; its keys take the place of the recipe's"),
    "text_replay": Key("mapping", "of this stage; its keys take the place of the recipe's"),
}

PART: dict[str, Key] = {
    "train": Key("text", "`all`, `last 4 layers`, `lora`, …"),
    "learning_rate": Key("number", "of this part; else that of the training arguments", above=0),
    "layers": Key("list", "names of the modules to train, as a swap writes them"),
    "layer_decay": Key("number", "each layer learns at this share of the rate of the one above", above=0, most=1),
    "weight_decay": Key("number", "of this part", least=0),
    "lora": Key("mapping", "arguments of peft.LoraConfig, such as `r` and `target_modules`"),
    "bottleneck": Key("mapping", "settings of bottleneck adapters: `r` and `activation`"),
    "unfreeze": Key("text or number or integer or mapping or list", "gradual unfreezing"),
}

BOTTLENECK: dict[str, Key] = {
    "r": Key("integer", "width between the adapter's two layers", least=1),
    "activation": Key("text", "between them, by its name in transformers"),
}

FEATURE_CACHE: dict[str, Key] = {
    "directory": Key("text", "folder of the features; several runs may share it"),
    "max_bytes": Key("integer", "stop keeping when the features take so much", least=1),
}

LOSS_MIXING: dict[str, Key] = {
    "names": Key("list", "of the losses that are mixed; else all"),
    "learning_rate": Key("number", "of what is learnt", above=0),
}

FORGETTING: dict[str, Key] = {
    "texts": Key("text or list", "held-out texts: a file, one in a line, or a list", required=True),
    "warn_above": Key("number", "share by which the perplexity may rise in a stage; 0.02 is 2 %", least=0),
    "every_n_steps": Key("integer", "measure also every so many steps", least=1),
    "batch_size": Key("integer", "texts at once", least=1),
    "max_length": Key("integer", "tokens of a window", least=2),
    "stride": Key("integer", "tokens from one window to the next", least=1),
}

TEXT_REPLAY: dict[str, Key] = {
    "texts": Key("text or list", "texts to replay: a file, one in a line, or a list", required=True),
    "share": Key("number", "of text among all samples; 0.2 is a fifth", above=0, most=0.99),
    "beside": Key("number", "in place of share: texts for each sample, for the loss text_kl alone", above=0),
    "max_length": Key("integer", "tokens of a piece; longer texts are cut", least=4),
}

#: Other names of parts.
PART_ALIASES = {"projector": "multi_modal_projector"}
#: What can be trained, as far as a model has it; a name with dots leads further into one of them.
PARTS = (
    "vision_tower",
    "multi_modal_projector",
    "language_model",
    "fusion",
    "image_newline",
    "audio_tower",
    "audio_projector",
)
#: Mappings of a recipe that its stages may change key by key.
INHERITED = ("data", "training_arguments", "forgetting", "text_replay")


@dataclass
class Stage:
    """One stage: all its settings, with those of the recipe that it has not itself."""

    number: int
    name: str
    parts: dict[str, dict[str, Any]]
    losses: dict[str, Any]
    data: dict[str, Any]
    training_arguments: dict[str, Any]
    epochs: float | None = None
    max_steps: int | None = None
    max_length: int | None = None
    why: str = ""
    packing: Any = False
    feature_cache: Any = False
    loss_mixing: Any = False
    forgetting: dict[str, Any] = field(default_factory=dict)
    text_replay: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """`"1-projector"`."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower()).strip("-")
        return f"{self.number}-{name}"


@dataclass
class Recipe:
    """A recipe that was read and found right."""

    name: str
    values: dict[str, Any]
    output: str
    stages: list[Stage]
    model: str | None = None
    compose: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    trust_remote_code: bool = False
    file: YamlFile | None = None


def recipe_of(name: str, values: Mapping[str, Any]) -> Recipe:
    """A recipe of values that were checked."""
    stages = []
    for number, stage in enumerate(values["stages"], 1):
        inherited = {key: {**(values.get(key) or {}), **(stage.get(key) or {})} for key in INHERITED}
        own = {key: value for key, value in stage.items() if key not in (*INHERITED, "parts", "losses")}
        own.setdefault("max_length", values.get("max_length"))
        stages.append(
            Stage(
                number=number,
                parts={name: settings_of_part(part) for name, part in stage["parts"].items()},
                losses=dict(stage.get("losses") or {"language_model": 1.0}),
                **inherited,
                **own,
            )
        )
    own_keys = ("model", "output", "seed", "dtype", "trust_remote_code")
    own = {key: values[key] for key in own_keys if values.get(key) is not None}
    return Recipe(name, dict(values), stages=stages, compose=dict(values.get("compose") or {}), **own)


def settings_of_part(written: Any) -> dict[str, Any]:
    """`1e-3`, `last 4 layers` and `{train: …}` all as the latter."""
    if written is None:
        return {}
    if isinstance(written, str):
        return {"train": written}
    if isinstance(written, (int, float)) and not isinstance(written, bool):
        return {"learning_rate": float(written)}
    return dict(written)
