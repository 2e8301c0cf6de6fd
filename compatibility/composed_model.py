"""What must hold for every composed model, whatever its parts: one implementation, for the tests and for the table.

Each check compares with an oracle that is not ours: the bare language model, the same model without a cache, a sample
alone, the model that was saved. A check that fails raises `AssertionError` with what was found.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ..modeling.image_features import AnyVlmImageFeatures
from .bare_language_model import bare_cache_works, bare_padding_works
from .model_under_test import TEXT_INPUTS, ModelUnderTest, is_tied, require, set_gates


class ComposedModel(ModelUnderTest):
    """A composed model, the bare language model it was made from, and the checks."""

    #: Set by `check_padding` where texts with pictures are so long that the bare language model cannot pad them either.
    pads_short_texts_only = False

    def check_forward_is_finite(self) -> None:
        logits = self.logits(self.one_picture())
        require(torch.isfinite(logits).all(), "logits are not finite")

    def check_picture_changes_logits(self) -> None:
        inputs = [self.one_picture(seed) for seed in (0, 1)]
        first, second = (self.logits(each) for each in inputs)
        image_positions = (inputs[0]["input_ids"][0] == self.model.config.image_token_id).nonzero()
        before, after = int(image_positions[0]), int(image_positions[-1]) + 1
        change = (first - second)[0].abs().amax(-1)
        require(change[after:].min() > 1e-3, "text after the picture does not see it")
        # Experts round differently for other numbers of tokens; a leak would be as large as what comes after.
        if self.model.config.image_attention != "prefix":
            require(change[:before].max() < 1e-5, "text before the picture sees it")

    def check_gradients(self) -> None:
        """Every part gets gradients, and with gradient checkpointing the same ones; frozen parts get none."""
        inputs = self.one_picture()
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        self.model.train()
        try:
            plain = self._gradients(inputs, labels)
            new_parts = ("multi_modal_projector.", *(("fusion.",) if self.model.fusion is not None else ()))
            for part in ("vision_tower.", "language_model.", *new_parts):
                total = sum(gradient.abs().sum() for name, gradient in plain.items() if name.startswith(part))
                require(0 < total < float("inf"), f"{part[:-1]} gets no gradient")
            if self.checkpointing_parts():
                self.model.gradient_checkpointing_enable()
                checkpointed = self._gradients(inputs, labels)
                self.model.gradient_checkpointing_disable()
                require(plain.keys() == checkpointed.keys(), "gradient checkpointing loses gradients of some weights")
                for name, gradient in plain.items():
                    torch.testing.assert_close(
                        checkpointed[name],
                        gradient,
                        msg=lambda m, n=name: f"gradient checkpointing changes the gradient of {n}: {m}",
                    )
            self.model.vision_tower.requires_grad_(False)
            self.model.language_model.requires_grad_(False)
            names = set(self._gradients(inputs, labels))
            require(names, "the projector gets no gradient when the other parts are frozen")
            frozen = ("vision_tower.", "language_model.")
            require(not any(name.startswith(frozen) for name in names), "frozen parts get gradients")
        finally:
            self.model.gradient_checkpointing_disable()
            self.model.requires_grad_(True)
            self.model.zero_grad()
            self.model.eval()

    def _gradients(self, inputs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        torch.manual_seed(0)  # dropout
        self.model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def check_cached_generation_equals_uncached(self) -> None:
        inputs = self.one_picture()
        cached = self.generate(inputs)
        uncached = self.generate(inputs, use_cache=False)
        require(
            torch.equal(cached, uncached), f"with a cache {cached[0].tolist()}, without one {uncached[0].tolist()}"
        )
        require((cached != self.model.config.image_token_id).all(), "an image token is generated")
        if not self.uses_cache():
            require(
                not bare_cache_works(self.bare_language_model, self.new_tokens),
                "it generates without a cache, although the language model by itself can with one",
            )

    def check_padding(self, tolerance: float = 1e-4) -> list[str]:
        """A padded batch gives each sample's own logits, and a left-padded one each sample's own answer; or it is
        refused, which it may be only where the bare language model cannot take it either.

        Args:
            tolerance: Relative to the largest logit, by which rounding grows.

        Returns:
            The sides, of `"left"` and `"right"`, on which padding is refused.
        """
        texts = ["w1 <image> w2", "w5 w6 w7 <image> w8 w9 w10 <image> w11", "w20 w21"]
        pictures = [[self.picture(0)], [self.picture(1), self.picture(2)], []]
        singles = [self.inputs([text], own) for text, own in zip(texts, pictures)]
        alone = [self.logits(single)[0] for single in singles]
        lengths = [single["input_ids"].shape[1] for single in singles]
        refused = []
        for side in ("left", "right"):
            batch = self.inputs(texts, pictures, padding_side=side)
            try:
                together = self.logits(batch)
                answers = self.generate(batch) if side == "left" else None
            except ValueError as error:
                require(not bare_padding_works(self.bare_language_model, side), f"{side} padding is refused: {error}")
                refused.append(side)
                continue
            encoded = self._encoded_in_batch(batch, singles)
            for row, expected in enumerate(alone):
                difference = _difference(together[row], expected, batch["attention_mask"][row])
                if difference >= tolerance:  # of padding, or of a tower that rounds otherwise in a batch?
                    expected = self._logits_of_encoded(singles[row], encoded[row])
                    difference = _difference(together[row], expected, batch["attention_mask"][row])
                if difference >= tolerance and not bare_padding_works(self.bare_language_model, side, lengths):
                    self.pads_short_texts_only = True
                    return refused
                require(
                    difference < tolerance, f"{side} padding changes the logits of sample {row} by {difference:.2g}"
                )
            if answers is not None:
                for row, single in enumerate(singles):
                    expected = self.generate(single)[0]
                    require(torch.equal(answers[row], expected), f"{side} padding changes the answer to sample {row}")
        return refused

    def _encoded_in_batch(self, batch, singles: list) -> list[AnyVlmImageFeatures | None]:
        """Each sample's image features as the batch gives them, which are those it has alone but for rounding."""
        with torch.no_grad():
            together = self.model.get_image_features(**self.image_inputs(batch)).pooler_output
            samples = []
            for single in singles:
                images = self.image_inputs(single)
                alone = self.model.get_image_features(**images) if images else None
                own = together[: len(alone.pooler_output)] if images else []
                together = together[len(own) :]
                for found, expected in zip(own, alone.pooler_output if images else []):
                    difference = float((found - expected).abs().max() / expected.abs().max())
                    require(difference < 1e-3, f"a picture in a batch has other features, by {difference:.2g}")
                if images:
                    alone.pooler_output = own
                samples.append(alone)
        return samples

    def _logits_of_encoded(self, inputs, encoded: AnyVlmImageFeatures | None) -> torch.Tensor:
        """Logits of a sample whose image features are given."""
        text = {name: value for name, value in inputs.items() if name in TEXT_INPUTS}
        with torch.no_grad():
            return self.model(**text, mm_encoder_outputs={"image": encoded} if encoded else None).logits[0]

    def check_save_and_load(self, directory: Path, resize: bool = True) -> None:
        """Exact after saving and loading, tied weights still tied; also after the vocabulary was resized."""
        inputs = self.one_picture()
        self._check_round_trip(directory / "first", inputs)
        if resize:
            bare = self.bare_language_model
            if bare.get_input_embeddings().weight.shape[0] != bare.config.vocab_size:
                # transformers builds more rows than the config states (moshi, mllama), so it cannot load another number.
                try:
                    self.model.resize_token_embeddings(len(self.processor.tokenizer) + 3)
                except ValueError as error:
                    require("transformers cannot save it" in str(error), f"resizing fails: {error}")
                    return
                require(False, "a vocabulary that cannot be saved is resized")
            self.model.resize_token_embeddings(len(self.processor.tokenizer) + 3)
            require(
                self.model.config.text_config.vocab_size == len(self.processor.tokenizer) + 3,
                "the config has not the resized vocabulary",
            )
            self._check_round_trip(directory / "resized", inputs)

    def _check_round_trip(self, directory: Path, inputs) -> None:
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(directory, **self.load_arguments)
        for (
            parameter
        ) in loaded.parameters():  # weights mapped from a file are not aligned, and kernels then round else
            parameter.data = parameter.data.clone()
        found, expected = self.logits_of(loaded, inputs), self.logits(inputs)
        require(
            torch.equal(found, expected),
            f"logits differ by {(found - expected).abs().max():.2g} after saving and loading",
        )
        require(
            torch.equal(self.generate(inputs, model=loaded), self.generate(inputs)),
            "another answer after saving and loading",
        )
        require(
            is_tied(loaded) == is_tied(self.model) == is_tied(self.bare_language_model),
            "tied weights are not tied after saving and loading",
        )

    def check_text_only_equals_bare_language_model(self) -> None:
        vocab_size = self.bare_language_model.get_input_embeddings().weight.shape[0]
        inputs = self.inputs(["w1 w2 w3 w4 w5 w6"], [])
        with torch.no_grad():
            expected = self.bare_language_model(**inputs).logits
        found = self.logits(inputs)[..., :vocab_size]
        require(
            torch.equal(found, expected),
            f"text alone gives logits that differ by {(found - expected).abs().max():.2g}",
        )

    def check_embeddings_equal_ids(self) -> None:
        """Image tokens that are the embeddings of words give what those words' ids would: nothing is lost or scaled. With a
        fusion that puts no tokens into the text: closed gates give the language model's own logits for the ids."""
        if self.model.fusion is not None:
            self._check_closed_gates()
            return
        inputs = self.one_picture()
        ids = inputs["input_ids"]
        image_mask = ids == self.model.config.image_token_id
        words = 10 + torch.arange(int(image_mask.sum())) % 80
        as_text = ids.clone()
        as_text[image_mask] = words
        with torch.no_grad():
            tokens = self.model.get_input_embeddings()(words.unsqueeze(0))[0]
            as_image = self.model(
                input_ids=ids,
                attention_mask=inputs["attention_mask"],
                mm_encoder_outputs={"image": AnyVlmImageFeatures(pooler_output=[tokens], token_grids=[None])},
            ).logits
            expected = self.model.language_model(input_ids=as_text, attention_mask=inputs["attention_mask"]).logits
        if self.model.language_model_interface.has_per_layer_inputs:
            # The placeholders have no rows in the per-layer tables, by design of gemma3n; the text before is exact.
            first = int(image_mask[0].nonzero()[0])
            as_image, expected = as_image[:, :first], expected[:, :first]
        torch.testing.assert_close(as_image, expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def _check_closed_gates(self) -> None:
        inputs = self.one_picture()
        gates = {name: tensor.clone() for name, tensor in self.model.fusion.state_dict().items() if "gate" in name}
        set_gates(self.model.fusion, 0.0)
        try:
            found = self.logits(inputs)
        finally:
            self.model.fusion.load_state_dict(gates, strict=False)
        offset = self.model.language_model_interface.spec["position_offset"]
        arguments = {"attention_mask": inputs["attention_mask"]}
        if offset is not None:
            arguments["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0) + offset
        expected = self.model.language_model(input_ids=inputs["input_ids"], **arguments).logits
        if (
            self.model.fusion.changes_embeddings
        ):  # a sigmoid is never quite closed, and embeddings are scaled otherwise
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        else:
            difference = (found - expected).abs().max()
            require(difference == 0, f"with closed gates the logits differ by {difference:.2g}")


def _difference(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    """Largest difference of the logits of a padded sample `(sequence, vocabulary)` from those of the sample alone,
    relative to the largest of them where that is above 1."""
    return float((found[mask.bool()] - expected).abs().max() / expected.abs().max().clamp(min=1))
