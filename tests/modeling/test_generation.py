"""Generation follows the language model's rules. The oracle is the bare language model, given the same embeddings."""

import pytest
import torch
import transformers
from model_tester import ComposedModelTester, picture
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from anyvlm.modeling.modeling_anyvlm import AnyVlmCausalLMOutput


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "gemma2", "mamba"])
def tester(request):
    return ComposedModelTester(text=request.param)


@pytest.fixture
def batch(tester):
    return tester.inputs(["w1 <image> w2 <image>", "w5 w6 <image> w9"], [[picture(0), picture(1)], [picture(2)]])


def merged_embeddings(tester, batch) -> torch.Tensor:
    """Embeddings with the pictures in place, put together here by hand."""
    model = tester.model
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(batch["input_ids"]).clone()
        tokens = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)
    embeddings[batch["input_ids"] == model.config.image_token_id] = tokens
    return embeddings


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "repetition penalty": {"do_sample": False, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_equals_bare_language_model_on_the_same_embeddings(tester, batch, mode):
    model = tester.model
    kwargs = {
        **MODES[mode],
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "suppress_tokens": [model.config.image_token_id],
    }
    torch.manual_seed(3)
    expected = model.language_model.generate(
        inputs_embeds=merged_embeddings(tester, batch), attention_mask=batch["attention_mask"], **kwargs
    )
    torch.manual_seed(3)
    found = model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]
    if mode == "repetition penalty":
        # The bare model does not know the prompt's ids, so only what is generated can be compared: no pair repeats.
        for row in found.tolist():
            pairs = list(zip(row, row[1:]))
            assert len(pairs) == len(set(pairs))
    else:
        assert torch.equal(found, expected)


def test_inputs_embeds(tester, batch):
    """With the pictures already in place, and with placeholders still in the embeddings."""
    model = tester.model
    kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]
    merged = model.generate(
        inputs_embeds=merged_embeddings(tester, batch), attention_mask=batch["attention_mask"], **kwargs
    )
    assert torch.equal(merged, expected)
    raw = model.get_input_embeddings()(batch["input_ids"]).detach()
    placed = model.generate(
        inputs_embeds=raw,
        pixel_values=batch["pixel_values"],
        attention_mask=batch["attention_mask"],
        **kwargs,
    )
    assert torch.equal(placed, expected)


def test_image_token_is_never_generated(tester, batch):
    """Even where it is by far the likeliest, and whatever generation config is passed."""
    model = tester.model
    image_token = model.config.image_token_id
    boost = {"sequence_bias": [[[image_token], 100.0]]}
    for kwargs in (
        boost,
        {"generation_config": GenerationConfig(**boost, max_new_tokens=5)},
        {**boost, "num_beams": 2},
    ):
        kwargs = {"max_new_tokens": 5, **kwargs} if "generation_config" not in kwargs else kwargs
        new = model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]
        assert (new != image_token).all()
    control = torch.zeros(1, 1, 200)
    from transformers.generation import SequenceBiasLogitsProcessor

    biased = SequenceBiasLogitsProcessor(boost["sequence_bias"])(torch.zeros(1, 1, dtype=torch.long), control[0])
    assert biased.argmax() == image_token, "the bias of this test does nothing"


def test_stops_at_eos_and_at_a_criterion(tester, batch):
    model = tester.model
    one = {key: value[:1] if key != "pixel_values" else value[:2] for key, value in batch.items()}
    new = tester.generate(one)[0]
    third = int(new[2])
    stopped = model.generate(**one, max_new_tokens=20, do_sample=False, eos_token_id=third)[0]
    assert int(stopped[-1]) == third
    assert len(stopped) - one["input_ids"].shape[1] <= 3
    criteria = StoppingCriteriaList([_StopAt(third)])
    by_criterion = model.generate(**one, max_new_tokens=20, do_sample=False, stopping_criteria=criteria)[0]
    assert torch.equal(by_criterion, stopped)


class _StopAt(StoppingCriteria):
    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token_id


def test_assisted_decoding_equals_greedy(tester, batch):
    model = tester.model
    if model._is_stateful:
        pytest.skip("transformers refuses assisted decoding for models with a recurrent state")
    one = tester.one_picture()
    expected = tester.generate(one)
    assert torch.equal(tester.generate(one, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(tester.generate(one, assistant_model=model), expected)


def test_uncached_and_static_cache_equal_cached(tester, batch):
    expected = tester.generate(batch)
    assert torch.equal(tester.generate(batch, use_cache=False), expected)
    if tester.model.language_model._can_compile_fullgraph:
        assert torch.equal(tester.generate(batch, cache_implementation="static", disable_compile=True), expected)


def test_prompt_in_chunks_equals_prompt_in_one(tester, batch):
    """Chunks cut through the pictures."""
    if not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"):
        pytest.skip(f"transformers {transformers.__version__} cannot prefill pictures in chunks")
    if tester.model._is_stateful:
        pytest.skip("transformers prefills models with a recurrent state in one piece")
    one = tester.inputs(["w1 <image> w2 <image> w3"], [picture(0), picture(1)])
    assert torch.equal(tester.generate(one, prefill_chunk_size=7), tester.generate(one))


def test_scores_and_hidden_states_come_along(tester, batch):
    outputs = tester.model.generate(
        **batch, max_new_tokens=2, return_dict_in_generate=True, output_scores=True, output_hidden_states=True
    )
    assert len(outputs.scores) == len(outputs.hidden_states) == 2


def test_what_the_language_model_returns_is_kept(tester):
    output = tester.model(**tester.one_picture(), output_hidden_states=True)
    assert isinstance(output, AnyVlmCausalLMOutput)
    assert output.image_hidden_states.shape == (16, 32)
    assert len(output.hidden_states) >= 3
    as_tuple = tester.model(**tester.one_picture(), return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)
