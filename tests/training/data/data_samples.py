"""Samples as people write them, and files of them."""

import json


def turn(role, content):
    return {"role": role, "content": content}


#: As people write them, pictures as names: one picture, none, two with words between, pictures in the blocks.
SAMPLES = [
    {"messages": [turn("user", "<image> w5 ?"), turn("assistant", "w1")], "images": ["0.png"], "id": 7},
    {"messages": [turn("user", "w6"), turn("assistant", "42")]},
    {
        "messages": [turn("system", "w9"), turn("user", "w5 <image> w7 <image>"), turn("assistant", "true")],
        "images": ["1.png", "2.png"],
    },
    {
        "messages": [
            turn("user", [{"type": "image", "image": "3.png"}, {"type": "text", "text": "w5"}]),
            turn("assistant", [{"type": "text", "text": "w2"}]),
        ],
    },
    {"messages": [turn("user", "w5 w6"), turn("assistant", "w1")], "images": ["2.png"]},
]


def write(path, rows, lines=True):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    return str(path)
