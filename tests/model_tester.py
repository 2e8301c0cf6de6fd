"""What must hold for every composed model, whatever its parts. A new family is one line in `tiny_parts.py`.

The checks are those of the table of compatibility (`compatibility/composed_model.py`), and two more.
"""

import torch
from tiny_parts import LANGUAGE_MODELS, TOWERS, text_config, vision_config

from anyvlm.compatibility.composed_model import ComposedModel, is_tied, picture


__all__ = ["ALL_LANGUAGE_MODELS", "ALL_TOWERS", "ComposedModelTester", "is_tied", "picture"]


class ComposedModelTester(ComposedModel):
    """A composed model of two types of `tiny_parts.py`, the bare language model it was made from, and the checks."""

    def __init__(self, vision: str = "clip_vision_model", text: str = "llama", **compose_arguments):
        super().__init__(vision_config(vision), text_config(text), TOWERS[vision][1], **compose_arguments)

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
        kwargs = {"labels": labels, **({"output_router_logits": True} if router else {})}
        with torch.no_grad():
            ours = self.model(**inputs, **kwargs)
            full = self.model.language_model(**inputs, **kwargs)
            halved = self.model(**inputs, **kwargs, num_items_in_batch=2 * (labels != -100).sum())
        assert ours.logits.shape[1] < full.logits.shape[1]
        torch.testing.assert_close(ours.loss, full.loss)
        aux_loss = self.bare_language_model.router_aux_loss_coef * full.aux_loss if router else torch.tensor(0.0)
        assert (aux_loss > 0) == router
        torch.testing.assert_close(halved.loss - aux_loss, (full.loss - aux_loss) / 2)


ALL_TOWERS = list(TOWERS)
ALL_LANGUAGE_MODELS = list(LANGUAGE_MODELS)
