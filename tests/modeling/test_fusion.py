"""Fusions that put no picture tokens into the text: what every model must do, and what only these can get wrong."""

import copy
import threading

import pytest
import torch
from model_tester import ComposedModelTester, picture
from tiny_parts import compose, text_config
from transformers import GenerationConfig

from anyvlm.compatibility.model_under_test import set_gates
from anyvlm.composition.errors import CompositionError


CROSS = {"type": "cross_attention", "every": 2}
FUSIONS = {
    "cross_attention": CROSS,
    "all pictures, gated mlp, vector gates": {
        "type": "cross_attention",
        "every": 1,
        "see": "all",
        "mlp": "gated",
        "hidden_act": "silu",
        "gate": "vector",
        "norm": "rms_norm",
        "qk_norm": True,
        "image_norm": False,
        "num_heads": 2,
        "mlp_ratio": 2,
    },
    "gated": {"type": "gated"},
    "gated by channel": {"type": "gated", "gate": "channel", "see": "all", "num_heads": 2},
}
PAIRS = [(fusion, "llama") for fusion in FUSIONS] + [
    (fusion, text)
    for fusion in ("cross_attention", "gated")
    for text in ("gpt2", "opt", "mamba", "falcon_h1", "mixtral")
]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "+".join(pair))
def tester(request):
    fusion, text = request.param
    return ComposedModelTester(text=text, fusion=FUSIONS[fusion])


@pytest.fixture(scope="module", params=["cross_attention", "gated"])
def llama(request):
    return ComposedModelTester(fusion=FUSIONS[request.param])


def test_the_checks_of_every_model(tester, tmp_path):
    tester.check_everything(tmp_path)


def test_each_picture_has_one_token(llama):
    inputs = llama.inputs(["w1 <image> w2 <image>"], [picture(0), picture(1)])
    assert inputs["input_ids"].shape == (1, 4)
    assert llama.processor._get_num_multimodal_tokens([(10, 20), (300, 200)])["num_image_tokens"] == [1, 1]


@pytest.mark.parametrize("see", ["latest", "all"])
@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_which_pictures_are_seen(fusion, see):
    """The first layer's input is changed where a picture is exchanged that a token sees; later layers mix tokens, so the
    language model has one layer."""
    config = text_config("llama")
    config.num_hidden_layers = 1
    model, processor = compose(text=config, fusion={"type": fusion, "see": see})
    set_gates(model.fusion, 0.7)
    states = []
    model.language_model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    texts = ["w1 <image> w2 <image> w3", "w4 w5"]

    def run(*seeds):
        inputs = processor(text=texts, images=[[picture(s) for s in seeds], []], padding=True, return_tensors="pt")
        with torch.no_grad():
            model(**inputs)
        return states.pop()

    base = run(0, 1)
    first = (run(2, 1) - base).abs().amax(-1) > 0
    second = (run(0, 2) - base).abs().amax(-1) > 0
    latest = see == "latest"
    assert first[0].tolist() == [False, True, True, not latest, not latest]
    assert second[0].tolist() == [False, False, False, True, True]
    assert not first[1].any() and not second[1].any()


def test_eager_and_sdpa_agree(llama):
    batch = llama.inputs(["w1 <image> w2 <image>", "w5 w6"], [[picture(0), picture(1)], []])
    sdpa = llama.logits(batch)
    llama.model.set_attn_implementation("eager")
    try:
        eager = llama.logits(batch)
    finally:
        llama.model.set_attn_implementation("sdpa")
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(eager[seen], sdpa[seen], rtol=1e-4, atol=1e-4)
    assert not torch.equal(eager[seen], sdpa[seen]), "the same function ran twice"


