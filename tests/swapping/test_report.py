"""The report of a swap: what counts as kept, text that says it, and files that are whole or not there."""

import copy
import json
import sys

import pytest
import torch
from tiny_parts import compose
from torch import nn

from anyvlm.swapping.modality_gap import modality_gap, modality_gap_change
from anyvlm.swapping.part_changes import compare_parts, digest
from anyvlm.swapping.report import SwapReport


def a_report(**fields) -> SwapReport:
    filled = {
        "swapped": "vision",
        "old": "CLIPVisionModel",
        "new": "ResNetModel",
        "parts": [
            {"name": "vision_tower", "what": "replaced", "parameters": 23_508_032, "note": "ResNetModel"},
            {"name": "multi_modal_projector.aligned_map", "what": "solved", "parameters": 786_816, "note": "Linear"},
            {"name": "language_model", "what": "kept", "parameters": 15_191_712, "note": "LlamaForCausalLM"},
        ],
        "tokens_per_picture": {"before": 16, "after": 16},
        "alignment": {
            "pictures": 80,
            "held_out_pictures": 20,
            "target": "features",
            "explained_variance": 0.713,
            "regularisation": 0.1,
            "candidates": [
                {"target": target, "regularisation": 10.0**power, "explained_variance": 0.7 - 0.05 * (power + 1) ** 2}
                for target in ("features", "tokens")
                for power in range(-3, 3)
            ],
            "seconds": 2.1,
        },
        "distillation": {
            "steps": 120,
            "seconds": 58.0,
            "losses": [[0, 0.61], [60, 0.2], [120, 0.12]],
            "agreement": {"before": 0.71, "after": 0.93},
        },
        "warnings": ["The pictures were few."],
        "seconds": 61.0,
    }
    return SwapReport(**{**filled, **fields})


class TestParts:
    def test_an_untouched_model_is_kept_whole(self):
        model, _ = compose()
        parts = compare_parts(digest(model), model)
        assert {part["what"] for part in parts} == {"kept"}
        assert {part["name"] for part in parts} == {"vision_tower", "multi_modal_projector", "language_model"}
        assert sum(part["parameters"] for part in parts) == model.num_parameters()

    @pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "language_model"])
    def test_one_changed_bit_is_seen_in_the_part_where_it_is(self, part):
        model, _ = compose()
        before = digest(model)
        tensor = list(model.get_submodule(part).parameters())[-1].data.view(-1)
        tensor.view(torch.int32)[0] ^= 1
        changed = {entry["name"] for entry in compare_parts(before, model) if entry["what"] == "trained"}
        assert changed and all(name.startswith(part) for name in changed)

    def test_a_changed_buffer_is_seen(self):
        model, _ = compose("resnet")
        before = digest(model)
        next(buffer for name, buffer in model.named_buffers() if name.endswith("running_mean")).add_(1)
        tower = [entry for entry in compare_parts(before, model) if entry["name"].startswith("vision_tower")]
        assert {entry["what"] for entry in tower} == {"kept", "trained"}
        assert [entry["name"].endswith("running_mean") for entry in tower if entry["what"] == "trained"] == [True]
        assert sum(entry["parameters"] for entry in tower) == model.vision_tower.num_parameters()

    def test_another_dtype_is_not_bit_for_bit(self):
        model, _ = compose()
        before = digest(model)
        model.vision_tower.to(torch.float64)
        tower = next(entry for entry in compare_parts(before, model) if entry["name"] == "vision_tower")
        assert tower["what"] == "trained"

    def test_the_old_projector_is_kept_inside_a_new_one(self):
        model, _ = compose()
        before = digest(model)
        old = model.multi_modal_projector
        model.multi_modal_projector = nn.ModuleDict({"aligned_map": nn.Linear(3, 5), "projector": old})
        changes = {"multi_modal_projector.aligned_map": "solved"}
        parts = {entry["name"]: entry for entry in compare_parts(before, model, changes)}
        assert parts["multi_modal_projector.projector"]["what"] == "kept"
        assert parts["multi_modal_projector.aligned_map"]["what"] == "solved"
        assert parts["multi_modal_projector.aligned_map"]["parameters"] == 20
        before = digest(model)
        model.multi_modal_projector = old
        assert {entry["what"] for entry in compare_parts(before, model)} == {"kept"}, "and taken out again"

    def test_what_the_caller_says_does_not_make_changed_tensors_kept(self):
        model, _ = compose()
        before = digest(model)
        with pytest.raises(ValueError, match="Not a change"):
            compare_parts(before, model, {"language_model": "kept"})

    def test_a_replaced_tower_is_replaced(self):
        model, _ = compose()
        before = digest(model)
        model.vision_tower = compose("dinov2")[0].vision_tower
        parts = {entry["name"]: entry for entry in compare_parts(before, model, {"vision_tower": "replaced"})}
        assert parts["vision_tower"]["what"] == "replaced" and parts["vision_tower"]["note"] == "Dinov2Model"
        assert parts["language_model"]["what"] == "kept"

    def test_new_and_changed_rows_of_the_vocabulary_are_entries_of_their_own(self):
        model, _ = compose()
        before = digest(model)
        rows = model.get_input_embeddings().num_embeddings
        model.resize_token_embeddings(rows + 2)
        with torch.no_grad():
            model.get_input_embeddings().weight[3] += 1
        parts = compare_parts(before, model, {"language_model": "trained"})
        entry = next(entry for entry in parts if "embed_tokens" in entry["name"])
        assert entry["parameters"] == 3 * model.get_input_embeddings().embedding_dim
        assert entry["note"].startswith(f"3 of {rows + 2} rows, 2 of them new")
        assert sum(part["parameters"] for part in parts) == model.num_parameters()


