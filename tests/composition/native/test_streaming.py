"""Checkpoints converted without loading them: the oracle is what `from_native` makes of the loaded model."""

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import compose, make_sensitive
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
)

import anyvlm
from anyvlm import CompositionError
from anyvlm.compatibility.native_cases import NativeCase, native_cases
from anyvlm.compatibility.native_cases.llava import TEXT, VISION, _processor
from anyvlm.compatibility.native_checks import build_native, case_chats
from anyvlm.composition.native import family_of
from anyvlm.composition.native.equality import compare_on_a_sample
from anyvlm.composition.native.streaming import convert_checkpoint
from anyvlm.publishing.fresh_process import run_in_fresh_process


LLAVA = native_cases("llava")[0]


def _with_experts(tied: bool) -> LlavaConfig:
    """On disk each expert has tensors of its own; in the model they are one."""
    text_config = MixtralConfig(**TEXT, vocab_size=91, num_local_experts=4, tie_word_embeddings=tied)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text_config,
        image_token_index=90,
        tie_word_embeddings=tied,
    )


EXPERTS = NativeCase("llava, experts", _with_experts, _processor)


@pytest.fixture
def source(tmp_path):
    """Native model, its processor, and the folder with its checkpoint in many files."""
    model, processor = build_native(LLAVA, seed=0, tied=False)
    return model, processor, _save(model, processor, tmp_path / "source")


def _save(model, processor, folder):
    model.save_pretrained(folder, max_shard_size="30KB")
    # Stand-ins lack what their class would save.
    with contextlib.suppress(AttributeError):
        processor.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


def _plain(config) -> dict:
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "auto_map")}


@pytest.mark.parametrize(
    ("case", "tied"),
    [(LLAVA, False), (EXPERTS, False), *((case, case.ties[-1]) for case in [*native_cases(), EXPERTS])],
    ids=lambda value: str(value) if isinstance(value, NativeCase) else "tied" if value else "untied",
)
def test_a_converted_checkpoint_is_what_from_native_makes_and_comes_back(case, tied, tmp_path):
    native, processor = build_native(case, seed=0, tied=tied)
    weights = {key: tensor.clone() for key, tensor in native.state_dict().items()}
    folder = _save(native, processor, tmp_path / "source")
    missing = family_of(native.config).missing_packages()
    if missing:
        with pytest.raises(CompositionError, match=f"only where {' and '.join(missing)} are installed"):
            convert_checkpoint(folder, tmp_path / "ours")
    # Without torchvision the cases have stand-ins for what cannot be loaded.
    made_of = (type(processor).__module__, type(processor.image_processor).__module__)
    loads = not missing and all(module.startswith("transformers.") for module in made_of)
    assert (
        convert_checkpoint(folder, tmp_path / "ours", processor=None if loads else processor)
        == "AnyVlmForConditionalGeneration"
    )
    expected, expected_processor = anyvlm.from_native(native, processor)
    found, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert _plain(found.config) == _plain(expected.config)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in expected.state_dict().items())
    if not loads:
        return
    found_processor = AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert found_processor.to_dict() == expected_processor.to_dict()

    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to_native=True)
    back, info = type(native).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in weights.items())


def test_keys_of_old_checkpoints_are_renamed_as_transformers_does(source, tmp_path):
    """Those of llava-hf's checkpoints: the language model whole, the tower inside a `vision_model`."""
    model, _, folder = source
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    old = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower.vision_model."
        )
        key = key.replace("model.multi_modal_projector.", "multi_modal_projector.")
        old["language_model.lm_head.weight" if key == "lm_head.weight" else key] = tensor.contiguous()
    # A buffer that was saved once; loading does not mind it, and neither does this.
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    assert all(
        torch.equal(tensor, LlavaForConditionalGeneration.from_pretrained(folder).state_dict()[key])
        for key, tensor in model.state_dict().items()
    )
    convert_checkpoint(folder, tmp_path / "ours")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True).state_dict()
    expected = anyvlm.from_native(*source[:2])[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_result_loads_where_anyvlm_is_not_and_gives_the_native_logits(source, tmp_path):
    model, processor, folder = source
    convert_checkpoint(folder, tmp_path / "ours")
    _, pictures = case_chats(LLAVA)["one image"]
    arguments = {"text": ["w1 <image> w2"], "images": [[torch.from_numpy(np.array(pictures[0][0])).permute(2, 0, 1)]]}
    inputs = processor(**arguments, return_tensors="pt")
    saved = {"processor_arguments": arguments, "logits": model(**inputs).logits.detach()}
    saved["generated"] = model.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[90])
    torch.save(saved, tmp_path / "answers")
    script = Path(__file__).parents[2] / "fresh_load.py"
    process = run_in_fresh_process(script, tmp_path / "ours", tmp_path / "answers", tmp_path / "copy")
    result = json.loads(process.stdout.splitlines()[-1])
    assert set(result["differences"].values()) == {0.0}
    assert all(result["generation_equal"].values())


