"""Run by tests in a process where `anyvlm` cannot be imported: load an adapter onto its base, each way that PEFT and
transformers know.

usage: fresh_adapter.py BASE ADAPTER INPUTS
`INPUTS` holds inputs and the logits that the trained model gave. Prints a JSON line: the largest difference of each way.
"""

import json
import sys

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM


base_folder, adapter, inputs_file = sys.argv[1:]
try:
    import anyvlm  # noqa: F401

    raise SystemExit("anyvlm can be imported here, so this shows nothing")
except ModuleNotFoundError:
    pass

saved = torch.load(inputs_file)


def difference(model) -> float:
    for parameter in model.parameters():  # weights mapped from a file are not aligned, and kernels then round else
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return float((model.eval()(**saved["inputs"]).logits - saved["logits"]).abs().max())


def base():
    return AutoModelForCausalLM.from_pretrained(base_folder, trust_remote_code=True)


differences = {}
model = PeftModel.from_pretrained(base(), adapter)
differences["PeftModel"] = difference(model)
differences["merged"] = difference(model.merge_and_unload())
differences["AutoPeftModelForCausalLM"] = difference(
    AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
)
model = base()
model.load_adapter(adapter)
differences["load_adapter"] = difference(model)
print(json.dumps(differences))
