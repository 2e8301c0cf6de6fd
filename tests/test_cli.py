"""The command line: help that teaches, one line on bad input, and a model that is composed and then asked."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
)
from video_files import write_video

from anyvlm import CompositionError, cli
from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native
from anyvlm.demo.parts import small_tokenizer


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `anyvlm …`."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_info.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny tower and a tiny language model, as they would come from the Hub."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModel.from_config(ViTConfig(**shape, image_size=16, patch_size=8)).save_pretrained(folder / "tower")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "tower")
    tokenizer = small_tokenizer()
    text_config = LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=128)
    AutoModelForCausalLM.from_config(text_config).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    return folder / "tower", folder / "language_model"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 10), "red").save(path)
    return path


@pytest.mark.parametrize("command", ["compose", "swap", "train", "merge", "convert", "generate", "demo", "check"])
def test_every_command_has_help_with_an_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: anyvlm {command}" in " ".join(out.split())
    assert "--debug" in out


def test_help_lists_the_commands_and_no_arguments_give_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in ("compose", "swap", "convert", "generate", "demo", "check"))
    _, out, err = run(capsys)
    assert "compose" in out + err and "Traceback" not in out + err


def test_the_command_line_itself_imports_nothing_heavy():
    # Without the package's own `__init__`, which registers with transformers and so imports it.
    code = (
        "import sys, types\n"
        "package = sys.modules['anyvlm'] = types.ModuleType('anyvlm')\n"
        f"package.__path__ = [{str(Path(cli.__file__).parent)!r}]\n"
        "import anyvlm.cli\n"
        "print([name for name in ('torch', 'transformers', 'sklearn', 'matplotlib') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_two_towers(capsys, parts, tmp_path):
    tower, language_model = parts
    arguments = [tower, language_model, "--vision", tower, "--vision-fusion", "token"]
    code, out, err = run(capsys, "check", *arguments)
    assert code == 0 and "FusedVisionTowers" in out, err
    code, out, err = run(capsys, "compose", *arguments, "--output", tmp_path / "vlm")
    assert code == 0 and "takes 8 tokens" in out, err
    config = json.loads((tmp_path / "vlm" / "config.json").read_text())["vision_config"]
    assert config["vision_fusion"] == "token" and {"tower_0", "tower_1"} <= config.keys()


def test_compose_then_generate(capsys, parts, picture, tmp_path):
    tower, language_model = parts
    checkpoint = tmp_path / "vlm"
    code, out, _ = run(
        capsys,
        "compose",
        tower,
        language_model,
        "--output",
        checkpoint,
        "--image-size",
        "16x32",
        "--dtype",
        "bfloat16",
    )
    assert code == 0
    assert "16x32 pixels takes 8 tokens" in out and "bfloat16" in out and f"Saved to {checkpoint}" in out
    saved = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert saved.dtype == torch.bfloat16
    for part in (saved.vision_tower, saved.multi_modal_projector, saved.language_model):
        assert f"{sum(parameter.numel() for parameter in part.parameters()):,}" in out

    question = ["generate", checkpoint, "--prompt", "Which digit?", "--max-new-tokens", 4]
    code, out, _ = run(capsys, *question, "--image", picture, "--image", picture)
    assert code == 0 and len(out.splitlines()) >= 1
    code, _, _ = run(capsys, *question)
    assert code == 0


def test_generate_sees_the_pictures(capsys, parts, picture, tmp_path, monkeypatch):
    checkpoint = tmp_path / "vlm"
    assert run(capsys, "compose", *parts, "--output", checkpoint)[0] == 0
    seen = {}

    def generate(self, *args, **inputs):
        seen.update(inputs)
        return torch.cat([inputs["input_ids"], torch.tensor([small_tokenizer().encode(" seven")])], dim=1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    code, out, _ = run(capsys, "generate", checkpoint, "-p", "Which digit?", "-i", picture, "-i", picture)
    assert (code, out) == (0, "seven\n")
    assert seen["pixel_values"].shape == (2, 3, 16, 16)
    assert seen["max_new_tokens"] == 128 and seen["do_sample"] is False


def test_generate_sees_the_videos(capsys, parts, picture, tmp_path, monkeypatch):
    checkpoint = tmp_path / "vlm"
    assert run(capsys, "compose", *parts, "--output", checkpoint)[0] == 0
    (tmp_path / "video.mp4").write_bytes(write_video())
    seen = {}

    def generate(self, *args, **inputs):
        seen.update(inputs)
        return torch.cat([inputs["input_ids"], torch.tensor([small_tokenizer().encode(" seven")])], dim=1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    video = ("-v", tmp_path / "video.mp4")
    code, out, err = run(
        capsys, "generate", checkpoint, "-p", "What?", *video, "-i", picture, *video, "--num-frames", 3
    )
    assert (code, out) == (0, "seven\n"), err
    assert seen["num_video_frames"].tolist() == [0, 3, 3]
    assert seen["pixel_values"].shape == (7, 3, 16, 16)


def bad_inputs(parts, tmp_path):
    """Name -> (arguments, exit code, words that the message must have)."""
    tower, language_model = parts
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file.txt").write_text("something")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken_config").mkdir()
    (tmp_path / "broken_config" / "config.json").write_text("{")
    output = ["--output", tmp_path / "new"]
    return {
        "no such command": (["paint"], 2, "paint"),
        "no text": (["compose", tower, *output], 2, "text"),
        "no output": (["compose", tower, language_model], 2, "--output"),
        "no such tower": (["compose", tmp_path / "nothing", language_model, *output], 1, "nothing is no folder"),
        "no such Hub id": (["compose", tower, "nobody/nothing", *output], 1, "nobody/nothing is no folder"),
        "two language models": (["compose", language_model, language_model, *output], 1, "vision tower"),
        "two towers": (["compose", tower, tower, *output], 1, "causal language model"),
        "broken config": (["compose", tmp_path / "broken_config", language_model, *output], 1, "broken_config"),
        "size": (["compose", tower, language_model, *output, "--image-size", "big"], 2, "32x64"),
        "zero size": (["compose", tower, language_model, *output, "--image-size", "0"], 2, "32x64"),
        "projector": (["compose", tower, language_model, *output, "--projector", "magic"], 1, "mlp"),
        "projector's JSON": (["compose", tower, language_model, *output, "--projector", "{mlp}"], 2, "JSON"),
        "image attention": (
            ["compose", tower, language_model, *output, "--image-attention", "both"],
            1,
            "Unknown image_attention 'both'",
        ),
        "views": (["compose", tower, language_model, *output, "--views", "mosaic"], 1, "Unknown views 'mosaic'"),
        "views' JSON": (["compose", tower, language_model, *output, "--views", "{tiles}"], 2, "JSON"),
        "projector's argument": (
            ["compose", tower, language_model, *output, "--projector", '{"type": "mlp", "depth": 3}'],
            1,
            "depth",
        ),
        "dtype": (["compose", tower, language_model, *output, "--dtype", "int3"], 2, "bfloat16"),
        "output holds files": (["compose", tower, language_model, "-o", tmp_path / "full"], 2, "--overwrite"),
        "output is a file": (["compose", tower, language_model, "-o", tmp_path / "broken.png"], 2, "is a file"),
        "check's tower": (["check", tmp_path / "nothing", language_model], 1, "nothing is no folder"),
        "check's type": (["check", tower, "lama"], 1, "nearest: llama"),
        "check's size": (["check", tower, language_model, "--image-size", "0"], 2, "32x64"),
        "check's projector": (["check", tower, language_model, "--projector", "magic"], 1, "mlp"),
        "no such picture": (["generate", tower, "-p", "What?", "-i", tmp_path / "nothing.png"], 2, "does not exist"),
        "not composed": (["generate", tower, "-p", "What?"], 1, "'vit'"),
        "no such checkpoint": (["generate", tmp_path / "nothing", "-p", "What?"], 1, "nothing"),
        "demo's size": (["demo", "--size", "huge", *output], 2, "quick"),
        "demo's folder": (["demo", "--output", tmp_path / "full"], 1, "file.txt"),
        "demo's tower": (["demo", "--vision", language_model, *output], 1, "vision tower"),
    }


def test_bad_input_gives_one_line(capsys, parts, tmp_path):
    for name, (arguments, expected_code, words) in bad_inputs(parts, tmp_path).items():
        code, out, err = run(capsys, *arguments)
        assert code == expected_code, f"{name}: exit code {code}, {err}"
        assert err.startswith("anyvlm: error: ") and err.count("\n") == 1, f"{name}: {err}"
        assert words.lower() in err.lower(), f"{name}: {err}"
        assert out == "", name
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file.txt"]


def test_a_damaged_picture_gives_one_line(capsys, parts, tmp_path):
    checkpoint, picture = tmp_path / "vlm", tmp_path / "broken.png"
    picture.write_bytes(b"no picture")
    run(capsys, "compose", *parts, "--output", checkpoint)
    code, out, err = run(capsys, "generate", checkpoint, "-p", "What?", "-i", picture)
    assert (code, out) == (1, "")
    assert "broken.png is not a picture" in err and err.count("\n") == 1


def test_damaged_weights_give_one_line(capsys, parts, tmp_path):
    checkpoint = tmp_path / "vlm"
    run(capsys, "compose", *parts, "--output", checkpoint)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, out, err = run(capsys, "generate", checkpoint, "-p", "What?")
    assert (code, out) == (1, "")
    assert err.startswith("anyvlm: error: ") and err.count("\n") == 1


def test_overwrite_allows_a_folder_with_files(capsys, parts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(capsys, "compose", *parts, "--output", tmp_path, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "anyvlm"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_debug_shows_the_traceback(parts, tmp_path):
    tower, _ = parts
    with pytest.raises(CompositionError):
        cli.main(["compose", str(tower), str(tower), "--output", str(tmp_path / "vlm"), "--debug"])


class TestCheck:
    def test_a_pair_that_works_exits_with_0(self, capsys, parts):
        tower, language_model = parts
        code, out, err = run(capsys, "check", tower, language_model)
        assert code == 0 and err == ""
        lines = {line.split(":")[0]: line for line in out.splitlines()}
        assert lines["works"].split() == ["works:", "yes"]
        assert "ViTModel" in lines["vision tower"] and "LlamaForCausalLM" in lines["language model"]
        assert "16x16 pixels: 4 tokens (2x2)" in lines["picture"]

    def test_json_has_everything(self, capsys, parts):
        code, out, _ = run(capsys, "check", *parts, "--json", "--image-size", "16x32", "--dtype", "bfloat16")
        report = json.loads(out)
        assert code == 0 and report["works"] is True
        assert (report["image_size"], report["tokens_per_picture"], report["dtype"]) == ([16, 32], 8, "bfloat16")

    def test_settings_are_those_of_compose(self, capsys, parts):
        views = '{"type": "tiles", "layout": "dynamic", "max_tiles": 4}'
        settings = ["--views", views, "--fusion", '{"type": "cross_attention", "every": 1}']
        code, out, _ = run(capsys, "check", *parts, "--json", *settings)
        report = json.loads(out)
        assert code == 0 and (report["fusion"], report["image_views"]["max_tiles"]) == ("cross_attention", 4)
        code, out, _ = run(capsys, "check", *parts, "--views", views)
        assert code == 0 and "2000x500 pixels: 20 tokens" in out
        code, out, _ = run(capsys, "check", *parts, "--views", "native")
        assert code == 0 and "480x640 pixels: 972 tokens" in out
        code, _, err = run(capsys, "check", *parts, "--image-text", '{"begin": "<img>"}')
        assert code == 1 and "Unknown keys in image_text: begin" in err
        code, _, err = run(capsys, "check", *parts, "--image-text", "<img>")
        assert code == 2 and "no JSON object" in err
        code, _, err = run(capsys, "check", *parts, "--fusion", "gated", "--image-attention", "prefix")
        assert code == 1 and "nothing to act on" in err

    def test_a_pair_that_is_refused_exits_with_1_and_gives_the_reason(self, capsys, parts):
        tower, _ = parts
        code, out, err = run(capsys, "check", tower, "xlnet")
        assert code == 1 and err == ""
        assert out.splitlines()[0].split() == ["works:", "no"]
        assert "XLNetLMHeadModel is no causal decoder" in out and "nearest: " in out
        code, out, _ = run(capsys, "check", tower, "xlnet", "--json")
        assert code == 1 and json.loads(out)["works"] is False

    def test_model_types_stand_for_their_default_configs(self, capsys):
        code, out, _ = run(capsys, "check", "dinov2", "gpt2")
        assert code == 0 and "GPT2LMHeadModel, 124 M parameters" in out

    def test_it_fits_80_columns_on_a_terminal(self, capsys, parts, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = run(capsys, "check", *parts)
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out)
        assert code == 0 and plain != out
        assert max(map(len, plain.splitlines())) <= 80 and "…" not in plain.replace("tokenizer=…", "")


def test_the_demo_takes_a_pretrained_part(capsys, parts, tmp_path):
    tower, language_model = parts
    code, out, _ = run(
        capsys, "demo", "--text", language_model, "--size", "quick", "--steps", 2, "--output", tmp_path / "demo"
    )
    assert code == 0 and "the same answer to all" in out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["requested_parts"]["text"] == str(language_model)
    assert results["model"]["parts"]["language model"]["trained"] is True


def test_convert_takes_a_native_checkpoint_there_and_back(capsys, tmp_path):
    model, processor = build_native(native_cases("llava")[0], seed=0, tied=False)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "llava")
    code, out, _ = run(capsys, "convert", tmp_path / "llava", tmp_path / "ours", "--shard-size", "50KB")
    assert code == 0 and "AnyVlmForConditionalGeneration" in out
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    code, out, _ = run(capsys, "convert", tmp_path / "ours", tmp_path / "back", "--to-native")
    assert code == 0 and "LlavaForConditionalGeneration" in out
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, back[key]) for key, tensor in model.state_dict().items())


def test_convert_says_in_one_line_what_it_cannot_do(capsys, parts, tmp_path):
    tower, language_model = parts
    code, _, err = run(capsys, "convert", language_model, tmp_path / "ours")
    assert code == 1 and "'llama' is no family" in err and "llava" in err and err.count("\n") == 1
    code, _, err = run(capsys, "convert", tower, tmp_path / "ours", "--to-native")
    assert code == 1 and "not one of anyvlm" in err
    code, _, err = run(capsys, "convert", tower, tmp_path / "ours", "--shard-size", "much")
    assert code == 2 and "'much' is not a size" in err
    code, _, err = run(capsys, "convert", tower, tower)
    assert code == 1 and "not empty" in err
    assert not (tmp_path / "ours").exists()
