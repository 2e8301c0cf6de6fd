"""Run by tests in a process where `anyvlm` cannot be imported: load a checkpoint through every Auto class.

usage: fresh_load.py CHECKPOINT INPUTS COPY
`INPUTS` holds inputs, logits and generated ids of the model that was saved. Prints a JSON line; saves to `COPY`.
"""

import json
import sys

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)


checkpoint, inputs_file, copy = sys.argv[1:]
try:
    import anyvlm  # noqa: F401

    raise SystemExit("anyvlm can be imported here, so this shows nothing")
except ModuleNotFoundError:
    pass

saved = torch.load(inputs_file)
differences, equal = {}, {}
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(checkpoint, trust_remote_code=True)
    for parameter in model.parameters():  # weights mapped from a file are not aligned, and kernels then round else
        parameter.data = parameter.data.clone()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    inputs = processor(**saved["processor_arguments"], padding=True, return_tensors="pt")
    with torch.no_grad():
        differences[auto_class.__name__] = float((model(**inputs).logits - saved["logits"]).abs().max())
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    equal[auto_class.__name__] = torch.equal(generated, saved["generated"])
config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
model.save_pretrained(copy)
# A tokenizer that was used remembers its last padding in its file; one that was only loaded is saved as it came.
AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).save_pretrained(copy)
print(
    json.dumps(
        {
            "differences": differences,
            "generation_equal": equal,
            "same_config_class": type(config) is type(model.config) is model.config_class,
            "processor": type(processor).__name__,
            "processor_module": type(processor).__module__,
        }
    )
)
