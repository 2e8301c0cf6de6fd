"""Models of transformers' own vision-language classes, to ours and back.

Each class is a `NativeFamily` (`family.py`): how its config, its keys and its processor translate. One engine uses these
declarations for `from_native` (`importing.py`), `to_native` (`exporting.py`) and the conversion of checkpoints that are
never loaded (`streaming.py`).

**To add a family**, write `composition/native/<name>.py` with `FAMILIES = (NativeFamily(…),)` and name the module in
`families.py`; `llava.py` is the example. Four functions translate:

* `read_config(native_config)` gives arguments of `AnyVlmConfig`: the sub-configs (`read_parts` of `pieces.py`) and the rest.
  Projector widths and both specs are measured. Where the class reads the tower otherwise than the probe would,
  `adjust_spec` corrects the spec.
* `write_config(config)` gives the native config, or raises `Misfit` (`require((holds, "words"), …)`) with each reason why
  the class cannot be this model. It also sees models that were composed: be strict. Conditions that several classes have are
  in `conditions.py`.
* `rules(native_config)` lists where keys differ: `Rename` of a key or a prefix (`*` is one component of a name), and where
  tensors are arranged otherwise `concatenated`, `separated`, `transposed`, `reshaped` or a `Rearrange` (`keys.py`). The
  language model needs no rules but `base_prefix` and `head_prefix` (or `causal_prefix`).
* `read_processor` and `write_processor` give the arguments of either processor beyond image processor, tokenizer and chat
  template.

Then add its tiny models to `compatibility/native_cases/<name>.py`, and a test of a few lines that runs
`compatibility.native_checks.check_case` on them (`tests/composition/native/test_llava.py`).
"""

from .exporting import to_native
from .families import family_of, native_families
from .family import Misfit, NativeFamily
from .importing import from_native


__all__ = ["Misfit", "NativeFamily", "family_of", "from_native", "native_families", "to_native"]
