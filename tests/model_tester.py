"""What must hold for every composed model, whatever its parts. A new family is one line in `tiny_parts.py`.

The checks are those of the table of compatibility (`compatibility/composed_model.py`), and two more.
"""

from pathlib import Path

import torch
from tiny_parts import LANGUAGE_MODELS, TOWERS, text_config, vision_config

from anyvlm.compatibility.composed_model import ComposedModel
from anyvlm.compatibility.model_under_test import is_tied, picture


__all__ = ["ALL_LANGUAGE_MODELS", "ALL_TOWERS", "ComposedModelTester", "is_tied", "picture"]


class ComposedModelTester(ComposedModel):
    """A composed model of two types of `tiny_parts.py`, the bare language model it was made from, and the checks."""

    def __init__(self, vision: str = "clip_vision_model", text: str = "llama", **compose_arguments):
        super().__init__(vision_config(vision), text_config(text), TOWERS[vision][0], **compose_arguments)

    def check_everything(self, directory: Path) -> None:
        """Every check, one after another; `directory` is for what is saved."""
        self.check_forward_is_finite()
        self.check_picture_changes_logits()
        self.check_picture_order_matters()
        self.check_gradients()
        self.check_cached_generation_equals_uncached()
        self.check_padding()
        self.check_text_only_equals_bare_language_model()
        self.check_embeddings_equal_ids()
        self.check_loss_is_the_language_models_own()
        self.check_save_and_load(directory)

    def check_picture_order_matters(self) -> None:
        text = ["w1 <image> w2 w3 <image> w4"]
        straight = self.logits(self.inputs(text, [picture(0), picture(1)]))
        swapped = self.logits(self.inputs(text, [picture(1), picture(0)]))
        assert (straight - swapped)[0, -1].abs().max() > 1e-3

    def check_loss_is_the_language_models_own(self) -> None:
        """With labels, our loss on a text-only padded batch equals the bare LM's, auxiliary loss included."""
        inputs = self.inputs(["w1 w2 w3 w4 w5 w6", "w7 w8 w9"], [], padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :2] = -100
        router = "output_router_logits" in self.model.language_model_interface.argument_names
        extra = {"output_router_logits": True} if router else {}
        count = (labels[:, 1:] != -100).sum()
        with torch.no_grad():
            ours = self.model(**inputs, **extra, labels=labels)
            halved = self.model(**inputs, **extra, labels=labels, num_items_in_batch=2 * count)
            own = {"labels": labels} if self.model.language_model_interface.spec["own_loss"] else {}
            full = self.model.language_model(**inputs, **extra, **own)
        expected = torch.nn.functional.cross_entropy(
            full.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(2 * (ours.loss - halved.loss), expected)  # auxiliary losses do not count
        if own:
            torch.testing.assert_close(ours.loss, full.loss)
            assert (ours.loss > expected + 1e-4) == (full.get("aux_loss") is not None)
        else:
            torch.testing.assert_close(ours.loss, expected)
        assert not self.model.language_model_interface.takes_logits_to_keep or (
            ours.logits.shape[1] < full.logits.shape[1]
        )


ALL_TOWERS = list(TOWERS)
ALL_LANGUAGE_MODELS = list(LANGUAGE_MODELS)
