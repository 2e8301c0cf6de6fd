"""The Python of the README, run from top to bottom with tiny stand-ins for what would be downloaded."""

import json
import re
from pathlib import Path

from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native


README = Path(__file__).parents[1] / "README.md"
SIZE = {"height": 32, "width": 32}
#: Hub id -> model type and image processor of the stand-in.
TOWERS = {
    "facebook/dinov2-small": ("dinov2", CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)),
    "facebook/dinov2-base": ("dinov2", CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)),
    "google/siglip-base-patch16-224": ("siglip_vision_model", SiglipImageProcessorPil(size=SIZE)),
    "microsoft/resnet-50": ("resnet", CLIPImageProcessorPil(size=SIZE, crop_size=SIZE)),
    "google/siglip2-base-patch16-naflex": ("siglip2_vision_model", Siglip2ImageProcessorPil(patch_size=8)),
}


def stand_ins(folder: Path) -> dict[str, Path]:
    """Hub id -> folder of a tiny part."""
    folders = {name: folder / name for name in (*TOWERS, "HuggingFaceTB/SmolLM2-135M-Instruct")}
    for name, (model_type, image_processor) in TOWERS.items():
        AutoModel.from_config(tiny_configs.vision_config(model_type)).save_pretrained(folders[name])
        image_processor.save_pretrained(folders[name])
    text = folders["HuggingFaceTB/SmolLM2-135M-Instruct"]
    AutoModelForCausalLM.from_config(text_config("llama")).save_pretrained(text)
    tiny_tokenizer().save_pretrained(text)
    return folders


def test_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(0).save("cat.png")
    Path("photos").mkdir()
    for number in range(10):
        picture(number).save(f"photos/{number}.png")
    monkeypatch.setattr("anyvlm.swapping.fitting.DISTILLATION_SECONDS", 3.0)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    llava, llava_processor = build_native(native_cases("llava")[0], seed=0, tied=False)
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert "last 4 layers" in recipe
    Path("recipe.yaml").write_text(
        recipe.replace("last 4 layers", "last layer"), encoding="utf-8"
    )  # tiny towers have two
    turns = [{"from": "human", "value": "<image> w1"}, {"from": "gpt", "value": "w2"}]
    Path("data").mkdir()
    rows = [{"image": "../cat.png", "conversations": turns}] * 4
    Path("data/train.json").write_text(json.dumps(rows), encoding="utf-8")
    messages = [{"role": "user", "content": "<image> w1"}, {"role": "assistant", "content": "w2"}]
    names = {
        "anyvlm": anyvlm,
        "llava": llava,
        "llava_processor": llava_processor,
        "dataset": [{"messages": messages, "images": [picture(0)]}] * 2,
    }
    folders = stand_ins(tmp_path)
    for block in blocks:
        for name, folder in folders.items():
            block = block.replace(f'"{name}"', f'"{folder}"')
        exec(compile(block, str(README), "exec"), names)
    assert "tokens" in capsys.readouterr().out  # of check
    assert names["trainer"].state.global_step > 0
    assert AutoModelForCausalLM.from_pretrained("my-trained-vlm", trust_remote_code=True).num_parameters() > 0
    assert "| 2-all |" in Path("my-trained-vlm/summary.md").read_text(encoding="utf-8")
    assert type(names["native"]) is type(llava)
