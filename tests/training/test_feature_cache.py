"""A cache of features changes nothing but the work: the same logits, gradients and losses, whatever the tower and views."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from model_tester import picture
from tiny_parts import compose
from transformers import (
    BlipImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    Trainer,
    TrainingArguments,
)

import anyvlm
from anyvlm.compatibility import tiny_configs
from anyvlm.processing.processing_anyvlm import AnyVlmProcessor
from anyvlm.training.data.augmentation import Augmentation
from anyvlm.training.data.samples import open_pictures
from anyvlm.training.feature_keys import picture_key
from anyvlm.training.packing import enable_packing


QFORMER = {
    "type": "qformer",
    "num_queries": 4,
    "reads_text": True,
    "qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
}

#: Every way in which features come out of a tower, and tokens out of features: what `compose` is told, and how many pictures
#: a text may have.
MODELS = {
    "plain": ({}, 2),
    "registers": ({"vision": "dinov2_with_registers"}, 2),
    "convolutions": ({"vision": "resnet", "image_size": 64}, 2),
    "packed patches": (
        {
            "vision": tiny_configs.vision_config("qwen2_5_vl_vision"),
            "image_processor": Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64),
        },
        2,
    ),
    "padded patches": (
        {
            "vision": tiny_configs.vision_config("siglip2_vision_model"),
            "image_processor": Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24),
        },
        2,
    ),
    "strip": (
        {
            "vision": tiny_configs.vision_config("minicpmv4_6_vision"),
            "image_processor": MiniCPMV4_6ImageProcessorPil(patch_size=8, scale_resolution=64, slice_mode=False),
        },
        2,
    ),
    "clips": ({"vision": "vivit"}, 2),
    "two towers": ({"vision": ("clip_vision_model", "dinov2")}, 2),
    "two layers": ({"vision_feature_layer": [-2, -1]}, 2),
    "tiles with newline": ({"views": {"type": "tiles", "layout": "anyres"}}, 2),
    "tiles of single pictures": ({"views": {"type": "tiles", "layout": "anyres", "several": "whole"}}, 2),
    "slices": ({"vision": "siglip_vision_model", "views": {"type": "slices"}}, 2),
    "cross-attention": ({"fusion": "cross_attention"}, 2),
    "instruction": ({"projector": QFORMER}, 2),
    "pictures first": (
        {
            "projector": {"type": "resampler", "num_queries": 3},
            "image_processor": BlipImageProcessorPil(size=(32, 32)),
        },
        1,
    ),
}


def new_model(name="plain", **kwargs):
    settings = {**MODELS[name][0], **kwargs}
    vision = settings.pop("vision", "clip_vision_model")
    if isinstance(vision, tuple):
        vision = tuple(tiny_configs.vision_config(tower) for tower in vision)
    model, processor = compose(vision, **settings)
    if name == "pictures first":
        parts = {"vision_tower_spec": processor.vision_tower_spec, "projector_config": processor.projector_config}
        processor = AnyVlmProcessor(
            processor.image_processor,
            processor.tokenizer,
            chat_template=processor.chat_template,
            pictures_first=True,
            **parts,
        )
    model.vision_tower.requires_grad_(False)
    return model, processor


def sample(indices, answer="w1 w2", **more):
    sizes = [(48, 40), (70, 90), (200, 64), (33, 120)]
    images = [picture(index).resize(sizes[index % 4]) for index in indices]
    question = [{"type": "image"} for _ in images] + [{"type": "text", "text": "w5 w6 ?"}]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": images,
        **more,
    }


def samples(several=2):
    return [sample([0]), sample([1, 2][:several], "w3"), sample([3], "w4 w5 w6"), sample([0, 3][:several])]


def outputs(model, batch):
    """Logits, loss, and the gradient of every trained parameter."""
    model.zero_grad()
    torch.manual_seed(0)  # Q-Formers have dropout
    found = model.train()(**batch)
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_features_in_place_of_pixels(name, tmp_path):
    model, processor = new_model(name)
    data = samples(MODELS[name][1])
    plain = anyvlm.AnyVlmDataCollator(processor)(data)
    cache = anyvlm.FeatureCache(tmp_path, model, processor)
    assert cache.fill(data, model, progress=False) == len(cache) >= 3
    batch = anyvlm.AnyVlmDataCollator(processor, feature_cache=cache)(data)
    assert "pixel_values" not in batch and "tower_features" in batch
    assert torch.equal(batch["input_ids"], plain["input_ids"]) and torch.equal(batch["labels"], plain["labels"])
    expected = outputs(model, plain)
    model.vision_tower.forward = None  # not called from here on
    torch.testing.assert_close(outputs(model, batch), expected)
    assert any(name.startswith("multi_modal_projector") for name in expected)


def test_equal_to_the_last_bit_where_the_tower_ran_on_the_same_batch(tmp_path):
    model, processor = new_model()
    data = [sample([index]) for index in range(4)]
    cache = anyvlm.FeatureCache(tmp_path, model, processor)
    cache.fill(data, model, batch_size=4, progress=False)
    expected = outputs(model, anyvlm.AnyVlmDataCollator(processor)(data))
    found = outputs(model, anyvlm.AnyVlmDataCollator(processor, feature_cache=cache)(data))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["plain", "packed patches", "tiles with newline"])
def test_pictures_that_are_not_there_and_videos_go_the_ordinary_way(name, tmp_path):
    model, processor = new_model(name, video_frames={"num_frames": 2, "frame_pool": 1})
    video = [picture(5).resize((48, 40)), picture(6).resize((48, 40))]
    filmed = sample([1], videos=[video])
    filmed["messages"][0]["content"].insert(1, {"type": "video"})
    data = [sample([0]), sample([4, 1]), sample([]), filmed, sample([5, 0])]
    cache = anyvlm.FeatureCache(tmp_path, model, processor)
    cache.fill([sample([0]), sample([1])], model, progress=False)
    batch = anyvlm.AnyVlmDataCollator(processor, feature_cache=cache)(data)
    assert "pixel_values" in batch and "tower_features" in batch
    plain = anyvlm.AnyVlmDataCollator(processor)(data)
    torch.testing.assert_close(outputs(model, batch), outputs(model, plain))


def test_packed_samples_plain_text_and_lists_of_samples(tmp_path):
    model, processor = new_model()
    data = [sample([0]), [sample([1, 2], "w3 w4"), {"text": "w1 w2 w3"}], sample([])]
    cache = anyvlm.FeatureCache(tmp_path, model, processor)
    assert cache.fill(data, model, progress=False) == 3
    plain = anyvlm.AnyVlmDataCollator(processor, packing=True)
    enable_packing(model, plain, [sample([0]), sample([1, 2])])
    packed = anyvlm.AnyVlmDataCollator(processor, packing=True, feature_cache=cache)(data)
    assert "pixel_values" not in packed and len(packed["input_ids"]) == 1
    torch.testing.assert_close(outputs(model, packed), outputs(model, plain(data)))


def test_streams_that_begin_again_are_filled_from_once(tmp_path):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([sample([0]), sample([1])])

    model, processor = new_model()
    stream = open_pictures(Rows())
    cache = anyvlm.FeatureCache(tmp_path, model, processor)
    assert cache.fill(stream, model, progress=False) == 2 and stream.repeat
    augmenting = open_pictures(Rows(), augmentation=Augmentation())
    with pytest.raises(ValueError, match="augments its pictures"):
        cache.fill(augmenting, model)


@pytest.mark.parametrize("fusion", ["embed", "cross_attention"])
def test_generation_from_features(fusion, tmp_path):
    model, processor = new_model(fusion=fusion)
    cache = anyvlm.FeatureCache(tmp_path, model, processor)
    cache.fill([sample([0])], model, progress=False)
    arguments = {"text": ["w1 <image> w2"], "return_tensors": "pt"}
    plain = processor(images=[[picture(0).resize((48, 40))]], **arguments)
    seen = processor(images=[cache.seen([picture(0).resize((48, 40))])], **arguments)
    assert "tower_features" in seen
    kwargs = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**seen, **kwargs), model.generate(**plain, **kwargs))


def trainer(directory, model, collator, trainer_class=anyvlm.AnyVlmTrainer, **kwargs) -> Trainer:
    callbacks = kwargs.pop("callbacks", None)
    dataset = kwargs.pop("dataset", None) or [sample([index % 7], f"w{index % 5}") for index in range(24)]
    options = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "num_train_epochs": 2,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(output_dir=str(directory), **{**options, **kwargs})
    return trainer_class(
        model=model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=callbacks
    )


def losses(run: Trainer) -> np.ndarray:
    return np.array([entry["loss"] for entry in run.state.log_history if "loss" in entry])


def cached(tmp_path, model, processor, **kwargs):
    cache = anyvlm.FeatureCache(tmp_path / "features", model, processor, **kwargs)
    return cache, anyvlm.AnyVlmDataCollator(processor, feature_cache=cache)


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"dataloader_num_workers": 1, "gradient_checkpointing": True}],
    ids=["plain", "bf16", "workers and checkpointing"],
)
def test_a_whole_run_has_the_losses_of_one_without(tmp_path, options):
    model, processor = new_model()
    without = trainer(tmp_path, model, anyvlm.AnyVlmDataCollator(processor), **options)
    without.train()
    model, processor = new_model()
    autocast_dtype = torch.bfloat16 if "bf16" in options else None
    cache, collator = cached(tmp_path, model, processor, autocast_dtype=autocast_dtype)
    with_cache = trainer(tmp_path, model, collator, **options)
    with_cache.train()
    assert len(cache) == 7 and len(losses(without)) == 12
    assert np.abs(losses(with_cache) - losses(without)).max() <= 1e-5
    assert losses(without)[-1] < losses(without)[0] - 0.5


def test_adapters_around_the_model(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is in the [train] extra")
    runs = []
    for with_cache in (False, True):
        model, processor = new_model()
        torch.manual_seed(0)
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["multi_modal_projector"], r=4
            ),
        )
        collator = anyvlm.AnyVlmDataCollator(processor)
        if with_cache:
            cache, collator = cached(tmp_path, model, processor)
        runs.append(trainer(tmp_path, model, collator, num_train_epochs=1))
        runs[-1].train()
    assert len(cache) == 7
    assert np.abs(losses(runs[0]) - losses(runs[1])).max() <= 1e-5


def test_plain_trainer_resumed_equals_uninterrupted(tmp_path):
    def run(directory, max_steps, seed=0, **kwargs):
        model, processor = new_model(seed=seed)
        if seed:  # as another process would load it: the same frozen tower
            model.vision_tower.load_state_dict(new_model()[0].vision_tower.state_dict())
        cache, collator = cached(tmp_path, model, processor)
        dataset = [sample([index % 7], f"w{index % 5}") for index in range(24)]
        options = {"max_steps": max_steps, "save_steps": 4, "save_strategy": "steps", "dataset": dataset, **kwargs}
        found = trainer(directory, model, collator, Trainer, callbacks=[cache.callback(dataset)], **options)
        found.train(resume_from_checkpoint=str(directory / "checkpoint-4") if seed else None)
        return losses(found)

    whole = run(tmp_path / "whole", 8, lr_scheduler_type="constant")
    run(tmp_path / "parts", 4, lr_scheduler_type="constant")
    assert np.abs(run(tmp_path / "parts", 8, seed=1, lr_scheduler_type="constant") - whole).max() <= 1e-6


def test_a_checkpoint_with_its_own_code(tmp_path):
    """Its classes are not the package's."""
    model, processor = new_model("tiles with newline")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    script = f"""
import sys, torch
sys.path.insert(0, {str(__file__.rsplit("/", 2)[0])!r})
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
import anyvlm
from anyvlm.training.feature_cache import FeatureCache
from PIL import Image
model.vision_tower.requires_grad_(False)
assert not isinstance(processor, anyvlm.AnyVlmProcessor)
data = [{{"messages": [{{"role": "user", "content": "w5"}}, {{"role": "assistant", "content": "w1"}}],
         "images": [Image.radial_gradient("L").resize((90, 40))]}}]
cache = FeatureCache({str(tmp_path / "features")!r}, model, processor)
assert cache.fill(data, model, progress=False) == 1
batch = anyvlm.AnyVlmDataCollator(processor, feature_cache=cache)(data)
assert "pixel_values" not in batch
with torch.no_grad():
    difference = model(**batch).loss - model(**anyvlm.AnyVlmDataCollator(processor)(data)).loss
assert abs(difference) < 1e-5, difference
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_files_are_known_undecoded(tmp_path, monkeypatch):
    model, processor = new_model()
    for index in range(2):
        picture(index).save(tmp_path / f"{index}.png")
    data = [
        {**sample([0]), "images": [str(tmp_path / "0.png")]},
        {**sample([1]), "images": [(tmp_path / "1.png").read_bytes()]},
        {**sample([1]), "images": [{"bytes": None, "path": str(tmp_path / "1.png")}]},
    ]
    cache, collator = cached(tmp_path, model, processor)
    assert cache.fill(data, model, progress=False) == 2
    plain = anyvlm.AnyVlmDataCollator(processor)(data)
    monkeypatch.setattr("PIL.Image.open", None)
    batch = collator(data)
    assert "pixel_values" not in batch
    torch.testing.assert_close(outputs(model, batch), outputs(model, plain))


def test_opened_data_leaves_known_files_alone(tmp_path, monkeypatch):
    """One that cannot be read gives its place to another, with the cache as without."""
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    rows = [{**sample([0], f"w{index}"), "images": [str(tmp_path / f"{index}.png")]} for index in range(4)]

    def run(with_cache):
        model, processor = new_model()
        dataset = open_pictures(rows, max_unreadable=1.0)
        collator = anyvlm.AnyVlmDataCollator(processor)
        if with_cache:
            _, collator = cached(tmp_path, model, processor)
        return trainer(tmp_path, model, collator, dataset=dataset), dataset

    without, _ = run(with_cache=False)
    without.train()
    found, dataset = run(with_cache=True)
    found.train()
    assert len(losses(found)) == 2 and np.abs(losses(found) - losses(without)).max() <= 1e-5
    monkeypatch.setattr("PIL.Image.open", None)
    assert dataset[1]["images"] == rows[1]["images"] and "pixel_values" not in found.data_collator([dataset[1]])


def test_keys_are_of_content(tmp_path):
    image = picture(0)
    image.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert picture_key(tmp_path / "a.png")[0] == picture_key(str(tmp_path / "b.png"))[0]
    assert picture_key(image)[0] == picture_key(np.asarray(image))[0] != picture_key(picture(1))[0]
    turned = image.resize((20, 30)), image.resize((20, 30)).transpose(2)
    reshaped = np.asarray(turned[0]).reshape(20, 30, 3)  # the same bytes in another shape
    assert len({picture_key(each)[0] for each in (*turned, reshaped)}) == 3


def test_another_tower_or_setting_has_another_key(tmp_path):
    model, processor = new_model()
    cache, _ = cached(tmp_path, model, processor)
    cache.fill([sample([0])], model, progress=False)
    same = anyvlm.FeatureCache(tmp_path / "features", model, processor)
    assert same.key == cache.key and len(same) == 1
    with torch.no_grad():
        next(model.vision_tower.parameters()).view(-1)[0] += 1e-3
    trained = anyvlm.FeatureCache(tmp_path / "features", model, processor)
    assert len(trained) == 0
    with pytest.raises(ValueError, match="not the one that this feature cache was made for: weights differs"):
        cache.fill([sample([0])], model, progress=False)
    trained.fill([sample([0]), sample([1])], model, progress=False)
    assert len(trained) == 2 and len(cache) == 1
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert anyvlm.FeatureCache(tmp_path / "features", model, processor).key not in (cache.key, trained.key)
    trained.clear(only_stale=True)
    assert [path.name for path in (tmp_path / "features").iterdir()] == [trained.key] and trained.size() > 0
    facts = json.loads((tmp_path / "features" / trained.key / "tower.json").read_text())
    assert facts["weights"]
    trained.clear()
    assert list((tmp_path / "features").iterdir()) == [] and len(trained) == trained.size() == 0


def test_a_tower_that_is_trained_is_refused(tmp_path):
    model, processor = new_model()
    cache, collator = cached(tmp_path, model, processor)
    cache.fill([sample([0])], model, progress=False)
    batch = collator([sample([0])])
    list(model.vision_tower.parameters())[-1].requires_grad_(True)
    for refused in (
        lambda: anyvlm.FeatureCache(tmp_path, model, processor),
        lambda: cache.fill([sample([0])], model),
        lambda: model.train()(**batch),
        lambda: trainer(tmp_path, model, collator).train(),
    ):
        with pytest.raises(ValueError, match="feature cache"):
            refused()


def test_augmentation_and_another_precision_are_refused(tmp_path):
    class Augmenting(list):
        augments = True

    model, processor = new_model()
    cache, collator = cached(tmp_path, model, processor)
    with pytest.raises(ValueError, match="augments its pictures"):
        cache.fill(Augmenting([sample([0])]), model)
    with pytest.raises(ValueError, match="autocast_dtype=torch.bfloat16"):
        trainer(tmp_path, model, collator, bf16=True).train()


def test_limit_on_disk_and_what_people_are_told(tmp_path, capsys):
    model, processor = new_model()
    data = [sample([index]) for index in range(6)]
    each = 16 * 32 * 4  # 4 x 4 features of width 32
    cache, collator = cached(tmp_path, model, processor, max_bytes=3 * each)
    assert cache.fill(data, model, batch_size=1) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "about 6 pictures take about 12.3 KB" in told and "at most 6.14 KB" in told
    batch = collator(data)
    assert len(batch["pixel_values"]) == 3 and len(batch["tower_features"]) == 3 * 16
    half = anyvlm.FeatureCache(tmp_path / "half", model, processor, dtype=torch.bfloat16)
    half.fill(data, model, progress=False)
    assert half.seen([data[0]["images"][0]])[0]["tower_features"].dtype == torch.bfloat16
    assert outputs(model, anyvlm.AnyVlmDataCollator(processor, feature_cache=half)(data))["loss"] > 0


def test_few_files_are_open_at_a_time(tmp_path):
    model, processor = new_model()
    cache, _ = cached(tmp_path, model, processor, shard_bytes=1)
    cache.fill([sample([index]) for index in range(5)], model, batch_size=1, progress=False)
    cache.shards.max_open = 2
    first = cache.seen([sample([0])["images"][0]])[0]["tower_features"]
    kept = first.clone()
    for index in range(5):
        assert "tower_features" in cache.seen(sample([index])["images"])[0]
    assert len(cache.shards._open) == 2
    assert torch.equal(first, kept), "still mapped while it is used"


def test_killed_while_filling_keeps_what_is_written(tmp_path):
    """Whatever is on disk then is whole, and the next run goes on from there."""
    script = f"""
