"""A processor with a second tokenizer, for projectors that read the instruction beside the picture (InstructBLIP).

The tokenizer is no sub-processor in transformers' sense, as those may not be missing: it lies in a folder of its own beside
the processor's files, where InstructBLIP's lies too.
"""

import os
from collections.abc import Mapping

import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import PROCESSOR_NAME

from ..configuration.instructions import INSTRUCTION_KEYS, reads_instruction


#: Folder of the second tokenizer, and the processor's argument for it.
INSTRUCTION_TOKENIZER = "qformer_tokenizer"

#: How many positions transformers' Q-Formers have if their config does not say.
_POSITIONS = 512


class InstructionProcessor(ProcessorMixin):
    """Adds `qformer_input_ids` and `qformer_attention_mask`, a row for each picture and video."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != INSTRUCTION_TOKENIZER]

    @property
    def qformer_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Under another name in `__dict__`, whose entries transformers would write into the config."""
        return self._qformer_tokenizer

    def set_instruction_tokenizer(self, tokenizer: PreTrainedTokenizerBase | None, projector_config: Mapping) -> None:
        """
        Raises:
            ValueError: the projector reads the instruction and there is no tokenizer, or the other way round.
        """
        if reads_instruction(projector_config or {}) != (tokenizer is not None):
            raise ValueError(
                f"This projector reads {'the' if tokenizer is None else 'no'} instruction beside the picture: "
                f"{'pass' if tokenizer is None else 'leave out'} {INSTRUCTION_TOKENIZER}=…."
            )
        self._qformer_tokenizer = tokenizer

    def __call__(self, images=None, text=None, videos=None, audio=None, instruction=None, **kwargs) -> BatchFeature:
        """As the base class.

        Args:
            instruction: What the projector reads beside the pictures of a text, where it reads any: a string, or one for
                each text. Default: the text itself. Pass it where the text has the answer too, as in training.

        Raises:
            ValueError: `instruction` for a projector that reads none, not one for each text, or longer than the Q-Former's
                positions.
        """
        inputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if self.qformer_tokenizer is None:
            if instruction is not None:
                raise ValueError("This model's projector reads no instruction. Leave out instruction=….")
            return inputs
        if "pixel_values" in inputs or "tower_features" in inputs:
            texts = [text] if isinstance(text, str) else list(text)
            instructions = texts if instruction is None else instruction
            instructions = [instructions] if isinstance(instructions, str) else list(instructions)
            if len(instructions) != len(texts):
                raise ValueError(
                    f"Got {len(texts)} texts but {len(instructions)} instructions. Pass one for each text."
                )
            # Its positions count padding, so it pads on its own side (the right), unless the caller says otherwise.
            side = kwargs.get("padding_side") or self.qformer_tokenizer.padding_side
            encoded = self._encode_instructions(
                instructions,
                [sample.count(self.image_token) + sample.count(self.video_token) for sample in texts],
                padding_side=side,
            )
            as_tensors = isinstance(inputs["input_ids"], torch.Tensor)
            inputs.update({key: value if as_tensors else value.tolist() for key, value in encoded.items()})
        return inputs

    def _encode_instructions(
        self, instructions: list[str], num_pictures: list[int], padding_side: str
    ) -> dict[str, torch.Tensor]:
        """A row for each picture, `(num_images, length)`, without the placeholders of pictures."""
        words = [text.replace(self.image_token, "").replace(self.video_token, "") for text in instructions]
        encoded = self.qformer_tokenizer(
            words, padding=True, padding_side=padding_side, return_token_type_ids=False, return_tensors="pt"
        )
        positions = (self.projector_config.get("qformer_config") or {}).get("max_position_embeddings", _POSITIONS)
        if encoded["input_ids"].shape[1] > positions:
            raise ValueError(
                f"An instruction has {encoded['input_ids'].shape[1]} tokens, but the Q-Former {positions} positions. Pass "
                "instruction=… with what it needs to know to look at the picture."
            )
        rows = torch.repeat_interleave(torch.arange(len(words)), torch.tensor(num_pictures))
        return dict(zip(INSTRUCTION_KEYS, (encoded["input_ids"][rows], encoded["attention_mask"][rows])))

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """`save_pretrained` and `push_to_hub` come by here."""
        if os.path.basename(json_file_path) == PROCESSOR_NAME and self.qformer_tokenizer is not None:
            directory = os.path.dirname(os.path.abspath(json_file_path))
            self.qformer_tokenizer.save_pretrained(os.path.join(directory, INSTRUCTION_TOKENIZER))
        super().to_json_file(json_file_path)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
        if reads_instruction((processor_dict or {}).get("projector_config") or {}):
            subfolder = os.path.join(kwargs.pop("subfolder", ""), INSTRUCTION_TOKENIZER)
            # Not by the base class's own means, which would take the language model's where this one is missing.
            arguments.append(
                AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            )
        return arguments
