"""Make a language model's tokenizer ready for pictures: one image token, and bos, eos and pad that agree."""

import copy
import logging

from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..configuration.instructions import reads_instruction
from ..modeling.language_models import resize_vocabulary
from .errors import CompositionError
from .parts import PartSource, pretrained_name


logger = logging.getLogger(__name__)


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | None, text: PartSource, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the language model's own.

    Raises:
        CompositionError: nothing says which it is, or its files are not there.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    source = tokenizer or pretrained_name(text)
    if not source:
        raise CompositionError(
            f"A {type(text).__name__} does not say which tokenizer it goes with. Pass tokenizer=… (a path, a Hub id or "
            "an instance)."
        )
    loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    # Where the files are missing, transformers makes a tokenizer of the right class that knows no word.
    if set(loaded.get_vocab()) <= set(loaded.all_special_tokens):
        raise CompositionError(
            f"{source} has no tokenizer: a {type(loaded).__name__} loaded from there knows no token but special ones. Pass "
            "tokenizer=… (a path, a Hub id or an instance)."
        )
    return loaded


def load_instruction_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | None,
    text_tokenizer: PreTrainedTokenizerBase,
    projector_config: dict,
    trust_remote_code: bool,
) -> tuple[PreTrainedTokenizerBase | None, dict]:
    """The tokenizer of a projector that reads the instruction (`None` for others), and the projector's config for it.

    Args:
        tokenizer: The one given. Without one it is a copy of the language model's, and the Q-Former's vocabulary is as
            large.

    Raises:
        CompositionError: a tokenizer for a projector that reads nothing, or one that knows more tokens than the Q-Former.
    """
    if not reads_instruction(projector_config):
        if tokenizer is not None:
            raise CompositionError(
                "qformer_tokenizer is for a projector that reads the instruction beside the picture. Leave it out, or "
                'compose with projector={"type": "qformer", "reads_text": True}.'
            )
        return None, projector_config
    if tokenizer is None:
        loaded = copy.deepcopy(text_tokenizer)
        loaded.padding_side = "right"  # a Q-Former's positions count padding
    else:
        loaded = load_tokenizer(tokenizer, "", trust_remote_code)
    settings = {"vocab_size": len(loaded), **(projector_config.get("qformer_config") or {})}
    if settings["vocab_size"] < len(loaded):
        raise CompositionError(
            f"The Q-Former has a vocabulary of {settings['vocab_size']} tokens, but its tokenizer {len(loaded)}. Leave out "
            "vocab_size in qformer_config, or pass the qformer_tokenizer that goes with it."
        )
    return loaded, {**projector_config, "qformer_config": settings}


def normalise_special_tokens(tokenizer: PreTrainedTokenizerBase, language_model: nn.Module) -> None:
    """Make tokenizer, model config and generation config name the same bos, eos and pad.

    The tokenizer's word counts, but the model config keeps a pad token that it has; what the tokenizer lacks is taken
    from the model's configs. bos may be missing (Qwen has none).
    Without a pad token, eos pads: attention masks and labels mark padding, so an eos in the text stays itself.

    Raises:
        CompositionError: nothing says where a text ends.
    """
    config = language_model.config
    generation_config: GenerationConfig = language_model.generation_config
    for name in ("bos_token", "eos_token"):
        token_id = _first_id(getattr(generation_config, f"{name}_id", None), getattr(config, f"{name}_id", None))
        if getattr(tokenizer, name) is None and token_id is not None and token_id < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    if tokenizer.eos_token is None:
        raise CompositionError(
            "Neither the tokenizer nor the language model's config names an end-of-sequence token, so an answer would "
            "never end. Set tokenizer.eos_token and pass tokenizer=…."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token_id = getattr(tokenizer, name)
        # Some families take their table of positions from the config's pad token (roberta, xglm): what is there stays.
        if name != "pad_token_id" or getattr(config, name, None) is None:
            setattr(config, name, token_id)
        stated = getattr(generation_config, name, None)
        # A generation config may stop at several tokens (eos and end of turn); those stay, and the tokenizer's joins.
        if name == "eos_token_id" and isinstance(stated, (list, tuple)):
            token_id = [*stated, token_id] if token_id not in stated else list(stated)
        setattr(generation_config, name, token_id)


def add_image_token(tokenizer: PreTrainedTokenizerBase, language_model: nn.Module, image_token: str) -> int:
    """Make `image_token` one id and give it a row; only rows that did not exist are new. Returns the id.

    Raises:
        CompositionError: the tokenizer still splits the token.
    """
    missing = len(tokenizer) - language_model.get_input_embeddings().weight.shape[0]
    if missing > 0:
        logger.warning(
            "The tokenizer has %d tokens more than the language model has embeddings. Their new rows are untrained; if "
            "that is not meant, pass the tokenizer that the model was trained with.",
            missing,
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    if tokenizer.encode(image_token, add_special_tokens=False) != [image_token_id]:
        raise CompositionError(
            f"{type(tokenizer).__name__} does not keep {image_token!r} as one token. Pass another image_token=…."
        )
    if len(tokenizer) > language_model.get_input_embeddings().weight.shape[0]:
        try:
            resize_vocabulary(language_model, len(tokenizer))
        except ValueError as error:
            raise CompositionError(str(error)) from error
    return image_token_id


def _first_id(*values) -> int | None:
    for value in values:
        if isinstance(value, (list, tuple)) and value:
            return value[0]
        if value is not None:
            return value
    return None
