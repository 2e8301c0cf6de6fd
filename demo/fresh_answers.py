"""Answer questions about pictures, in this process or in a fresh one in which the package cannot be imported.

This file is both a module of the package and a script: the demo copies it into an empty folder and runs it there. So
it imports nothing of the package, and nothing at all of transformers before the package has been put out of reach.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


REQUEST, PICTURES, RESPONSE = "request.json", "pictures.npz", "response.json"
PACKAGE = "anyvlm"


def answer_in_batches(
    model, processor, conversations: Sequence[list[dict]], pictures: Sequence, batch_size: int, max_new_tokens: int
) -> Iterator[list[str]]:
    """Answer one question about one picture each, greedily; yields the answers batch by batch.

    Args:
        model: A composed model.
        processor: Its processor.
        conversations: Messages up to the answer, each with one picture.
        pictures: The picture of each conversation.
        batch_size: Conversations per batch, padded on the left.
        max_new_tokens: Longest answer, in tokens.
    """
    model.eval()
    for start in range(0, len(conversations), batch_size):
        part = slice(start, start + batch_size)
        texts = [
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for messages in conversations[part]
        ]
        inputs = processor(
            text=texts, images=[[picture] for picture in pictures[part]], padding=True, return_tensors="pt"
        ).to(model.device)
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield [answer.strip() for answer in answers]


def answer_in_fresh_process(
    checkpoint: str | os.PathLike,
    conversations: Sequence[list[dict]],
    pictures: Sequence,
    batch_size: int,
    max_new_tokens: int,
    timeout: float = 1800,
) -> dict[str, Any]:
    """Answer the same questions in a new Python process that has the checkpoint, but not the package.

    Args:
        checkpoint: Folder of a saved model and processor.
        pictures: RGB `PIL.Image`s of one size.
        timeout: Seconds after which the process is ended.

    Returns:
        `answers`; `model_class`, the class that answered, with its module; `seconds` that the process took to load.

    Raises:
        RuntimeError: the process failed; the message ends with the last line it wrote, the cause has more.
    """
    import numpy as np
    import torch

    with tempfile.TemporaryDirectory(prefix="anyvlm-fresh-") as folder:
        place = Path(folder)
        np.savez_compressed(place / PICTURES, pictures=np.stack([np.asarray(picture) for picture in pictures]))
        request = {
            "checkpoint": os.path.abspath(checkpoint),
            "conversations": list(conversations),
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            # Sums in another order of threads could differ in the last bit.
            "num_threads": torch.get_num_threads(),
        }
        (place / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        script = shutil.copy(__file__, place)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
        try:
            process = subprocess.run(
                [sys.executable, script], cwd=place, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"The fresh process did not answer within {timeout:.0f} seconds.") from error
        if process.returncode != 0:
            last_line = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"The fresh process failed: {last_line}") from RuntimeError(process.stderr[-3000:])
        return json.loads((place / RESPONSE).read_text(encoding="utf-8"))


class _Blocker:
    """An import hook that refuses the package, however it is installed."""

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.split(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"{name} is out of reach in this process", name=name)


def _main() -> None:
    sys.meta_path.insert(0, _Blocker())
    try:
        __import__(PACKAGE)
    except ModuleNotFoundError:
        pass
    else:
        raise RuntimeError(f"{PACKAGE} can be imported, so this process would prove nothing.")

    import time

    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoProcessor

    place = Path(__file__).parent
    request = json.loads((place / REQUEST).read_text(encoding="utf-8"))
    pictures = [Image.fromarray(picture) for picture in np.load(place / PICTURES)["pictures"]]
    torch.set_num_threads(request["num_threads"])
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(request["checkpoint"], trust_remote_code=True)
    seconds = time.perf_counter() - start
    batches = answer_in_batches(
        model, processor, request["conversations"], pictures, request["batch_size"], request["max_new_tokens"]
    )
    response = {
        "answers": [answer for batch in batches for answer in batch],
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "seconds": seconds,
    }
    (place / RESPONSE).write_text(json.dumps(response), encoding="utf-8")


if __name__ == "__main__":
    _main()
