"""Load a checkpoint where `anyvlm` cannot be imported, and compare what it gives.

Run as a script in a new process: `fresh_logits.py CHECKPOINT INPUTS`. `INPUTS` holds inputs and logits of the model that was
saved.
"""

import sys
import tempfile
from pathlib import Path

import torch


def require_fresh_logits(checkpoint: Path, inputs: dict, logits: torch.Tensor) -> None:
    """
    Raises:
        FreshProcessError: it cannot be loaded there, or gives other logits.
    """
    from ..publishing.fresh_process import run_in_fresh_process

    with tempfile.TemporaryDirectory(prefix="anyvlm-fresh-") as folder:
        path = Path(folder, "inputs.pt")
        torch.save({"inputs": dict(inputs), "logits": logits, "threads": torch.get_num_threads()}, path)
        run_in_fresh_process(__file__, checkpoint, path)


def main(checkpoint: str, path: str) -> None:
    from transformers import AutoModelForCausalLM

    saved = torch.load(path)
    torch.set_num_threads(saved["threads"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    for parameter in model.parameters():  # weights mapped from a file are not aligned, and kernels then round else
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found = model(**saved["inputs"]).logits
    if not torch.equal(found, saved["logits"]):
        raise SystemExit(f"the logits differ by {(found - saved['logits']).abs().max():.2g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
