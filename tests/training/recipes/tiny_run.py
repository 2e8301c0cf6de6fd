"""A tiny model and tiny data in files, for recipes that are run."""

import json
from pathlib import Path

from model_tester import picture
from tiny_parts import text_config, tiny_tokenizer, vision_config

import anyvlm


def write_model(folder: Path, **kwargs) -> Path:
    """A composed model with a tower of 4 layers and a language model of 2."""
    tower = vision_config("clip_vision_model")
    tower.num_hidden_layers = 4
    model, processor = anyvlm.compose(vision=tower, text=text_config("llama"), tokenizer=tiny_tokenizer(), **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_data(folder: Path, number: int = 12) -> Path:
    """Conversations in LLaVA's JSON, about bright and dark pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        bright = index % 2 == 0
        picture(index).point(lambda value, more=170 if bright else 0: value // 3 + more).save(folder / f"{index}.png")
        turns = [("human", "<image>\nw5 w6 ?"), ("gpt", "w1" if bright else "w2 w2")]
        rows.append(
            {
                "id": str(index),
                "image": f"{index}.png",
                "domain": "new" if index % 3 == 0 else "old",
                "conversations": [{"from": who, "value": words} for who, words in turns],
            }
        )
    path = folder / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