def test_weights_keep_their_dtype(source, tmp_path):
    model, processor, _ = source
    folder = _save(model.to(torch.bfloat16), processor, tmp_path / "bfloat16")
    convert_checkpoint(folder, tmp_path / "ours")
    dtypes = {t.dtype for path in (tmp_path / "ours").glob("*.safetensors") for t in load_file(path).values()}
    assert dtypes == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.extra.weight": torch.zeros(2)}, "1 weights are left over.*model.extra.weight"),
        ({"model.multi_modal_projector.linear_2.bias": None}, "missing: model.multi_modal_projector.linear_2.bias"),
        ({"lm_head.weight": torch.zeros(90, 48)}, r"another shape.*lm_head.weight \(90, 48\) for \(91, 48\)"),
    ],
    ids=["left over", "missing", "shape"],
)
def test_a_weight_that_is_left_over_or_missing_is_named_and_nothing_is_written(source, tmp_path, change, named):
    model, _, folder = source
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    weights = {**model.state_dict(), **change}
    save_file({key: t.contiguous() for key, t in weights.items() if t is not None}, folder / "model.safetensors")
    with pytest.raises(CompositionError, match=named):
        convert_checkpoint(folder, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_checkpoint_without_a_processor_is_refused(tmp_path):
    """transformers lists none for FastVLM, and gives its tokenizer where no file names one."""
    case = next(case for case in native_cases("llava") if case.name.startswith("fast_vlm"))
    folder = _save(*build_native(case, seed=0, tied=False), tmp_path / "source")
    (folder / "processor_config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "processor_class": None}))
    with pytest.raises(CompositionError, match="no processor of pictures with text"):
        convert_checkpoint(folder, tmp_path / "ours")


def test_interrupting_leaves_nothing_half_written(source, tmp_path):
    def interrupt(done, total, what):
        if total and done > total / 2:
            raise KeyboardInterrupt

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "kept").write_text("as it was")
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source[2], tmp_path / "ours", overwrite=True, on_progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["kept"]
    convert_checkpoint(source[2], tmp_path / "ours", overwrite=True)
    assert not (tmp_path / "ours" / "kept").exists()
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(source[2], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_files_are_as_large_as_asked_for(source, tmp_path):
    limits = {"default": None, "given": 60_000, "one": 10**9}
    for name, size in limits.items():
        convert_checkpoint(source[2], tmp_path / name, max_shard_size=size)
    files = {name: [path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")] for name in limits}
    largest = max(path.stat().st_size for path in source[2].glob("*.safetensors"))
    header = 4000
    assert max(files["default"]) <= largest + header
    assert max(files["given"]) <= 60_000 + header and len(files["given"]) < len(files["default"])
    assert len(files["one"]) == 1 and not (tmp_path / "one" / "model.safetensors.index.json").exists()


_MEASURE = """
import resource, sys
from pathlib import Path
from transformers.utils import logging
logging.set_verbosity_error()
from anyvlm.composition.native import family_of
from anyvlm.composition.native.equality import compare_on_a_sample
from anyvlm.composition.native.streaming import convert_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
convert_checkpoint(sys.argv[1], sys.argv[1] + "-warm")
before = peak()
for source in sys.argv[2:]:
    convert_checkpoint(source, source + "-converted", max_shard_size=8_000_000)
print(peak() - before)
"""


def test_memory_is_that_of_one_file_and_not_of_the_model(source, tmp_path):
    """160 MB, in files of 8 MB and in one; everything else that a process needs is taken by a conversion before."""
    large = copy.deepcopy(source[0].config)
    large.text_config.num_hidden_layers, large.text_config.intermediate_size = 12, 23_000
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(large)
    model.to_empty(device="cpu")
    for name, size in (("large", "8MB"), ("one-file", "1GB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        source[1].save_pretrained(tmp_path / name)
    files = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert sum(files) > 150e6 and len(files) > 20
    command = [sys.executable, "-c", _MEASURE, source[2], tmp_path / "large", tmp_path / "one-file"]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(output.stdout.split()[-1]) < 4 * max(files)


@pytest.mark.parametrize(
    ("vision", "text", "settings", "refusal"),
    [
        ("clip_vision_model", "llama", {"vision_feature_layer": -2}, None),
        ("clip_vision_model", "mixtral", {"vision_feature_layer": [-2, -1], "image_token": "w7"}, None),
        ("dinov2", "qwen2", {"vision_feature_layer": 1, "image_size": 48}, None),
        ("siglip_vision_model", "llama", {"vision_feature_select_strategy": "full"}, "small copies differ by"),
        ("clip_vision_model", "gemma2", {}, "does not scale or cap logits"),
        ("dinov2_with_registers", "llama", {}, r"not \(3, 0\)"),
    ],
)
def test_a_composed_checkpoint_becomes_native_or_is_refused_without_loading_it(
    vision, text, settings, refusal, tmp_path
):
    model, processor = compose(vision, text, **settings)
    make_sensitive(model)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ours")
    if refusal:
        with pytest.raises(CompositionError, match=f"LlavaForConditionalGeneration: [^;]*{refusal}"):
            convert_checkpoint(tmp_path / "ours", tmp_path / "native", to_native=True)
        assert not (tmp_path / "native").exists()
        return
    convert_checkpoint(tmp_path / "ours", tmp_path / "native", to_native=True)
    native = LlavaForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
    native_processor = AutoProcessor.from_pretrained(tmp_path / "native")
    compare_on_a_sample(family_of(native.config), native, native_processor, model, processor)
