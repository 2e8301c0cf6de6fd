"""The instruction that a projector may read beside a picture (InstructBLIP, Dai et al. 2023)."""

from collections.abc import Mapping


#: What goes along with each picture then, `(num_images, length)` each, under the names of InstructBLIP's processor.
INSTRUCTION_KEYS = ("qformer_input_ids", "qformer_attention_mask")


def reads_instruction(projector_config: Mapping) -> bool:
    """Whether the tokens of a picture depend on the text that comes with it."""
    return bool(projector_config.get("reads_text", False))


def instruction_arguments(projector_config: Mapping, given: Mapping) -> dict:
    """What of `given` goes to the projector: the entries of `INSTRUCTION_KEYS` that are not `None`.

    Raises:
        ValueError: the projector reads the instruction and there is none, or the other way round.
    """
    present = {key: given[key] for key in INSTRUCTION_KEYS if given.get(key) is not None}
    if reads_instruction(projector_config) and INSTRUCTION_KEYS[0] not in present:
        raise ValueError(
            f"This model's projector reads the instruction beside the picture, but {INSTRUCTION_KEYS[0]} is missing. Pass "
            "everything that the processor returned: model(**inputs)."
        )
    if present and not reads_instruction(projector_config):
        raise ValueError(
            f"{' and '.join(present)} {'were' if len(present) > 1 else 'was'} passed, but this model's projector reads no "
            "text. Use the processor that was saved with the model."
        )
    return present
