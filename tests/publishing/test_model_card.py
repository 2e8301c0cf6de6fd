"""The model card: what it says is true of the checkpoint, and what is not known is said to be unknown."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from anyvlm.publishing.errors import PublishingError
from anyvlm.publishing.fresh_process import run_in_fresh_process
from anyvlm.publishing.model_card import (
    build_model_card,
    common_license,
    is_hand_written,
    read_parts,
    read_results,
    readable_count,
)


def set_origins(checkpoint, vision: dict | None, text: dict | None) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["composed_from"] = {"vision": vision, "text": text}
    path.write_text(json.dumps(config))


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_parts_are_counted_without_loading_them(composed, whole_checkpoint):
    model, _ = composed
    parts = {part.title: part for part in read_parts(whole_checkpoint)}
    for title, module in (
        ("Vision tower", model.vision_tower),
        ("Projector", model.multi_modal_projector),
        ("Language model", model.language_model),
    ):
        assert parts[title].parameters == sum(parameter.numel() for parameter in module.parameters())
        assert parts[title].dtypes == ("F32",)
    assert list(parts) == ["Vision tower", "Projector", "Language model"]
    assert [part.model_type for part in parts.values()] == ["clip_vision_model", "mlp", "llama"]


def test_sharded_weights_are_counted_too(composed, checkpoint):
    whole = sum(part.parameters for part in read_parts(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    composed[0].save_pretrained(checkpoint, max_shard_size="60KB")
    assert sum(part.parameters for part in read_parts(checkpoint)) == whole > 0


def test_card_of_a_checkpoint(composed, whole_checkpoint, fresh_check):
    card = build_model_card(whole_checkpoint, "me/my-vlm", fresh_check)
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert set(data.tags) == {"anyvlm", "custom_code"}
    assert data.base_model == ["someone/tower", "someone-else/language-model"]
    assert "# my-vlm" in card.text
    assert f"| Parameters | {readable_count(composed[0].num_parameters())} |" in card.text
    assert "| Tokens per picture | 16 |" in card.text and "32 x 32 pixels" in card.text
    assert "| Stored as | F32 |" in card.text and f"anyvlm {composed[0].config.code_version}" in card.text
    checked = section(card, "How it was checked")
    assert all(version in checked for version in ("3.99.1", "9.1.0", "8.2.0")) and "`AutoModel`" in checked
    assert "256 positions, of which one picture took 16" in section(card, "Limitations")
    assert "## Results" not in card.text


def test_what_was_not_checked_is_not_claimed(whole_checkpoint, fresh_check):
    quick = dataclasses.replace(fresh_check, saved_again=False, classes=("AutoModelForCausalLM",))
    checked = section(build_model_card(whole_checkpoint, "me/m", quick), "How it was checked")
    assert "was not checked" in checked and "Every class" not in checked
    full = section(build_model_card(whole_checkpoint, "me/m", fresh_check), "How it was checked")
    assert "was not checked" not in full and "Every class" in full


def test_pictures_that_take_different_numbers_of_tokens(whole_checkpoint, fresh_check):
    tiles = dataclasses.replace(fresh_check, image_tokens=((320, 240, 16), (1280, 720, 80)))
    text = build_model_card(whole_checkpoint, "me/m", tiles).text
    assert "16 for 320 x 240 pixels, 80 for 1280 x 720 pixels" in text
    assert "finer detail is lost" not in text


MIT, APACHE, OTHER = ({"id": "a/b", "license": name} for name in ("mit", "apache-2.0", "other"))


@pytest.mark.parametrize(
    ("vision", "text", "common"),
    [
        (MIT, MIT, "mit"),
        (MIT, APACHE, None),
        (MIT, {"id": "a/b", "license": None}, None),
        (OTHER, OTHER, None),  # two licences that are in no list need not be the same one
        (None, None, None),
    ],
)
def test_license_of_the_whole(checkpoint, fresh_check, vision, text, common):
    set_origins(checkpoint, vision, text)
    assert common_license(read_parts(checkpoint)) == common
    card = build_model_card(checkpoint, "me/m", fresh_check)
    assert card.data.license == (common or "other")
    licences = section(card, "Licence")
    for title, part in (("vision tower", vision), ("language model", text)):
        assert f"{title}: {(part or {}).get('license') or 'unknown'}" in licences
    assert ("not stated" in licences) == (common is None)
    assert build_model_card(checkpoint, "me/m", fresh_check, license="bsd-3-clause").data.license == "bsd-3-clause"


def test_unknown_origins_are_said_to_be_unknown(checkpoint, fresh_check):
    set_origins(checkpoint, None, None)
    card = build_model_card(checkpoint, "me/m", fresh_check)
    assert card.data.base_model is None
    assert card.text.count("| not recorded | unknown |") == 2


def test_results_only_as_given(whole_checkpoint, fresh_check, tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"VQAv2": {"accuracy": 0.625}}')
    card = build_model_card(whole_checkpoint, "me/m", fresh_check, results=read_results(file))
    assert "| VQAv2 | accuracy | 0.625 |" in section(card, "Results")
    assert "No evaluation results" not in card.text
    for wrong in (
        '{"VQAv2": 0.6}',
        '{"VQAv2": {}}',
        '{"VQAv2": {"accuracy": "good"}}',
        "[1]",
        "{",
        '{"a": {"b": NaN}}',
    ):
        file.write_text(wrong)
        with pytest.raises(PublishingError, match="results.json"):
            read_results(file)


def test_a_card_is_recognised_until_somebody_edits_it(whole_checkpoint, fresh_check, tmp_path):
    path = tmp_path / "README.md"
    build_model_card(whole_checkpoint, "me/m", fresh_check).save(path)
    assert not is_hand_written(path)
    generated = path.read_text()
    assert ModelCard.load(path).data.library_name == "transformers"
    for edited in (generated.replace("# m\n", "# My model\n"), generated + "More.\n", "# Mine\n"):
        assert edited != generated
        path.write_text(edited)
        assert is_hand_written(path)


def test_snippet_runs_as_it_stands(composed, whole_checkpoint, fresh_check, tmp_path):
    """In a fresh process, from the folder, it prints what the composed model answers here."""
    card = build_model_card(whole_checkpoint, "me/my-vlm", fresh_check, revision="v1")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert snippet.count('"me/my-vlm"') == 1 and snippet.count('revision="v1"') == 2
    script = tmp_path / "snippet.py"
    script.write_text(snippet.replace("me/my-vlm", str(whole_checkpoint)))
    printed = run_in_fresh_process(script).stdout

    model, processor = composed
    content = [
        {"type": "image", "image": Image.new("RGB", (640, 480), "orange")},
        {"type": "text", "text": "What is in this picture?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    answer = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert printed == f"{answer}\n" and len(answer.split()) > 3


def test_code_of_others_is_named(whole_checkpoint, remote_code_checkpoint, fresh_check, tmp_path):
    assert "Code of others" not in build_model_card(whole_checkpoint, "me/my-vlm", fresh_check).text
    checkpoint = shutil.copytree(remote_code_checkpoint, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["part_code"] |= {"origin": "someone/language-model", "revision": "0123abc"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    text = section(build_model_card(checkpoint, "me/my-vlm", fresh_check), "Code of others")
    assert "Language model: `language_model_code*.py`, copied from [someone/language-model]" in text
    assert "commit `0123abc`" in text and config["text_config"]["part_code"]["sha256"] in text
    assert "Vision tower: `vision_tower_code*.py`, copied from a place that is not recorded" in text
    assert "`tokenization_part.py`" in text and "`image_processing_part.py`" in text
    assert "anyvlm_checkpoint.py" not in text
