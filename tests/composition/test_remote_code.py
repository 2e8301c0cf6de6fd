"""Parts whose code is in their own checkpoint: allowed only when trusted, carried along, and the same wherever loaded.

The made-up parts of `tests/remote_parts` call their files alike, compute buffers that no checkpoint holds, and (the
language models) take arguments of the old kind.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_tester import ComposedModelTester, picture
from remote_checkpoints import (
    CHAT_GENERATION_CONFIG,
    load_reference,
    use_remote_image_processor,
    use_remote_tokenizer,
    write_remote_part,
)
from test_checkpoint import FRESH_LOAD, check_three_generations, load_in_fresh_process, save_with_answers
from tiny_parts import text_config, tiny_tokenizer, vision_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_relative_import_files

import anyvlm
from anyvlm.composition.remote_code import RemoteCode, find_remote_code, rewrite_part_code
from anyvlm.publishing.fresh_process import run_in_fresh_process
from anyvlm.publishing.static_checks import check_files


LANGUAGE_MODELS = ["old_style_lm", "scaled_lm"]
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Folder with the three made-up checkpoints. Tests that remove a source make their own."""
    folder = tmp_path_factory.mktemp("sources")
    for part in (*LANGUAGE_MODELS, "tower"):
        write_remote_part(folder / part, part)
    return folder


def compose_remote(folder: Path, language_model: str, tower: str = "tower", **arguments):
    return anyvlm.compose(
        vision=folder / tower, text=folder / language_model, image_size=32, trust_remote_code=True, **arguments
    )


