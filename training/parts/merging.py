"""An adapter and its base as one full checkpoint, compared before it is written."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ...publishing.fresh_worker import model_inputs, picture
from ...publishing.written_aside import written_aside
from .adapters import import_peft


#: Largest difference of the logits between adapter and merged weights, as a share of the largest logit. Merging adds the
#: same products in another order, so in float32 some thousand roundings of 6e-8 remain.
FLOAT32_TOLERANCE = 1e-5
#: The same in dtypes with fewer digits, whose merged weights are themselves rounded, in units of the dtype's last place.
LAST_PLACES = 16


def merge_adapters(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda what: None,
) -> float:
    """Write the base with an adapter's weights worked into its own: a checkpoint like any other, which needs no PEFT.

    Before anything is written, a question about a small picture is asked both ways, and the logits have to be equal up to
    the rounding of the dtype. The checkpoint is written aside and renamed when it is complete, with processor and code.

    Args:
        adapter: Folder or Hub id with `adapter_config.json`.
        output: Folder for the merged checkpoint.
        base: Folder or Hub id of the model that the adapter was trained on. Default: as written in the adapter.
        dtype: Dtype of the merged weights. Default: the base's own.
        overwrite: Take the place of a folder that holds files.
        trust_remote_code: Run code that comes with a part of the base.
        on_step: Told what is being done.

    Returns:
        The largest difference between the logits, as a share of the largest logit.

    Raises:
        ImportError: PEFT is not installed.
        FileExistsError: `output` holds files.
        OSError: adapter or base cannot be had.
        ValueError: the base is not one that the adapter was made for, the adapter cannot be merged, or the merged model
            answers differently.
    """
    if not overwrite and os.path.isdir(output) and os.listdir(output):
        raise FileExistsError(f"{output} is not empty. Choose another folder, or pass overwrite=True (--overwrite).")
    base = base or base_of(adapter)
    on_step(f"Loading {base}…")
    adapted, processor = load_adapted(adapter, base, dtype=dtype, trust_remote_code=trust_remote_code)
    on_step("Merging…")
    inputs = model_inputs(processor, picture(0, (64, 48)))
    before = _logits(adapted, inputs)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = adapted.peft_config["default"].peft_type.value
        raise ValueError(
            f"This adapter ({kind}) cannot be merged: {error}. Load it with PeftModel instead."
        ) from error
    difference = float((_logits(merged, inputs) - before).abs().max() / before.abs().max())
    if not difference <= _tolerance(merged.dtype):
        raise ValueError(
            f"The merged model does not answer as the adapter does: its logits differ by {difference:.1e} of the largest "
            f"({_tolerance(merged.dtype):.1e} is what {str(merged.dtype).removeprefix('torch.')} rounds). Nothing was "
            "written. Merge in float32 (dtype=torch.float32, --dtype float32); if that differs too, load the adapter "
            "with PeftModel instead."
        )
    on_step(f"Saving to {output}…")
    with written_aside(output) as partial:
        merged.save_pretrained(partial)
        processor.save_pretrained(partial)
    return difference


def base_of(adapter: str | os.PathLike) -> str:
    """The base that is written in an adapter.

    Raises:
        OSError: there is no adapter.
        ValueError: its base is not written in it, or no longer where it was.
    """
    peft = import_peft()
    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f" Adapters inside it: {', '.join(inside)}." if inside else ""
        raise FileNotFoundError(f"{adapter} is no adapter: it has no adapter_config.json.{hint}")
    try:
        base = peft.PeftConfig.from_pretrained(os.fspath(adapter)).base_model_name_or_path
    except ValueError as error:  # how PEFT says that there is no such repository
        raise OSError(f"{adapter} is no folder with an adapter, and could not be had from the Hub: {error}") from error
    if not base:
        raise ValueError(f"{adapter} does not say what it was trained on. Pass that model as base (--base).")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise ValueError(
            f"{adapter} was trained on {base}, which is no longer there. Pass that model as base (--base)."
        )
    return base


def load_adapted(
    adapter: str | os.PathLike,
    base: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base with an adapter, as a `peft.PeftModel`, and the processor: the adapter's own if it has one.

    Raises:
        ValueError: the base has not what the adapter is for.
    """
    from transformers import AutoModelForCausalLM, AutoProcessor

    peft = import_peft()
    arguments = {"trust_remote_code": trust_remote_code, **({} if dtype is None else {"dtype": dtype})}
    model = AutoModelForCausalLM.from_pretrained(base, **arguments)
    try:
        adapted = peft.PeftModel.from_pretrained(model, os.fspath(adapter), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The adapter {adapter} does not fit {base}: {reason} Pass the model that it was trained on as base (--base)."
        ) from error
    with_processor = (Path(adapter) / "processor_config.json").is_file()
    return adapted.eval(), AutoProcessor.from_pretrained(
        adapter if with_processor else base, trust_remote_code=trust_remote_code
    )


def _logits(model: torch.nn.Module, inputs) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs.to(model.device, model.dtype)).logits.float()


def _tolerance(dtype: torch.dtype) -> float:
    return FLOAT32_TOLERANCE if dtype == torch.float32 else LAST_PLACES * torch.finfo(dtype).eps