MODES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams and answers": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_follows_the_forward_pass(llama, mode):
    """Whatever way an answer was found, its scores are those of one pass over the whole text, and samples with two, one
    and no pictures keep their own."""
    texts = ["w1 <image> w2 w9 <image> w3", "w5 <image>", "w6 w7"]
    pictures = [[picture(0), picture(1)], [picture(2)], []]
    batch = llama.inputs(texts, pictures)
    torch.manual_seed(0)
    outputs = llama.model.generate(
        **batch,
        **MODES[mode],
        max_new_tokens=5,
        min_new_tokens=5,
        output_logits=True,
        return_dict_in_generate=True,
    )
    times = len(outputs.sequences) // 3
    for row, sequence in enumerate(outputs.sequences):
        text, own = texts[row // times], pictures[row // times]
        alone = llama.inputs([text], own)
        answer = sequence[None, batch["input_ids"].shape[1] :]
        alone["input_ids"] = torch.cat([alone["input_ids"], answer], dim=1)
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        expected = llama.logits(alone)[0, -6:-1]
        if "beam_indices" in outputs:
            steps = [step[beam] for step, beam in zip(outputs.logits, outputs.beam_indices[row])]
        else:
            steps = [step[row] for step in outputs.logits]
        torch.testing.assert_close(torch.stack(steps), expected, rtol=1e-4, atol=1e-4)


def test_pictures_are_encoded_once(llama):
    """The tower runs once for an answer, and each layer projects the pictures' keys once."""
    calls = {"tower": 0, "keys": 0}
    keys = [module for name, module in llama.model.fusion.named_modules() if name.endswith("k_proj")]
    hooks = [llama.model.vision_tower.register_forward_hook(lambda *_: calls.update(tower=calls["tower"] + 1))]
    hooks += [module.register_forward_hook(lambda *_: calls.update(keys=calls["keys"] + 1)) for module in keys]
    llama.generate(llama.one_picture(), num_beams=2)
    for hook in hooks:
        hook.remove()
    assert calls == {"tower": 1, "keys": len(keys)}


def test_other_ways_to_generate(llama):
    inputs = llama.inputs(["w1 <image> w2 <image> w3"], [picture(0), picture(1)])
    expected = llama.generate(inputs)
    assert torch.equal(llama.generate(inputs, prefill_chunk_size=2), expected)
    assert torch.equal(llama.generate(inputs, cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(llama.generate(inputs, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(llama.generate(inputs, assistant_model=llama.model), expected)
    images = llama.image_inputs(inputs)
    with torch.no_grad():
        encoded = {"image": llama.model.get_image_features(**images)}
    text = {name: value for name, value in inputs.items() if name not in images}
    assert torch.equal(llama.generate({**text, "mm_encoder_outputs": encoded}), expected)
    embeddings = llama.model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = llama.model.generate(
        inputs_embeds=embeddings,
        attention_mask=inputs["attention_mask"],
        **images,
        max_new_tokens=llama.new_tokens,
        min_new_tokens=llama.new_tokens,
        do_sample=False,
    )
    assert torch.equal(found, expected)


def test_a_conversation_goes_on_with_its_cache(llama):
    """The second turn brings another picture; only its tokens are run."""
    generation = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    first = llama.inputs(["w1 <image> w2"], [picture(0)])
    outputs = llama.model.generate(**first, generation_config=generation)
    second = llama.inputs(["w5 <image> w6"], [picture(1)])
    ids = torch.cat([outputs.sequences, second["input_ids"]], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    expected = llama.generate(inputs)
    assert torch.equal(llama.generate({**inputs, "past_key_values": outputs.past_key_values}), expected)


def test_a_decoding_loop_of_ones_own(llama):
    model, inputs = llama.model, llama.one_picture()
    expected = llama.generate(inputs)[0].tolist()
    with torch.no_grad():
        states = model.encode_pictures(**inputs)
        output = model(input_ids=inputs["input_ids"], picture_states=states, use_cache=True)
        length, found = inputs["input_ids"].shape[1], []
        with pytest.raises(ValueError, match=r"picture_states=states.window"):
            model(input_ids=inputs["input_ids"][:, -1:], past_key_values=copy.deepcopy(output.past_key_values))
        with pytest.raises(ValueError, match=r"for \(1, 6\) tokens"):
            model(input_ids=inputs["input_ids"][:, -1:], picture_states=states)
        for step in range(llama.new_tokens):
            scores = output.logits[0, -1].clone()
            scores[[model.config.image_token_id, model.generation_config.eos_token_id]] = -float("inf")
            found.append(int(scores.argmax()))
            output = model(
                input_ids=torch.tensor([[found[-1]]]),
                past_key_values=output.past_key_values,
                picture_states=states.window(length + step, 1),
            )
    assert found == expected


def test_pictures_and_placeholders_must_agree(llama):
    inputs = llama.inputs(["w1 <image> w2"], [picture(0)])
    more = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match="2 pictures came with a text that has 1 image tokens"):
        llama.model(input_ids=inputs["input_ids"], pixel_values=more)
    with pytest.raises(ValueError, match="no pixel_values came with it"):
        llama.model(input_ids=inputs["input_ids"])


def test_forwards_before_a_backward_keep_their_own_pictures():
    """With checkpointing the layers run again in the backward pass, long after another batch has run."""
    tester = ComposedModelTester(fusion=CROSS)
    model = tester.model
    batches = [tester.one_picture(seed) for seed in (0, 1)]
    batches.append(tester.inputs(["w1 w2 w3"], []))

    def gradients(checkpointing: bool, at_once: bool):
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = []
        for batch in batches:
            losses.append(model(**batch, labels=batch["input_ids"], use_cache=False).loss)
            if not at_once:
                losses.pop().backward()
        if at_once:
            sum(losses).backward()
        model.gradient_checkpointing_disable()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(checkpointing=False, at_once=False)
    found = gradients(checkpointing=True, at_once=True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_a_layer_that_is_checkpointed_whole_sees_its_pictures_again():
    """Some families, and all of them before transformers 5.22, checkpoint the call of a layer with its hooks."""
    tester = ComposedModelTester(fusion=CROSS)
    model, inputs = tester.model.train(), tester.one_picture()

    def gradient():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return model.multi_modal_projector.output_layer.weight.grad.clone()

    expected = gradient()
    model.gradient_checkpointing_enable()
    function = model.language_model.model.layers[0]._gradient_checkpointing_func
    model.gradient_checkpointing_disable()
    layers = model.language_model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = _Whole(layer, function)
        layers[index]._forward_pre_hooks = torch.nn.Module()._forward_pre_hooks
    assert torch.allclose(gradient(), expected, atol=1e-7)
    assert expected.abs().sum() > 0


class _Whole(torch.nn.Module):
    def __init__(self, layer, checkpoint):
        super().__init__()
        self.layer, self.checkpoint = layer, checkpoint

    def forward(self, hidden_states, **kwargs):
        return self.checkpoint(lambda states: self.layer(states, **kwargs), hidden_states)


def test_reentrant_checkpointing_is_refused():
    model, _ = compose(fusion=CROSS)
    with pytest.raises(ValueError, match="not reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_threads_do_not_share_pictures():
    tester = ComposedModelTester(fusion=CROSS)
    batches = [tester.one_picture(seed) for seed in range(3)] + [tester.inputs(["w1 w2 w3 w4"], [])]
    expected = [tester.logits(batch) for batch in batches]
    found: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(batches))}

    def run(index: int) -> None:
        for _ in range(5):
            found[index].append(tester.logits(batches[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in found.items():
        assert len(results) == 5 and all(torch.equal(result, expected[index]) for result in results)


def test_an_error_leaves_no_pictures_behind():
    tester = ComposedModelTester(fusion=CROSS)
    text = tester.inputs(["w1 w2 w3 w4"], [])
    expected = tester.logits(text)

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = tester.model.language_model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        tester.logits(tester.one_picture())
    handle.remove()
    assert torch.equal(tester.logits(text), expected)


def test_copies_use_their_own_layers():
    tester = ComposedModelTester(fusion=CROSS)
    inputs = tester.one_picture()
    before = tester.logits(inputs)
    other = copy.deepcopy(tester.model)
    set_gates(other.fusion, 0.1)
    assert torch.equal(tester.logits(inputs), before)
    with torch.no_grad():
        assert (other(**inputs).logits - before).abs().max() > 1e-3
    assert torch.equal(tester.logits(inputs), before)


def test_an_exchanged_language_model_is_noticed():
    tester = ComposedModelTester(fusion=CROSS)
    tester.model.language_model = tester.bare_language_model
    tester.model.resize_token_embeddings(len(tester.processor.tokenizer))
    with pytest.raises(RuntimeError, match=r"before decoder layers \[0\] did not run"):
        tester.logits(tester.one_picture())
    tester.model.attach_fusion()
    assert torch.isfinite(tester.logits(tester.one_picture())).all()


def test_the_language_model_keeps_its_names():
    plain, _ = compose()
    fused, _ = compose(fusion=CROSS)
    names = {name for name in fused.state_dict() if not name.startswith("fusion.")}
    assert names == set(plain.state_dict())


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_training_makes_pictures_count(fusion):
    """From the start that composing gives: gates get gradients, and after some steps the answer follows the picture."""
    tester = ComposedModelTester(fusion=fusion)
    model = tester.model
    start, _ = compose(fusion=fusion)
    model.fusion.load_state_dict({k: v for k, v in start.fusion.state_dict().items() if "gate" in k}, strict=False)
    batch = tester.inputs(["w1 <image> w2 w3", "w1 <image> w2 w4"], [[picture(0)], [picture(1)]])
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100
    model.language_model.requires_grad_(False)
    model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(80):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        if step == 0:
            first = float(loss.detach())
            gates = [p.grad.abs().sum() for name, p in model.fusion.named_parameters() if "gate." in name]
            assert gates and all(gradient > 0 for gradient in gates)
        optimizer.step()
    assert 3 * loss < first
    with torch.no_grad():
        swapped = model(**{**batch, "pixel_values": batch["pixel_values"].flip(0)}, labels=labels).loss
    assert swapped > loss + 1


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_bfloat16(fusion):
    model, processor = compose(fusion=fusion, dtype=torch.bfloat16)
    set_gates(model.fusion, 0.7)
    inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
    other = processor(text=["w1 <image> w2"], images=[picture(1)], return_tensors="pt")
    with torch.no_grad():
        first, second = model(**inputs).logits, model(**other).logits
    assert first.dtype == torch.bfloat16 and torch.isfinite(first).all()
    assert not torch.equal(first[:, -1], second[:, -1])


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ("flamingo", "Unknown fusion 'flamingo'"),
        ({"type": "embed", "every": 2}, "takes no arguments"),
        ({"type": "cross_attention", "evry": 2}, "evry"),
        ({"type": "cross_attention", "every": 0}, "names none"),
        ({"type": "cross_attention", "see": "none"}, "see='none' is not known"),
        ({"type": "cross_attention", "num_heads": 5}, "does not divide"),
        ({"type": "cross_attention", "mlp": "none"}, "mlp='none' is not known"),
        ({"type": "gated", "gate": "layer"}, "gate='layer' is not known"),
    ],
)
def test_what_cannot_be_built_is_refused(fusion, message):
    with pytest.raises(CompositionError, match=message):
        compose(fusion=fusion)


def test_a_language_model_without_a_list_of_layers_is_refused():
    with pytest.raises(CompositionError, match=r"get states of shape \(4, 2, 5, 32\).*fusion=\"gated\""):
        compose(text="gemma3n_text", fusion="cross_attention")
    compose(text="gemma3n_text", fusion="gated")


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"views": {"type": "tiles", "layout": "dynamic", "max_tiles": 4}},
        {"views": "slices", "projector": {"type": "resampler", "num_queries": 4}},
        {"projector": {"type": "pixel_shuffle", "scale_factor": 2}},
    ],
    ids=["tiles", "slices and resampler", "pixel shuffle"],
)
def test_any_views_and_projector(fusion, arguments, tmp_path):
    """A picture cut into views has one token in the text all the same."""
    tester = ComposedModelTester(fusion=fusion, **arguments)
    wide = picture(0, (40, 150))
    inputs = tester.inputs(["w1 <image> w2", "w3 <image> w4 <image>"], [[wide], [picture(1), wide]])
    assert inputs["input_ids"].shape == (2, 4)
    assert tester.processor._get_num_multimodal_tokens([(40, 150)])["num_image_tokens"] == [1]
    tester.check_picture_changes_logits()
    tester.check_padding()
    tester.check_gradients()
    tester.check_cached_generation_equals_uncached()
    tester.check_save_and_load(tmp_path, resize=False)


@pytest.mark.parametrize("fusion", ["cross_attention", "gated"])
def test_a_video_is_seen_as_a_picture_is(fusion):
    """It has one token in the text; another frame changes what comes after it."""
    tester = ComposedModelTester(fusion=fusion)
    videos = [[picture(seed) for seed in seeds] for seeds in ((0, 1, 2), (0, 3, 2))]
    first, second = (
        tester.processor(text=["w1 w2 <video> w3"], videos=[frames], return_tensors="pt") for frames in videos
    )
    assert first["input_ids"].shape == (1, 4)
    change = (tester.logits(first) - tester.logits(second))[0].abs().amax(-1)
    assert change[:2].max() < 1e-5 and change[2:].min() > 1e-3
    assert torch.equal(tester.generate(first), tester.generate(first, use_cache=False))
