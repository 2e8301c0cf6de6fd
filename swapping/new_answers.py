"""What the new path makes of the same pictures: its tokens, with the tower's features kept where that is possible, and how
far the language model's words are from those that it said about the old tokens."""

from collections.abc import Sequence

import torch

from ..configuration.image_views import has_several_views
from ..configuration.instructions import reads_instruction
from ..modeling.image_features import AnyVlmImageFeatures
from ..modeling.language_models import labelled_positions
from .old_answers import Example, question_inputs
from .picture_paths import PicturePath


class NewPath(PicturePath):
    """A path that is being trained.

    Args:
        model, processor: As for `PicturePath`.
        keep: The tower is frozen, so that its features may be computed once. They are where each picture is one view and the
            projector reads no text; else the tower looks at the pictures in every step.
    """

    def __init__(self, model, processor, keep: bool):
        super().__init__(model, processor)
        config = model.config
        self.keep = (
            keep and not has_several_views(config.image_views) and not reads_instruction(config.projector_config)
        )

    @torch.no_grad()
    def look(self, examples: Sequence[Example]) -> None:
        """Fill in what the new path needs of examples: `prompt_ids`, and `features` with their `grid` if they are kept."""
        inputs = self._inputs(examples)
        for example, ids, mask in zip(examples, inputs.pop("input_ids"), inputs.pop("attention_mask")):
            example.prompt_ids = ids[mask.bool()]
        if self.keep:
            features, grids = self.features(inputs)
            for example, one, grid in zip(examples, features, grids):
                example.features, example.grid = one.clone(), grid

    def _inputs(self, examples: Sequence[Example]):
        prompts, pictures = [example.prompt for example in examples], [example.image for example in examples]
        return question_inputs(self.processor, prompts, pictures).to(self.model.device)

    def encode(self, examples: Sequence[Example]) -> AnyVlmImageFeatures:
        """Image tokens of each picture, with a graph where something is trained."""
        if not self.keep:
            inputs = self._inputs(examples)
            inputs.pop("input_ids"), inputs.pop("attention_mask")
            encoded = self.model.get_image_features(**inputs, return_dict=True)
            return AnyVlmImageFeatures(pooler_output=list(encoded.pooler_output), token_grids=encoded.token_grids)
        tokens: list = [None] * len(examples)
        token_grids: list = [None] * len(examples)
        for grid in dict.fromkeys(example.grid for example in examples):
            places = [place for place, example in enumerate(examples) if example.grid == grid]
            projected, projected_grid = self.project([examples[place].features for place in places], grid)
            for place, sample in zip(places, projected):
                tokens[place], token_grids[place] = sample, projected_grid
        return AnyVlmImageFeatures(pooler_output=tokens, token_grids=token_grids)

    @torch.no_grad()
    def has_as_many_tokens(self, examples: Sequence[Example]) -> bool:
        """Whether the new path gives tokens of the old ones' shape."""
        made = self.encode(examples).pooler_output
        return all(tokens.shape == example.tokens.shape for tokens, example in zip(made, examples))

    def compare(self, examples: Sequence[Example], encoded: AnyVlmImageFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the language model read the old answers behind these image tokens.

        Returns:
            The mean divergence of its words from those of the old path, scalar; and whether it would have given the whole
            answer itself, `(examples,)` booleans: the most probable word is the answer's at each place, which is what
            greedy decoding goes by.
        """
        device = self.model.device
        sequences = [torch.cat([example.prompt_ids, example.answer]) for example in examples]
        # Any token does: padding is masked, and stands behind all that is compared.
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=0)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in sequences], batch_first=True)
        labels = torch.full_like(padded, -100)
        for row, example in enumerate(examples):
            start = len(example.prompt_ids)
            labels[row, start : start + len(example.answer)] = example.answer
        logits = self.model(
            input_ids=padded,
            attention_mask=mask,
            labels=labels,
            mm_encoder_outputs={"image": encoded},
            use_cache=False,
        ).logits
        next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        interface = self.model.language_model_interface
        if interface.takes_logits_to_keep:
            positions, _ = labelled_positions(labels, interface.keeps_logits_per_sample)
            next_labels = next_labels.gather(1, positions) if positions.ndim == 2 else next_labels[:, positions]
        if logits.shape[:2] != next_labels.shape:
            raise RuntimeError(f"Logits {tuple(logits.shape)} do not fit labels {tuple(next_labels.shape)}.")
        divergences, agrees = [], []
        for example, sample, wanted in zip(examples, logits, next_labels):
            # Positions of padding are given the last place, whose label is none.
            sample = sample[wanted != -100]
            divergences.append(example.probabilities.divergence(sample))
            agrees.append(bool((sample.argmax(-1) == example.answer).all()))
        return torch.cat(divergences).mean(), torch.tensor(agrees, device=device)