class TestModalityGap:
    def test_equal_tokens_have_no_gap(self):
        tokens = torch.randn(50, 8)
        assert modality_gap(tokens, tokens) == {"distance": 0, "rms_ratio": 1}

    def test_distance_is_in_lengths_of_a_text_embedding(self):
        text = torch.eye(4) * 3
        image = text + torch.tensor([6.0, 0, 0, 0])
        assert modality_gap(image, text)["distance"] == pytest.approx(2)
        assert modality_gap(10 * image, 10 * text)["distance"] == pytest.approx(2)
        assert modality_gap(2 * text, text)["rms_ratio"] == pytest.approx(2)

    def test_points_show_the_gap_on_the_first_axis(self):
        text, image = torch.randn(400, 16), torch.randn(30, 16)
        image[:, 5] += 40
        points = modality_gap_change((image, text), (image, text))["points"]
        assert len(points["before"]["text"]) == 150 and len(points["after"]["image"]) == 30
        means = [torch.tensor(points["after"][kind]).mean(0) for kind in ("image", "text")]
        assert abs(means[0] - means[1])[0] == pytest.approx(10, abs=1), "in lengths of a text embedding, here 4"

    def test_models_of_two_widths(self):
        narrow, wide = (torch.randn(9, 4), torch.randn(9, 4)), (torch.randn(9, 6), torch.randn(9, 6))
        assert set(modality_gap_change(narrow, wide)) == {"before", "after", "points"}
        with pytest.raises(ValueError, match=r"\(9, 4\) and \(9, 6\)"):
            modality_gap(narrow[0], wide[1])


class TestReport:
    def test_text_says_what_matters(self):
        text = str(a_report())
        for words in ("ResNetModel", "solved", "787 K", "71.3 %", "16 tokens", "0.61 -> 0.12", "93.0 %", "were few"):
            assert words in text, words

    def test_text_without_pictures(self):
        text = str(a_report(alignment=None, distillation=None, tokens_per_picture=None))
        assert "no pictures were given" in text and "None" not in text

    def test_an_unknown_fate_is_refused(self):
        with pytest.raises(ValueError, match="said to be 'guessed'"):
            a_report(parts=[{"name": "vision_tower", "what": "guessed", "parameters": 1}])

    def test_json_takes_tensors_and_what_is_not_finite(self):
        report = a_report(alignment={"explained_variance": torch.tensor(0.5), "regularisation": float("nan")})
        values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert values["alignment"] == {"explained_variance": 0.5, "regularisation": None}

    def test_saved_and_loaded(self, tmp_path):
        report = a_report(recipe={"model": "here", "stages": [{"name": "projector", "why": "It is new."}]})
        written = report.save(tmp_path / "new")
        endings = ("report.json", "report.txt", "report.png", "recipe.yaml")
        assert {path.name for path in written} == {f"swap_{ending}" for ending in endings}
        assert "# 1. It is new." in (tmp_path / "new" / "swap_recipe.yaml").read_text()
        assert sorted(tmp_path.glob("new/*")) == sorted(written)
        assert SwapReport.load(tmp_path / "new") == report
        assert SwapReport.load(tmp_path / "new" / "swap_report.json") == report
        assert (tmp_path / "new" / "swap_report.txt").read_text() == f"{report}\n"

    def test_loading_something_else(self, tmp_path):
        (tmp_path / "other.json").write_text('{"a": 1}')
        with pytest.raises(ValueError, match="no report of a swap"):
            SwapReport.load(tmp_path / "other.json")
        with pytest.raises(OSError):
            SwapReport.load(tmp_path)

    def test_without_matplotlib_the_text_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
        with pytest.warns(UserWarning, match="matplotlib is not installed"):
            written = a_report().save(tmp_path)
        assert "swap_report.png" not in {path.name for path in written}
        assert "matplotlib is not installed" in (tmp_path / "swap_report.txt").read_text()

    def test_a_report_that_cannot_be_drawn_leaves_the_old_files(self, tmp_path):
        a_report().save(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        broken = copy.deepcopy(a_report(warnings=["other"]))
        broken.parts[0]["parameters"] = "many"
        with pytest.raises((TypeError, ValueError)):
            broken.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
