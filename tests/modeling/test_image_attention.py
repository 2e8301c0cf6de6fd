"""What each token sees: against a matrix written down by hand, and against Gemma 3 and PaliGemma of transformers."""

import pytest
import torch
from tiny_parts import compose, make_sensitive, text_config, vision_config
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from anyvlm.composition.errors import CompositionError
from anyvlm.composition.language_model_probe import plain_words
from anyvlm.modeling.image_attention import picture_blocks


#: `.` text, a digit an image token of that picture; pictures 0 and 1 stand side by side. The last two are the answer.
TEXT = ".000011.22.."
ANSWER = 2
WINDOW = 3


def composed(text="llama", image_attention="bidirectional", **settings):
    config = text_config(text)
    for name, value in settings.items():
        setattr(config, name, value)
    model, processor = compose("clip_vision_model", config, image_attention=image_attention)
    make_sensitive(model)
    return model, processor


def inputs_of(model, text=TEXT, seed=0):
    """Ids, and random tokens for each picture in place of a tower's."""
    generator = torch.Generator().manual_seed(seed)
    ids = plain_words(model.language_model, len(text), avoid=model.config.image_token_id)
    ids[0, [index for index, letter in enumerate(text) if letter != "."]] = model.config.image_token_id
    width = model.config.projector_config["out_features"]
    pictures = [torch.randn(text.count(letter), width, generator=generator) for letter in sorted(set(text) - {"."})]
    return {"input_ids": ids, "mm_encoder_outputs": encoded(pictures)}


def encoded(pictures):
    return {"image": BaseModelOutputWithPooling(pooler_output=pictures)}


def seen(model, padding=(0, 0), **extra):
    """Boolean matrix: whether the logits at a place change when the token at another one does."""
    inputs = inputs_of(model)
    ids = torch.nn.functional.pad(inputs["input_ids"], padding, value=int(inputs["input_ids"][0, 0]))
    mask = torch.nn.functional.pad(torch.ones_like(inputs["input_ids"]), padding)
    columns = slice(padding[0], padding[0] + len(TEXT))
    extra = {key: torch.nn.functional.pad(value, padding, value=value[0, -1]) for key, value in extra.items()}

    @torch.no_grad()
    def run(ids, pictures):
        outputs = model(input_ids=ids, attention_mask=mask, mm_encoder_outputs=encoded(pictures), **extra)
        return outputs.logits[0, columns]

    pictures = inputs["mm_encoder_outputs"]["image"].pooler_output
    flat = torch.cat(pictures)
    plain, matrix, number = run(ids, pictures), [], 0
    for place, letter in enumerate(TEXT):
        other_ids, other = ids.clone(), flat.clone()
        if letter == ".":
            other_ids[0, padding[0] + place] += 1
        else:
            other[number], number = -other[number], number + 1
        difference = run(other_ids, other.split([len(picture) for picture in pictures])) - plain
        matrix.append(difference.abs().amax(-1) > 1e-6)
    return torch.stack(matrix, dim=1)


def expected(image_attention, window=None):
    matrix = torch.zeros(len(TEXT), len(TEXT), dtype=torch.bool)
    for one, letter in enumerate(TEXT):
        for other, its in enumerate(TEXT):
            past = other <= one
            same = letter == its != "."
            if image_attention == "prefix":
                same = max(one, other) < len(TEXT) - ANSWER
                matrix[one, other] = same or (past and (window is None or one - other < window))
            else:  # Gemma 3: a window holds inside a picture too
                matrix[one, other] = (same or past) and (window is None or one - other < window)
    return matrix


def answer_types():
    return torch.tensor([[0] * (len(TEXT) - ANSWER) + [1] * ANSWER])


