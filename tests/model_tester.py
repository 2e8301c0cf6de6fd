"""What must hold for every composed model, whatever its parts. A new family is one line in `tiny_parts.py`.

Each check compares with an oracle that is not ours: the bare language model, the same model without a cache, a sample
alone, the model that was saved.
"""

import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_parts import (
    LANGUAGE_MODELS,
    TOWERS,
    fit_batch_norms,
    make_sensitive,
    text_config,
    tiny_tokenizer,
    vision_config,
)
from transformers import AutoModelForCausalLM

import anyvlm
from anyvlm.composition.parts import load_language_model


NEW_TOKENS = 6


def picture(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A random RGB picture of `(height, width)` pixels with structure at several scales."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


class ComposedModelTester:
    """A composed model, the bare language model it was made from, and the checks."""

    def __init__(self, vision: str = "clip_vision_model", text: str = "llama", **compose_arguments):
        torch.manual_seed(0)
        language_model = load_language_model(text_config(text)).eval()
        make_sensitive(language_model)
        self.bare_language_model = copy.deepcopy(language_model)
        self.model, self.processor = anyvlm.compose(
            vision=vision_config(vision),
            text=language_model,
            tokenizer=tiny_tokenizer(),
            image_size=TOWERS[vision][1],
            **compose_arguments,
        )
        make_sensitive(self.model.vision_tower, seed=2)
        fit_batch_norms(
            self.model.vision_tower, self.inputs(["<image> <image>"], [picture(5), picture(6)])["pixel_values"]
        )
        with torch.no_grad():  # so that a tiny model with random weights tells pictures apart
            self.model.multi_modal_projector.output_layer.weight.mul_(3)

    def inputs(self, texts: list[str], pictures: list, **kwargs):
        return self.processor(text=texts, images=pictures or None, padding=True, return_tensors="pt", **kwargs)

    def one_picture(self, seed: int = 0):
        return self.inputs(["w1 w2 <image> w3 w4 w5"], [picture(seed)])

    def logits(self, inputs) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**inputs).logits

    def generate(self, inputs, model=None, **kwargs) -> torch.Tensor:
        """Greedy new tokens `(batch, NEW_TOKENS)`; eos is off, so that every run has the same length."""
        sequences = (model or self.model).generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **kwargs
        )
        return sequences[:, inputs["input_ids"].shape[1] :]

    # The checks.

    def check_forward_is_finite(self) -> None:
        logits = self.logits(self.one_picture())
        assert torch.isfinite(logits).all()

    def check_picture_changes_logits(self) -> None:
        first, second = (self.logits(self.one_picture(seed)) for seed in (0, 1))
        image_ends = int((self.one_picture()["input_ids"][0] == self.model.config.image_token_id).nonzero()[-1])
        change = (first - second)[0].abs().amax(-1)
        before = int((self.one_picture()["input_ids"][0] == self.model.config.image_token_id).nonzero()[0])
        assert change[image_ends + 1 :].min() > 1e-3, "text after the picture does not see it"
        # Experts round differently for other numbers of tokens; a leak would be as large as what comes after.
        assert change[:before].max() < 1e-5, "text before the picture sees it"

    def check_picture_order_matters(self) -> None:
        text = ["w1 <image> w2 w3 <image> w4"]
        straight = self.logits(self.inputs(text, [picture(0), picture(1)]))
        swapped = self.logits(self.inputs(text, [picture(1), picture(0)]))
        assert (straight - swapped)[0, -1].abs().max() > 1e-3

    def check_gradients(self) -> None:
        """Every part gets gradients, and with gradient checkpointing the same ones."""
        inputs = self.one_picture()
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        self.model.train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                if not self.model.language_model.supports_gradient_checkpointing:
                    break
                self.model.gradient_checkpointing_enable()
            self.model.zero_grad()
            torch.manual_seed(0)  # dropout
            self.model(**inputs, labels=labels, use_cache=False).loss.backward()
            gradients.append(
                {
                    name: parameter.grad.clone()
                    for name, parameter in self.model.named_parameters()
                    if parameter.grad is not None
                }
            )
        self.model.gradient_checkpointing_disable()
        self.model.eval()
        for part in ("vision_tower.", "multi_modal_projector.", "language_model."):
            total = sum(gradient.abs().sum() for name, gradient in gradients[0].items() if name.startswith(part))
            assert torch.isfinite(total) and total > 0, f"{part} gets no gradient"
        if len(gradients) == 2:
            assert gradients[0].keys() == gradients[1].keys()
            for name, gradient in gradients[0].items():
                torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")

    def check_cached_generation_equals_uncached(self) -> None:
        inputs = self.one_picture()
        cached = self.generate(inputs)
        assert torch.equal(cached, self.generate(inputs, use_cache=False))
        assert (cached != self.model.config.image_token_id).all()

    def check_left_padding(self, tolerance: float = 1e-4) -> None:
        """A left-padded batch gives each sample's own logits and answer; right padding gives its logits. What the bare
        language model cannot do is refused, and nothing else is."""
        texts = ["w1 <image> w2", "w5 w6 w7 <image> w8 w9 w10 <image> w11", "w20 w21"]
        pictures = [[picture(0)], [picture(1), picture(2)], []]
        singles = [self.inputs([text], own) for text, own in zip(texts, pictures)]
        alone = [self.logits(single)[0] for single in singles]
        for side in ("left", "right"):
            batch = self.inputs(texts, pictures, padding_side=side)
            if not self.model.language_model_interface.spec[f"{side}_padding"]:
                assert self._padding_error(side) > tolerance, f"the bare language model takes {side} padding"
                with pytest.raises(ValueError, match=f"padded on the {side}"):
                    self.logits(batch)
                continue
            together = self.logits(batch)
            for row, expected in enumerate(alone):
                found = together[row][batch["attention_mask"][row].bool()]
                assert (found - expected).abs().max() < tolerance, f"{side} padding, sample {row}"
        batch = self.inputs(texts, pictures)
        if not self.model.language_model_interface.spec["left_padding"]:
            with pytest.raises(ValueError, match="one sample at a time"):
                self.generate(batch)
            return
        answers = self.generate(batch)
        for row, single in enumerate(singles):
            assert torch.equal(answers[row], self.generate(single)[0]), f"generation, sample {row}"

    def _padding_error(self, side: str) -> float:
        """How far the bare language model's logits for a padded text are from those for the text alone: in a forward
        pass called as `generate` calls it, and in `generate` itself."""
        bare = self.bare_language_model
        single = self.inputs(["w1 w2 w3 w4"], [])
        padded = self.inputs(["w1 w2 w3 w4", "w1 w2 w3 w4 w5 w6 w7 w8"], [], padding_side=side)
        arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
        steps = [bare.generate(**inputs, **arguments, do_sample=False).logits for inputs in (single, padded)]
        generated = [(alone[0] - together[0]).abs().max() for alone, together in zip(*steps)]
        mask = padded["attention_mask"]
        if "position_ids" in inspect.signature(bare.forward).parameters:
            padded["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            found = bare(**padded).logits[0][mask[0].bool()]
            forward = (found - bare(single["input_ids"]).logits[0]).abs().max()
        return float(max(forward, *generated))

    def check_save_and_load(self, directory: Path) -> None:
        """Exact after saving and loading, tied weights still tied, also after the vocabulary was resized."""
        inputs = self.one_picture()
        self._check_round_trip(directory / "first", inputs)
        if (
            self.bare_language_model.get_input_embeddings().weight.shape[0]
            != self.bare_language_model.config.vocab_size
        ):
            with pytest.raises(
                ValueError, match="transformers cannot save it"
            ):  # the bare model cannot be loaded then
                self.model.resize_token_embeddings(len(self.processor.tokenizer) + 3)
            return
        self.model.resize_token_embeddings(len(self.processor.tokenizer) + 3)
        assert self.model.config.text_config.vocab_size == len(self.processor.tokenizer) + 3
        self._check_round_trip(directory / "resized", inputs)

    def _check_round_trip(self, directory: Path, inputs) -> None:
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        # Weights mapped from a file are not aligned, and kernels round otherwise then.
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, self.logits(inputs))
        assert torch.equal(self.generate(inputs, model=loaded), self.generate(inputs))
        assert _is_tied(loaded) == _is_tied(self.model) == _is_tied(self.bare_language_model)

    def check_text_only_equals_bare_language_model(self) -> None:
        vocab_size = self.bare_language_model.get_input_embeddings().weight.shape[0]
        inputs = self.inputs(["w1 w2 w3 w4 w5 w6"], [])
        with torch.no_grad():
            expected = self.bare_language_model(**inputs).logits
        assert torch.equal(self.logits(inputs)[..., :vocab_size], expected)

    def check_embeddings_equal_ids(self) -> None:
        """Image tokens that are the embeddings of words give what those words' ids would: nothing is lost or scaled."""
        inputs = self.one_picture()
        ids = inputs["input_ids"]
        image_mask = ids == self.model.config.image_token_id
        words = torch.arange(10, 10 + int(image_mask.sum()))
        as_text = ids.clone()
        as_text[image_mask] = words
        with torch.no_grad():
            tokens = self.model.get_input_embeddings()(words.unsqueeze(0))[0]
            as_image = self.model(
                input_ids=ids,
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs={"image": _Encoded([tokens])},
            ).logits
            expected = self.model.language_model(input_ids=as_text, attention_mask=inputs["attention_mask"]).logits
        if self.model.language_model_interface.has_per_layer_inputs:
            # The placeholders have no rows in the per-layer tables, by design of gemma3n; the text before is exact.
            first = int(image_mask[0].nonzero()[0])
            as_image, expected = as_image[:, :first], expected[:, :first]
        torch.testing.assert_close(as_image, expected, rtol=1e-4, atol=1e-4)

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


class _Encoded:
    """Image features as `get_image_features` returns them."""

    def __init__(self, pooler_output):
        self.pooler_output = pooler_output


def _is_tied(model) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


ALL_TOWERS = list(TOWERS)
ALL_LANGUAGE_MODELS = list(LANGUAGE_MODELS)
