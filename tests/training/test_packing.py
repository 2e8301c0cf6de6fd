"""A packed row against its samples one by one: the same losses and gradients, or a refusal."""

import pytest
import torch
from test_trainer import Samples, trainer
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoConfig

import anyvlm
from anyvlm.training.packed_attention import PACKED_SDPA
from anyvlm.training.packing import enable_packing


#: Without pictures, with one and with two, of five lengths.
SAMPLES = [Samples()[index] for index in range(6)]

#: By positions alone, by masks, with a mixture of experts, per-layer embeddings, sliding windows, no sdpa.
LANGUAGE_MODELS = {
    "llama": "positions",
    "gpt2": "positions",
    "gemma2": "positions",
    "gemma3n_text": "positions",
    "qwen3_moe": "positions",
    "opt": "masks",
    "falcon": "masks",
}


def composed(text="llama", **arguments):
    config = text_config(text) if isinstance(text, str) else text
    model, processor = anyvlm.compose(
        vision=vision_config("clip_vision_model"), text=config, tokenizer=tiny_tokenizer(), **arguments
    )
    return model.eval(), processor


def loss_and_gradients(model, batch, **inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, **inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check_equal_to_samples_alone(model, processor) -> str:
    """The oracle is the sum over samples, each in a batch of its own."""
    collator = anyvlm.AnyVlmDataCollator(processor)
    count = sum(int((collator([sample])["labels"][:, 1:] != -100).sum()) for sample in SAMPLES)
    number = {"num_items_in_batch": torch.tensor(count)}
    alone = [loss_and_gradients(model, collator([sample]), **number) for sample in SAMPLES]
    way = enable_packing(model, collator, SAMPLES[:4])
    batch = anyvlm.AnyVlmDataCollator(processor, packing=True)(SAMPLES)
    assert batch["input_ids"].shape == (1, sum(collator([s])["input_ids"].shape[1] for s in SAMPLES))
    loss, gradients = loss_and_gradients(model, batch, **number)
    torch.testing.assert_close(loss, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)
    if all(len(own) == len(gradients) for _, own in alone):  # an expert that no token went to has none
        for gradient, *parts in zip(gradients, *(own for _, own in alone)):
            torch.testing.assert_close(gradient, sum(parts), rtol=1e-3, atol=1e-5)
    return way


@pytest.mark.parametrize("text", LANGUAGE_MODELS)
def test_a_packed_row_has_the_losses_of_its_samples(text):
    model, processor = composed(text)
    if text == "qwen3_moe":  # the balance of experts is that of a batch, whichever way it is arranged
        model.language_model.config.output_router_logits = False
    assert check_equal_to_samples_alone(model, processor) == LANGUAGE_MODELS[text]


@pytest.mark.parametrize(
    "arguments",
    [
        {"image_attention": "bidirectional"},
        {"image_attention": "prefix"},
        {"fusion": "cross_attention"},
        {"fusion": {"type": "gated", "see": "all"}},
    ],
    ids=str,
)
def test_pictures_stay_with_their_sample(arguments):
    model, processor = composed(**arguments)
    if model.fusion is not None and arguments["fusion"] == "cross_attention":
        with torch.no_grad():  # closed gates let nothing through, whoever sees it
            for name, parameter in model.named_parameters():
                if "gate" in name:
                    parameter.fill_(0.5)
    check_equal_to_samples_alone(model, processor)


def test_positions_with_rows_and_columns_begin_again():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    settings = {**text_config("qwen2").to_dict(), "model_type": "qwen2_vl_text", "rope_parameters": rope}
    model, processor = composed(AutoConfig.for_model(**settings))
    assert model.config.language_model_spec["position_axes"] == 3
    assert check_equal_to_samples_alone(model, processor) == "masks"


@pytest.mark.parametrize("text", ["mamba", "bamba", "bloom"])
def test_language_models_that_would_leak_are_refused(text):
    model, processor = composed(text)
    collator = anyvlm.AnyVlmDataCollator(processor)
    with pytest.raises(ValueError, match="leak into the next"):
        enable_packing(model, collator, SAMPLES[:4])
    assert model.config.language_model_spec["packing"] is False
    with pytest.raises(ValueError, match="one sample in each row"):
        model(**anyvlm.AnyVlmDataCollator(processor, packing=True)(SAMPLES))


def test_a_sample_does_not_see_the_one_before_it():
    model, processor = composed()
    collator = anyvlm.AnyVlmDataCollator(processor, packing=True)
    enable_packing(model, collator, SAMPLES[:2])
    other = [SAMPLES[2], SAMPLES[1]]  # as long as sample 1, with another picture and answer
    batches = [collator([SAMPLES[1], SAMPLES[4]]), collator([other[0], SAMPLES[4]])]
    first, second = (model(**batch, logits_to_keep=0).logits for batch in batches)
    length = int(batches[0]["cu_seq_lens_q"][1])
    assert first.shape == second.shape
    assert not torch.equal(first[:, :length], second[:, :length])
    assert torch.equal(first[:, length:], second[:, length:])


def test_attention_is_computed_sample_by_sample():
    model, processor = composed()
    collator = anyvlm.AnyVlmDataCollator(processor, packing=True)
    enable_packing(model, collator, SAMPLES[:2])
    assert model.language_model.config._attn_implementation == PACKED_SDPA
    widths = []
    scaled_dot_product = torch.nn.functional.scaled_dot_product_attention

    class Widths(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is scaled_dot_product:
                widths.append(args[0].shape[2])
            return func(*args, **(kwargs or {}))

    batch = collator(SAMPLES)
    with Widths(), torch.no_grad():
        model(**batch)
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    assert widths[-len(lengths) :] == lengths


def test_a_saved_model_knows_but_keeps_its_attention(tmp_path):
    model, processor = composed()
    enable_packing(model, anyvlm.AnyVlmDataCollator(processor), SAMPLES[:2])
    model.save_pretrained(tmp_path)
    loaded = anyvlm.AnyVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.language_model_spec["packing"] == "positions"
    assert loaded.language_model.config._attn_implementation == "sdpa"


def test_a_trainer_has_the_same_losses_with_packing(tmp_path):
    losses = []
    for packing in (False, True):
        torch.manual_seed(0)
        model, processor = composed()
        run = trainer(tmp_path / str(packing), model, processor, 6, gradient_accumulation_steps=2, save_strategy="no")
        if packing:
            enable_packing(model, run.data_collator, SAMPLES[:2])
            run.data_collator.packing = True
        run.train()
        losses.append([float(entry["loss"]) for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