class TestWhatIsSeen:
    """One layer, so that what is seen is seen directly."""

    @pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 3)], ids=["unpadded", "left", "right"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("image_attention", ["bidirectional", "prefix"])
    def test_is_the_matrix(self, image_attention, attention, padding):
        model, _ = composed("llama", image_attention, num_hidden_layers=1)
        model.set_attn_implementation({"text_config": attention})
        extra = {"token_type_ids": answer_types()} if image_attention == "prefix" else {}
        assert torch.equal(seen(model, padding, **extra), expected(image_attention))

    @pytest.mark.parametrize("image_attention", ["bidirectional", "prefix"])
    def test_is_the_same_with_flex_attention_and_in_training(self, image_attention):
        model, _ = composed("gemma3_text", image_attention, sliding_window=WINDOW)
        inputs = inputs_of(model)
        labels = inputs["input_ids"].clone()
        labels[:, :-ANSWER] = -100
        with torch.no_grad():
            expected = model(**inputs, labels=labels).loss
        model.gradient_checkpointing_enable()
        model.train()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        assert all(p.grad is not None for p in model.language_model.base_model.layers.parameters())
        model.eval().set_attn_implementation({"text_config": "flex_attention"})
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)

    @pytest.mark.parametrize("image_attention", ["bidirectional", "prefix"])
    @pytest.mark.parametrize(
        ("text", "settings"),
        [("mixtral", {}), ("gemma3_text", {"layer_types": ["sliding_attention"]})],
        ids=["mixtral", "gemma3_text"],
    )
    def test_within_a_sliding_window(self, text, settings, image_attention):
        model, _ = composed(text, image_attention, num_hidden_layers=1, sliding_window=WINDOW, **settings)
        extra = {"token_type_ids": answer_types()} if image_attention == "prefix" else {}
        assert torch.equal(seen(model, **extra), expected(image_attention, WINDOW))

    def test_text_between_tokens_of_a_picture_parts_it(self):
        mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 1]]).bool()
        found = picture_blocks(mask, [3, 2, 3, 1])
        assert found.tolist() == [[-1, 0, 0, -1, 1, -1, -1], [0, 0, 1, 1, 1, -1, 2]]

    @pytest.mark.parametrize("image_attention", ["bidirectional", "prefix"])
    def test_answer_begins_with_the_first_label(self, image_attention):
        model, _ = composed(image_attention=image_attention)
        inputs = inputs_of(model)
        labels = inputs["input_ids"].clone()
        labels[:, :-ANSWER] = -100
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss
            logits = model(**inputs, token_type_ids=answer_types()).logits
            causal = model(**inputs, token_type_ids=torch.ones_like(answer_types())).logits
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(logits[0, -ANSWER - 1 : -1], labels[0, -ANSWER:])
        )
        assert torch.equal(logits, causal) == (image_attention == "bidirectional")

    def test_text_alone_is_causal_or_a_prompt(self):
        for image_attention in ("bidirectional", "prefix"):
            model, _ = composed(image_attention=image_attention)
            ids = inputs_of(model, "......")["input_ids"]
            with torch.no_grad():
                same = torch.allclose(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)
            assert same == (image_attention == "bidirectional")


class TestGeneration:
    @pytest.mark.parametrize("image_attention", ["bidirectional", "prefix"])
    @pytest.mark.parametrize("text", ["llama", "gemma3_text", "falcon_h1"])
    def test_equals_the_forward_pass(self, text, image_attention):
        """With each kind of cache and without; a padded batch in which each sample has other pictures."""
        model, _ = composed(text, image_attention)
        samples = [inputs_of(model, "....0000.1111..."), inputs_of(model, ".0000.11..22", seed=1)]
        new, alone = 6, []
        for sample in samples:  # the oracle: the whole text, token by token
            ids, prompt = sample["input_ids"], sample["input_ids"].shape[1]
            for _ in range(new):
                types = (torch.arange(ids.shape[1]) >= prompt).long().unsqueeze(0)
                with torch.no_grad():
                    logits = model(ids, mm_encoder_outputs=sample["mm_encoder_outputs"], token_type_ids=types).logits
                logits[..., model.config.image_token_id] = -float("inf")
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            alone.append(ids[0, prompt:])
        missing = samples[0]["input_ids"].shape[1] - samples[1]["input_ids"].shape[1]
        ids = torch.cat(
            [samples[0]["input_ids"], torch.nn.functional.pad(samples[1]["input_ids"], (missing, 0), value=3)]
        )
        mask = torch.ones_like(ids)
        mask[1, :missing] = 0
        pictures = [picture for sample in samples for picture in sample["mm_encoder_outputs"]["image"].pooler_output]
        caches = [{}, {"use_cache": False}] + [{"cache_implementation": "static"}] * (text != "falcon_h1")
        for cache in caches:
            found = model.generate(
                ids,
                attention_mask=mask,
                mm_encoder_outputs=encoded(pictures),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                disable_compile=True,
                eos_token_id=None,
                **cache,
            )
            assert torch.equal(found[:, ids.shape[1] :], torch.stack(alone)), cache

    def test_a_second_turn_on_a_cache(self):
        model, _ = composed("gemma3_text", "bidirectional")
        first, second = inputs_of(model, "..0000.."), inputs_of(model, "..1111..", seed=1)
        both = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
        pictures = [x["mm_encoder_outputs"]["image"].pooler_output[0] for x in (first, second)]
        with torch.no_grad():
            whole = model(both, mm_encoder_outputs=encoded(pictures)).logits
            cache = model(**first, use_cache=True).past_key_values
            found = model(**second, past_key_values=cache).logits
        torch.testing.assert_close(found, whole[:, first["input_ids"].shape[1] :])

    def test_prompt_in_chunks_is_refused(self):
        model, _ = composed()
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**inputs_of(model), prefill_chunk_size=4, max_new_tokens=1)