import sys
sys.path[:0] = {[path for path in sys.path if path]!r}
import torch
torch.set_num_threads(1)
from test_feature_cache import cached, new_model, sample
from pathlib import Path
model, processor = new_model()
cache, _ = cached(Path({str(tmp_path)!r}), model, processor, shard_bytes=1)
print("ready", flush=True)
cache.fill([sample([index]) for index in range(400)], model, batch_size=1, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    folder = tmp_path / "features"
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/*.safetensors"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    model, processor = new_model()
    cache, collator = cached(tmp_path, model, processor)
    known = len(cache)
    assert 5 <= known < 400
    data = [sample([index]) for index in range(8)]
    cache.fill(data, model, progress=False)
    torch.testing.assert_close(
        outputs(model, collator(data)), outputs(model, anyvlm.AnyVlmDataCollator(processor)(data))
    )


def test_damaged_file_is_named(tmp_path):
    model, processor = new_model()
    cache, _ = cached(tmp_path, model, processor)
    cache.fill([sample([0])], model, progress=False)
    path = next((tmp_path / "features").glob("*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        len(anyvlm.FeatureCache(tmp_path / "features", model, processor))


def test_features_that_do_not_fit_are_refused():
    model, processor = new_model()
    inputs = processor(text=["w1 <image> w2"], images=[picture(0)], return_tensors="pt")
    features, grids = model.get_tower_features(inputs.pop("pixel_values"))
    features, grids = torch.cat(features), torch.tensor(grids)
    with pytest.raises(ValueError, match="go together"):
        model(**inputs, tower_features=features)
    with pytest.raises(ValueError, match=r"\(all features, 32\)"):
        model(**inputs, tower_features=features[:, :8], tower_grids=grids)
    with pytest.raises(ValueError, match="stands for 16 features"):
        model(**inputs, tower_features=features[:-1], tower_grids=grids)
