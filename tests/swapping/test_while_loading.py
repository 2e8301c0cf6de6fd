"""`from_pretrained(path, vision_tower=…, language_model=…)`: as `anyvlm.swap` does it, and not without the package."""

import pytest
import torch
from tiny_parts import compose, text_config, tiny_tokenizer, vision_config
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

import anyvlm
from anyvlm.publishing.fresh_process import run_in_fresh_process


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A composed checkpoint, and those of a tower and a language model that it does not have."""
    root = tmp_path_factory.mktemp("parts")
    model, processor = compose("clip_vision_model", "llama")
    model.save_pretrained(root / "composed")
    processor.save_pretrained(root / "composed")
    AutoModel.from_config(vision_config("siglip_vision_model")).save_pretrained(root / "tower")
    AutoModelForCausalLM.from_config(text_config("qwen3")).save_pretrained(root / "text")
    tiny_tokenizer().save_pretrained(root / "text")
    return root


@pytest.mark.parametrize(
    ("argument", "name", "folder"), [("vision_tower", "vision", "tower"), ("language_model", "text", "text")]
)
def test_is_the_swap(folders, argument, name, folder):
    part = str(folders / folder)
    loaded = AutoModelForCausalLM.from_pretrained(folders / "composed", trust_remote_code=True, **{argument: part})
    loaded_processor = AutoProcessor.from_pretrained(folders / "composed", trust_remote_code=True, **{argument: part})
    model = AutoModelForCausalLM.from_pretrained(folders / "composed")
    processor = AutoProcessor.from_pretrained(folders / "composed")
    swapped, swapped_processor, _ = anyvlm.swap(model, processor, **{name: part})
    assert type(getattr(loaded, argument)) is not type(getattr(model, argument))
    assert loaded.state_dict().keys() == swapped.state_dict().keys()
    assert all(torch.equal(tensor, swapped.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.to_dict() == swapped.config.to_dict()
    assert loaded_processor.to_dict() == swapped_processor.to_dict()


def test_processor_is_made_anew_where_the_model_was_not_loaded_before(folders):
    tower = AutoModel.from_pretrained(folders / "tower")
    processor = AutoProcessor.from_pretrained(folders / "composed", vision_tower=tower)
    assert processor.vision_tower_spec["num_prefix_tokens"] == 0  # siglip has no class token, clip has


def test_without_arguments_nothing_is_exchanged(folders):
    loaded = AutoModelForCausalLM.from_pretrained(folders / "composed", vision_tower=None)
    assert type(loaded.vision_tower).__name__ == "CLIPVisionModel"


def test_a_part_that_is_not_there_is_an_error(folders):
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(folders / "composed", vision_tower=str(folders / "nowhere"))


def test_without_the_package_it_says_what_to_install(folders, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(
        "from transformers import AutoModelForCausalLM as Model\n"
        "try:\n"
        f"    Model.from_pretrained({str(folders / 'composed')!r}, trust_remote_code=True, vision_tower='x')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "Install anyvlm" in run_in_fresh_process(script).stdout