NATIVE = {
    "gemma3": (Gemma3ForConditionalGeneration, Gemma3Config, "gemma3_text", "bidirectional"),
    "paligemma": (PaliGemmaForConditionalGeneration, PaliGemmaConfig, "gemma2", "prefix"),
}


class TestNativeModels:
    """The same language model in transformers' own model; both are given the same image tokens."""

    @pytest.mark.parametrize("family", list(NATIVE))
    def test_logits_and_generation(self, family):
        model_class, config_class, text, image_attention = NATIVE[family]
        # Not all of these models cap the logits in every version of transformers, though their language models do.
        model, _ = composed(text, image_attention, sliding_window=5, final_logit_softcapping=None)
        config = config_class(
            text_config=model.config.text_config.to_dict(),
            vision_config=vision_config("siglip_vision_model").to_dict(),
            image_token_id=model.config.image_token_id,
        )
        native = model_class(config).eval()
        native.model.language_model.load_state_dict(model.language_model.model.state_dict())
        native.lm_head.load_state_dict(model.language_model.lm_head.state_dict())
        ids = torch.cat([inputs_of(model, "...0000.1111...")["input_ids"]] * 2)
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        tokens = torch.randn(4, 4, model.config.projector_config["out_features"])
        is_image = ids == model.config.image_token_id
        types = torch.zeros_like(ids)
        types[:, -ANSWER:] = 1
        prompt_types = is_image.long() if family == "gemma3" else torch.zeros_like(ids)
        with torch.no_grad():
            theirs = native(
                input_ids=ids,
                attention_mask=mask,
                token_type_ids=is_image.long() if family == "gemma3" else types,
                mm_encoder_outputs=encoded(tokens),
            ).logits
            ours = model(
                input_ids=ids, attention_mask=mask, token_type_ids=types, mm_encoder_outputs=encoded(list(tokens))
            ).logits
        difference = (ours - theirs)[mask.bool()].abs().max()
        assert difference < 1e-5, difference
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": mask}
        theirs = native.generate(
            ids,
            mm_encoder_outputs=encoded(tokens),
            token_type_ids=prompt_types,
            suppress_tokens=[model.config.image_token_id],
            **settings,
        )
        ours = model.generate(ids, mm_encoder_outputs=encoded(list(tokens)), **settings)
        assert torch.equal(ours, theirs)


class TestCheckpoint:
    def test_is_saved(self, tmp_path):
        model, _ = composed(image_attention="prefix")
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        inputs = inputs_of(model)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


class TestRefusals:
    @pytest.mark.parametrize("image_attention", ["bidirectional", "prefix"])
    @pytest.mark.parametrize("text", ["bloom", "mamba", "rwkv", "openai-gpt"])
    def test_language_models_without_such_masks(self, text, image_attention):
        with pytest.raises(CompositionError, match='Use image_attention="causal"'):
            compose("clip_vision_model", text, image_attention=image_attention)

    def test_unknown(self):
        with pytest.raises(CompositionError, match="bidirectional"):
            compose(image_attention="both ways")

    def test_attention_without_masks_of_pairs(self):
        model, _ = composed()
        model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="sdpa"):
            model(**inputs_of(model))

    def test_prepared_masks(self):
        model, _ = composed()
        with pytest.raises(ValueError, match="makes the masks itself"):
            model(**inputs_of(model), attention_mask=torch.ones(1, 1, len(TEXT), len(TEXT), dtype=torch.bool))

    def test_packed_samples_and_a_sliding_window(self):
        model, _ = compose(text="gemma3_text", image_attention="bidirectional")
        positions = torch.cat([torch.arange(7), torch.arange(5)]).unsqueeze(0)
        with pytest.raises(ValueError, match="packed"):
            model(**inputs_of(model), position_ids=positions)