class RemotePartTester(ComposedModelTester):
    """The shared checks, on parts with code of their own."""

    load_arguments = {"trust_remote_code": True}

    def __init__(self, folder: Path, language_model: str):
        self.new_tokens, self.picture_size = 6, (50, 40)
        self.bare_language_model = load_reference(folder / language_model, language_model)
        self.model, self.processor = compose_remote(folder, language_model)
        with torch.no_grad():  # so that a tiny model with random weights tells pictures apart
            self.model.multi_modal_projector.output_layer.weight.mul_(3)

    def check_loss_is_the_language_models_own(self) -> None:
        """Code of the old kind knows no `logits_to_keep`, so all logits are computed, and no `num_items_in_batch`."""
        inputs = self.inputs(["w1 w2 w3 w4 w5 w6", "w7 w8 w9"], [], padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            ours = self.model(**inputs, labels=labels)
            halved = self.model(**inputs, labels=labels, num_items_in_batch=torch.tensor(2 * count))
            expected = self.model.language_model(**inputs, labels=labels)
        torch.testing.assert_close(ours.loss, expected.loss)
        torch.testing.assert_close(halved.loss, expected.loss / 2)


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def tester(request, sources):
    return RemotePartTester(sources, request.param)


class TestPair:
    """The checks of every pair (`test_families.py`)."""

    def test_forward_is_finite(self, tester):
        tester.check_forward_is_finite()

    def test_picture_changes_logits(self, tester):
        tester.check_picture_changes_logits()

    def test_picture_order_matters(self, tester):
        tester.check_picture_order_matters()

    def test_gradients(self, tester):
        tester.check_gradients()

    def test_cached_generation_equals_uncached(self, tester):
        tester.check_cached_generation_equals_uncached()

    def test_padding(self, tester):
        tester.check_padding()

    def test_text_only_equals_bare_language_model(self, tester):
        tester.check_text_only_equals_bare_language_model()

    def test_text_generation_equals_bare_language_model(self, tester):
        inputs = tester.inputs(["w1 w2 w3"], [])
        generated = tester.generate(inputs)
        expected = tester.bare_language_model.generate(
            **inputs, max_new_tokens=tester.new_tokens, min_new_tokens=tester.new_tokens, do_sample=False
        )
        assert torch.equal(generated, expected[:, inputs["input_ids"].shape[1] :])

    def test_embeddings_equal_ids(self, tester):
        tester.check_embeddings_equal_ids()

    def test_loss_is_the_language_models_own(self, tester):
        tester.check_loss_is_the_language_models_own()

    def test_tower_is_the_bare_tower(self, tester, sources):
        pixel_values = tester.one_picture()["pixel_values"]
        with torch.no_grad():
            expected = load_reference(sources / "tower", "tower")(pixel_values).last_hidden_state
            features = tester.model.get_image_features(pixel_values).last_hidden_state
        assert torch.equal(features, expected[:, 1:])
        assert tester.model.config.vision_tower_spec["num_prefix_tokens"] == 1

    def test_save_and_load(self, tester, tmp_path):
        """Last: it resizes the tester's model."""
        tester.check_save_and_load(tmp_path)


def train(model, processor, steps: int = 3) -> None:
    inputs = processor(text=["w1 <image> w2 w3"], images=[[picture(3)]], return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]


def run_python(code: str, home: Path, *arguments, check: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run code in a new process with the package, with empty caches of Hugging Face in `home`."""
    paths = [str(Path(anyvlm.__file__).parents[1]), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        check=check,
    )


class TestCheckpoint:
    @pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
    def test_three_generations_without_the_package_and_the_source(self, tmp_path, language_model):
        source = tmp_path / "source"
        write_remote_part(source / "tower", "tower")
        write_remote_part(source / language_model, language_model)
        model, processor = compose_remote(source, language_model)
        train(model, processor)
        shutil.rmtree(source)
        check_three_generations(model, processor, tmp_path)

    @pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
    def test_bfloat16(self, tmp_path, sources, language_model):
        """The same is measured as in fp32, although the numbers are coarse; and loading is exact."""
        model, processor = compose_remote(sources, language_model, dtype="bfloat16")
        expected, _ = compose_remote(sources, language_model)
        assert model.config.language_model_spec == expected.config.language_model_spec
        assert model.config.language_model_spec["embedding_scale"] == (6.0 if language_model == "scaled_lm" else 1.0)
        check_three_generations(model, processor, tmp_path)

    def test_remote_tower_with_native_language_model(self, tmp_path, sources):
        model, processor = anyvlm.compose(
            vision=sources / "tower",
            text=text_config("qwen3"),
            tokenizer=tiny_tokenizer(),
            image_size=32,
            trust_remote_code=True,
        )
        check_three_generations(model, processor, tmp_path)

    def test_loaded_where_the_package_is_imported(self, tmp_path, sources):
        """Its classes win, the parts' code still comes from the checkpoint, and what is saved there is whole."""
        model, processor = compose_remote(sources, "old_style_lm")
        answers = save_with_answers(model, processor, tmp_path / "one")
        run_python(LOAD_WITH_PACKAGE, tmp_path / "home", tmp_path / "one", answers, tmp_path / "two")
        result = load_in_fresh_process(tmp_path / "two", answers, tmp_path / "three")
        assert set(result["differences"].values()) == {0.0}
        for name in code_names(tmp_path / "one"):
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()

    def test_trainer_checkpoints_carry_the_code(self, tmp_path, sources):
        model, processor = compose_remote(sources, "old_style_lm")
        before = model.language_model.transformer.wte.weight.detach().clone()
        content = [{"type": "image"}, {"type": "text", "text": "w1 w2"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "w3 w4"}]
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                tmp_path / "runs",
                max_steps=2,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=2,
                save_steps=2,
                remove_unused_columns=False,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=[{"messages": messages, "images": [picture(seed)]} for seed in range(4)],
            data_collator=anyvlm.AnyVlmDataCollator(processor),
            processing_class=processor,
        )
        trainer.train()
        assert not torch.equal(model.language_model.transformer.wte.weight, before)
        checkpoint = tmp_path / "runs" / "checkpoint-2"
        answers = save_with_answers(model.eval(), processor, tmp_path / "saved")
        result = load_in_fresh_process(checkpoint, answers, tmp_path / "copy")
        assert set(result["differences"].values()) == {0.0}
        assert code_names(checkpoint) == code_names(tmp_path / "saved") == code_names(tmp_path / "copy")

    def test_files_of_the_parts_do_not_collide(self, tmp_path, sources):
        model, _ = compose_remote(sources, "old_style_lm")
        model.save_pretrained(tmp_path)
        names = code_names(tmp_path)
        for file in ("configuration_part", "modeling_part", "functions"):
            assert {f"vision_tower_code_{file}.py", f"language_model_code_{file}.py"} <= names
        assert "gelu" in (tmp_path / "vision_tower_code_functions.py").read_text()
        assert "apply_rotary" in (tmp_path / "language_model_code_functions.py").read_text()
        assert model.language_model.chat("w1").startswith("<|im_start|>system")  # a late import

    def test_only_imports_of_the_code_are_changed(self, tmp_path, sources):
        model, _ = compose_remote(sources, "scaled_lm")
        model.save_pretrained(tmp_path)
        source = (sources / "scaled_lm" / "modeling_part.py").read_text()
        saved = (tmp_path / "language_model_code_modeling_part.py").read_text()
        assert saved == source.replace(
            "from .configuration_part import", "from .language_model_code_configuration_part import"
        )

    @pytest.mark.parametrize("first", ["model", "processor"])
    def test_order_of_saving_does_not_matter(self, tmp_path, sources, first):
        model, processor = compose_remote(sources, "old_style_lm")
        for saved in (model, processor) if first == "model" else (processor, model):
            saved.save_pretrained(tmp_path / "checkpoint")
        entry = tmp_path / "checkpoint" / "anyvlm_checkpoint.py"
        assert code_names(tmp_path / "checkpoint") == {
            entry.name, *(Path(file).name for file in get_relative_import_files(entry)),
        }  # fmt: skip
        check_files(tmp_path / "checkpoint")

    def test_code_of_another_model_is_removed(self, tmp_path, sources):
        compose_remote(sources, "old_style_lm")[0].save_pretrained(tmp_path)
        native, _ = anyvlm.compose(
            vision=vision_config("clip_vision_model"), text=text_config("llama"), tokenizer=tiny_tokenizer()
        )
        native.save_pretrained(tmp_path)
        assert not [name for name in code_names(tmp_path) if "_code_" in name]
        AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_generation_config_of_the_language_model_is_kept(self, tmp_path, sources):
        model, processor = compose_remote(sources, "old_style_lm")
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        for name in ("chat_format", "max_window_size", "top_p", "max_new_tokens", "do_sample", "eos_token_id"):
            assert getattr(loaded.generation_config, name) == CHAT_GENERATION_CONFIG[name]
        assert loaded.generation_config.bos_token_id is processor.tokenizer.bos_token is None

    def test_tokenizer_and_image_processor_with_code_of_their_own(self, tmp_path):
        """transformers carries their code; it must get along with ours."""
        source = tmp_path / "source"
        use_remote_tokenizer(write_remote_part(source / "old_style_lm", "old_style_lm"))
        use_remote_image_processor(write_remote_part(source / "tower", "tower"))
        model, processor = compose_remote(source, "old_style_lm")
        assert type(processor.tokenizer).__name__ == "PartTokenizer"
        assert type(processor.image_processor).__name__ == "PartImageProcessor"
        shutil.rmtree(source)
        check_three_generations(model, processor, tmp_path)
        check_files(tmp_path / "three")


class TestTrust:
    @pytest.mark.parametrize("part", ["old_style_lm", "tower"])
    def test_composing_without_trust_is_refused_and_runs_nothing(self, tmp_path, sources, part):
        mark = tmp_path / "mark"
        arguments = (sources / part, part, "untrusted")
        result = run_python(COMPOSE, tmp_path / "home", *arguments, REMOTE_PART_MARK=str(mark))
        assert "has code of its own" in result.stdout and "trust_remote_code=True" in result.stdout
        assert not mark.exists()
        run_python(COMPOSE, tmp_path / "home", sources / part, part, "trusted", REMOTE_PART_MARK=str(mark))
        assert mark.exists()

    def test_loading_without_trust_is_refused_and_runs_nothing(self, tmp_path, sources):
        """Where the package is imported, its own code needs no trust, but the parts' does."""
        model, processor = compose_remote(sources, "old_style_lm")
        model.save_pretrained(tmp_path / "checkpoint")
        processor.save_pretrained(tmp_path / "checkpoint")
        mark = tmp_path / "mark"
        result = run_python(LOAD_WITHOUT_TRUST, tmp_path / "home", tmp_path / "checkpoint", REMOTE_PART_MARK=str(mark))
        assert result.stdout.splitlines() == ["processor loaded", "config loaded 32", "refused"] * 2
        assert not mark.exists()

    def test_changed_code_is_not_run(self, tmp_path, sources):
        model, _ = compose_remote(sources, "old_style_lm")
        model.save_pretrained(tmp_path / "checkpoint")
        file = tmp_path / "checkpoint" / "language_model_code_functions.py"
        file.write_text(file.read_text() + "\n# changed\n")
        with pytest.raises(ValueError, match="are not the files that config.json was saved with"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", trust_remote_code=True)

    def test_config_that_was_not_trusted_is_not_saved_elsewhere(self, tmp_path, sources):
        model, _ = compose_remote(sources, "old_style_lm")
        model.save_pretrained(tmp_path / "checkpoint")
        config = AutoConfig.from_pretrained(tmp_path / "checkpoint")
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            config.save_pretrained(tmp_path / "copy")

    def test_reference_outside_the_parts_code_is_refused(self, tmp_path, sources):
        model, _ = compose_remote(sources, "old_style_lm")
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"]["part_code"]["classes"]["AutoConfig"] = "os.system"
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="'os.system'"):
            AutoConfig.from_pretrained(tmp_path)


class TestSources:
    def test_instance(self, tmp_path, sources):
        """Taken over as it is; what transformers left uninitialised in it is computed again."""
        source = shutil.copytree(sources / "scaled_lm", tmp_path / "scaled_lm_instance")
        language_model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
        arguments = {"vision": sources / "tower", "tokenizer": tiny_tokenizer(), "image_size": 32}
        with pytest.raises(anyvlm.CompositionError, match="trust_remote_code=True"):
            anyvlm.compose(text=language_model, **arguments)
        model, processor = anyvlm.compose(text=language_model, trust_remote_code=True, **arguments)
        assert model.language_model is language_model
        ids = torch.arange(10, 20).unsqueeze(0)
        with torch.no_grad():
            expected = load_reference(sources / "scaled_lm", "scaled_lm")(ids).logits
            assert torch.equal(model(input_ids=ids).logits[..., : expected.shape[-1]], expected)
        check_three_generations(model, processor, tmp_path)

    def test_config(self, tmp_path, sources):
        """Random weights, with the code of the checkpoint that the config came from."""
        config = AutoConfig.from_pretrained(sources / "old_style_lm", trust_remote_code=True)
        config.n_layer = 3
        arguments = {"vision": vision_config("clip_vision_model"), "text": config, "tokenizer": tiny_tokenizer()}
        with pytest.raises(anyvlm.CompositionError, match="trust_remote_code=True"):
            anyvlm.compose(**arguments)
        model, processor = anyvlm.compose(**arguments, trust_remote_code=True)
        assert len(model.language_model.transformer.h) == 3
        check_three_generations(model, processor, tmp_path)

    def test_part_of_a_composed_model(self, tmp_path, sources):
        """Its code is taken along as it is, and not renamed once more."""
        first, processor = compose_remote(sources, "old_style_lm")
        second, _ = anyvlm.compose(
            vision=vision_config("clip_vision_model"),
            text=first.language_model,
            tokenizer=processor.tokenizer,
            trust_remote_code=True,
        )
        second.save_pretrained(tmp_path)
        assert "language_model_code_modeling_part.py" in code_names(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)

    def test_type_and_class_names_of_native_models(self, tmp_path):
        """Code that calls itself llama, as `transformers.LlamaForCausalLM` does, and is another model."""
        source = write_remote_part(tmp_path / "source", "scaled_lm")
        replace_in_files(source, {"made_up_scaled": "llama", "Scaled": "Llama"})
        model, processor = anyvlm.compose(
            vision=vision_config("clip_vision_model"), text=source, trust_remote_code=True
        )
        assert hasattr(model.language_model.model.layers[0], "depth_factor")
        check_three_generations(model, processor, tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
        assert hasattr(loaded.language_model.model.layers[0], "depth_factor")

    def test_check_without_weights(self, tmp_path, sources):
        source = {part: shutil.copytree(sources / part, tmp_path / part) for part in ("tower", "scaled_lm")}
        for folder in source.values():
            (folder / "model.safetensors").unlink()
        report = anyvlm.check(source["tower"], source["scaled_lm"], trust_remote_code=True)
        assert report.works and "ScaledForCausalLM" in str(report)

    @pytest.mark.parametrize("part", ["old_style_lm", "tower"])
    def test_check_without_trust_is_a_refusal_and_runs_nothing(self, tmp_path, sources, part):
        mark = tmp_path / "mark"
        result = run_python(CHECK, tmp_path / "home", sources / part, part, "untrusted", REMOTE_PART_MARK=str(mark))
        report = json.loads(result.stdout)
        assert report["works"] is False
        assert "has code of its own" in report["reasons"][0] and "trust_remote_code=True" in report["reasons"][0]
        # What is known of the other part is said all the same.
        assert len(report["parts"]) == 1
        assert not mark.exists()
        result = run_python(CHECK, tmp_path / "home", sources / part, part, "trusted", REMOTE_PART_MARK=str(mark))
        report = json.loads(result.stdout)  # and nothing else: nothing is asked
        assert report["works"] is True
        assert report["native_classes"]["LlavaForConditionalGeneration"].startswith("no; ")
        assert mark.exists()

    def test_checkpoint_without_a_model_class_for_the_task_is_refused(self, tmp_path, sources):
        with pytest.raises(anyvlm.CompositionError, match="AutoModelForCausalLM for a language model"):
            compose_remote(sources, "tower")

    def test_repositories_of_the_hub(self, tmp_path, sources):
        """As transformers' cache of the Hub has them: the part's code says where it came from, and what was composed is
        loaded from the Hub where the package is imported and where it is not."""
        hub = tmp_path / "home" / "hub"
        revision = put_in_hub_cache(sources / "old_style_lm", hub, "someone/made-up-lm")
        run_python(COMPOSE_FROM_HUB, tmp_path / "home", "someone/made-up-lm", tmp_path / "one")
        part_code = json.loads((tmp_path / "one" / "config.json").read_text())["text_config"]["part_code"]
        assert part_code["origin"] == "someone/made-up-lm" and part_code["revision"] == revision
        entry = (tmp_path / "one" / "language_model_code.py").read_text()
        assert f"copied from someone/made-up-lm at revision {revision}" in entry

        shutil.rmtree(hub)
        put_in_hub_cache(tmp_path / "one", hub, "me/made-up.vlm")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(tmp_path / "one", trust_remote_code=True)
        answers = save_with_answers(model, processor, tmp_path / "local")
        run_python(LOAD_WITH_PACKAGE, tmp_path / "home", "me/made-up.vlm", answers, tmp_path / "two")
        result = run_in_fresh_process(
            FRESH_LOAD, "me/made-up.vlm", answers, tmp_path / "three", extra_env={"HF_HUB_CACHE": str(hub)}
        )
        assert set(json.loads(result.stdout.splitlines()[-1])["differences"].values()) == {0.0}
        for copy in ("two", "three"):
            check_files(tmp_path / copy)
            assert code_names(tmp_path / copy) == code_names(tmp_path / "one")


def put_in_hub_cache(directory: Path, hub: Path, repo_id: str) -> str:
    """Put a folder where huggingface_hub keeps a repository that it downloaded; returns the commit."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(directory, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return revision


class TestRewriting:
    """Relative imports of every form, in code that is imported afterwards."""

    FILES = {
        "modeling": '''"""Usage:

from .modeling import Model
from .nowhere import Thing
"""
SEPARATORS = "\x0c \u2028"
from typing import TYPE_CHECKING
from .sub.blocks import Block, \\
    double  # a comment
from . import constants as C, helpers; from .helpers import (
    triple,
    # half,
)
from .sub import only_here
try:
    from .kernels import fast
except ImportError:
    fast = None
if TYPE_CHECKING:
    from .stubs import Stub


class Config:
    é = "ä"; from .helpers import triple as tripled


class Model:
    def late(self):
        from .late import VALUE
        return VALUE

    def broken(self):
        from .gone import VALUE
        return VALUE
''',
        "constants": "from .helpers import triple\nTHREE = triple(1)\n",
        "helpers": "def triple(x):\n    return 3 * x\n",
        "late": "from .modeling import Model\nVALUE = 'late'\n",
        "sub/__init__": "from .blocks import Block\nonly_here = 7\n",
        "sub/blocks": "from ..helpers import triple\nclass Block: pass\ndef double(x): return 2 * x\n",
    }  # fmt: skip

    @staticmethod
    def reader(files: dict[str, str]):
        return lambda path: files.get("/".join(path))

    def rewrite(self, files: dict[str, str]) -> dict[str, str]:
        classes = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
        return rewrite_part_code(RemoteCode(classes, self.reader(files)), "vision_tower_code")

    def test_rewritten_code_works_and_transformers_finds_all_of_it(self, tmp_path, monkeypatch):
        package = tmp_path / "rewritten_package"
        package.mkdir()
        for name, source in self.rewrite(self.FILES).items():
            (package / name).write_text(source)
        entry = package / "vision_tower_code.py"
        found = {Path(file).name for file in get_relative_import_files(entry)}
        assert {entry.name, *found} == {file.name for file in package.iterdir()}
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        assert importlib.import_module("rewritten_package.vision_tower_code").__all__ == ["Config", "Model"]
        modeling = importlib.import_module("rewritten_package.vision_tower_code_modeling")
        assert (modeling.C.THREE, modeling.double(2), modeling.helpers.triple(2), modeling.only_here) == (3, 4, 6, 7)
        assert modeling.Config.é == "ä" and modeling.Config.tripled(1) == 3
        assert modeling.fast is None and modeling.Model().late() == "late"
        with pytest.raises(ImportError, match="from .gone import VALUE"):
            modeling.Model().broken()

    def test_missing_file_is_refused(self):
        with pytest.raises(anyvlm.CompositionError, match="modeling.py:2 says `from .gone import x`"):
            self.rewrite({"modeling": "import os\nfrom .gone import x\n"})

    def test_import_outside_the_folder_is_refused(self):
        with pytest.raises(anyvlm.CompositionError, match="from ..above import x"):
            self.rewrite({"modeling": "from ..above import x\n"})

    def test_import_by_name_is_refused(self):
        source = "import importlib\nmodule = importlib.import_module('.helpers', __package__)\n"
        with pytest.raises(anyvlm.CompositionError, match="'.helpers' with import_module"):
            self.rewrite({"modeling": source})

    def test_names_that_would_become_equal_are_refused(self):
        files = {"modeling": "from .a.b import x\nfrom .a_b import y\n", "a/b": "x = 1\n", "a_b": "y = 2\n"}
        with pytest.raises(anyvlm.CompositionError, match="would both become vision_tower_code_a_b.py"):
            self.rewrite(files)

    def test_missing_package_is_transformers_own_error(self, tmp_path):
        source = write_remote_part(tmp_path / "lm", "scaled_lm")
        file = source / "modeling_part.py"
        file.write_text(f"import a_package_that_nobody_has\n{file.read_text()}")
        with pytest.raises(ImportError, match="packages that were not found.*a_package_that_nobody_has"):
            anyvlm.compose(vision=vision_config("clip_vision_model"), text=source, trust_remote_code=True)

    def test_native_parts_have_no_remote_code(self):
        assert find_remote_code(text_config("llama"), "AutoModelForCausalLM", trust_remote_code=True) is None


def code_names(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.py")}


def replace_in_files(directory: Path, replacements: dict[str, str]) -> None:
    for path in (*directory.glob("*.py"), directory / "config.json"):
        text = path.read_text()
        for old, new in replacements.items():
            text = text.replace(old, new)
        path.write_text(text)


CHECK = """
import json, sys
from tiny_parts import text_config, tiny_tokenizer, vision_config
import anyvlm
source, part, trust = sys.argv[1:]
parts = {"vision": vision_config("clip_vision_model"), "text": text_config("llama")}
parts["vision" if part == "tower" else "text"] = source
report = anyvlm.check(**parts, tokenizer=tiny_tokenizer(), image_size=32, trust_remote_code=trust == "trusted")
print(json.dumps(report.to_dict()))
"""
COMPOSE = """
import sys
from tiny_parts import text_config, tiny_tokenizer, vision_config
import anyvlm
source, part, trust = sys.argv[1:]
parts = {"vision": vision_config("clip_vision_model"), "text": text_config("llama")}
parts["vision" if part == "tower" else "text"] = source
try:
    anyvlm.compose(**parts, tokenizer=tiny_tokenizer(), image_size=32, trust_remote_code=trust == "trusted")
except anyvlm.CompositionError as error:
    print(error)
"""

LOAD_WITHOUT_TRUST = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
import anyvlm
for arguments in ({}, {"trust_remote_code": False}):
    AutoProcessor.from_pretrained(sys.argv[1], **arguments)
    print("processor loaded")
    config = AutoConfig.from_pretrained(sys.argv[1], **arguments)
    print("config loaded", config.text_config.n_embd)
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], **arguments)
    except ValueError as error:
        assert "language_model_code*.py" in str(error) or "vision_tower_code*.py" in str(error), error
        print("refused")
"""

LOAD_WITH_PACKAGE = """
import sys
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
import anyvlm
checkpoint, answers, copy = sys.argv[1:]
saved = torch.load(answers)
for load in (
    AutoModelForCausalLM.from_pretrained,
    AutoModel.from_pretrained,
    anyvlm.AnyVlmForConditionalGeneration.from_pretrained,
):
    model = load(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model) is anyvlm.AnyVlmForConditionalGeneration and type(processor) is anyvlm.AnyVlmProcessor
    inputs = processor(**saved["processor_arguments"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, saved["logits"])
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), saved["generated"])
model.save_pretrained(copy)
processor.save_pretrained(copy)
"""

COMPOSE_FROM_HUB = """
import sys
from tiny_parts import vision_config
import anyvlm
model, processor = anyvlm.compose(
    vision=vision_config("clip_vision_model"), text=sys.argv[1], image_size=32, trust_remote_code=True
)
model.save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
"""
