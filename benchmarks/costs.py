"""Time and memory of a composed model beside LLaVA's: one function for each thing that is compared."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from llava_pair import (
    Sizes,
    build_native,
    build_ours,
    build_pair,
    compose_ours,
    make_inputs,
    training_step,
)
from measure import PeakMemory, Ratio, alternate, in_fresh_process, peak_of_step, ratio_of, seconds_of, synchronize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import StoppingCriteria


#: Ours divided by LLaVA's, at most, by the name of the line.
TARGETS = {"prefill": 1.03, "decoding per token": 1.03, "training step": 0.5, "training peak memory": 0.7}


@dataclass
class Setting:
    """Where and how everything runs. `clock` is one of `measure.CLOCKS`."""

    device: torch.device
    dtype: torch.dtype
    seed: int
    clock: Callable[[], float]


class TokenClock(StoppingCriteria):
    """Notes the time after each generated token, by the public way that `generate` has for this. Stops nothing."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs) -> torch.Tensor:
        synchronize(input_ids.device)
        self.times.append(self.clock())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def prefill_seconds(model: nn.Module, inputs: dict[str, torch.Tensor], clock: Callable[[], float]) -> float:
    """Time of one forward over picture and prompt, asked for as `generate` asks: with a cache, and the last logits."""
    with torch.no_grad():
        return seconds_of(lambda: model(**inputs, use_cache=True, logits_to_keep=1), model.device, clock)


def seconds_per_token(
    model: nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int, clock: Callable[[], float]
) -> float:
    """Mean time of a decoding step in `generate`, from the first generated token on: the prompt's own time is out."""
    token_clock = TokenClock(clock)
    model.generate(**inputs, max_new_tokens=new_tokens + 1, stopping_criteria=[token_clock])
    times = token_clock.times
    if len(times) != new_tokens + 1:
        raise RuntimeError(f"Generation stopped after {len(times)} of {new_tokens + 1} tokens.")
    return (times[-1] - times[0]) / new_tokens


def compare_inference(
    name: str, sizes: Sizes, vocab_size: int, setting: Setting, pairs: int, tick: Callable[[], None]
) -> dict:
    """`"prefill"` or `"decoding per token"` of one sample with one picture, where what a wrapper adds weighs most."""
    ours, native = build_pair(sizes, vocab_size, setting.dtype, setting.device, setting.seed)
    inputs = make_inputs(ours.config, sizes, [1], setting.device, setting.dtype, setting.seed)
    functions = {
        "prefill": lambda model: prefill_seconds(model, inputs, setting.clock),
        "decoding per token": lambda model: seconds_per_token(model, inputs, sizes.new_tokens, setting.clock),
    }
    return _timed(name, functions[name], ours, native, pairs, tick)


def compare_training(
    sizes: Sizes, vocab_size: int, setting: Setting, pairs: int, tick: Callable[[], None]
) -> list[dict]:
    """A training step, and the operations of its matrix products, which say what time it could take at best."""
    ours, native = build_pair(sizes, vocab_size, setting.dtype, setting.device, setting.seed)
    inputs = _training_inputs(ours.config, sizes, setting.device, setting.dtype, setting.seed)
    steps = {id(model): training_step(model, inputs) for model in (ours, native)}
    line = _timed(
        "training step",
        lambda model: seconds_of(steps[id(model)], setting.device, setting.clock),
        ours,
        native,
        pairs,
        tick,
    )
    operations = []
    for model in (ours, native):
        with FlopCounterMode(display=False) as counter:
            steps[id(model)]()
        operations.append(counter.get_total_flops())
    return [line, make_line("training operations", *operations, "FLOP")]


def compare_memory(sizes: Sizes, vocab_size: int, setting: Setting) -> list[dict]:
    """Peak memory of a training step, each side alone in a process of its own."""
    config = compose_ours(sizes, vocab_size, setting.dtype, setting.seed).config
    gc.collect()  # this process's models must not press on the ones to be measured
    ours, native = (
        in_fresh_process(
            training_memory, side, config, sizes, setting.dtype, setting.device, setting.seed, torch.get_num_threads()
        )
        for side in ("ours", "native")
    )
    lines = [
        make_line("training peak memory", ours.total, native.total, "B"),
        make_line("- added by the step", ours.increment, native.increment, "B"),
    ]
    if ours.libraries:
        lines.append(make_line("- with the libraries", ours.peak, native.peak, "B"))
    return [{**line, "method": ours.method} for line in lines]


def training_memory(
    side: str, config, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, threads: int
) -> PeakMemory:
    """Peak memory of a training step of one side, `"ours"` or `"native"`: the only model of this process."""
    torch.set_num_threads(threads)
    build = build_ours if side == "ours" else build_native

    def make_step() -> Callable[[], None]:
        torch.manual_seed(seed)
        model = build(config, dtype).to(device)
        return training_step(model, _training_inputs(config, sizes, device, dtype, seed))

    transformers.logging.set_verbosity_error()
    return peak_of_step(make_step, device)


def make_line(name: str, ours: float, native: float, unit: str, spread: Ratio | None = None) -> dict:
    """One line of the report. `passed` is `None` where there is no target."""
    ratio = spread.median if spread else ours / native
    target = TARGETS.get(name)
    line = {"name": name, "unit": unit, "ours": ours, "native": native, "ratio": ratio, "target": target}
    if spread:
        line |= {"quartiles": spread.quartiles, "interval": spread.interval, "pairs": spread.pairs}
    line["passed"] = None if target is None else ratio <= target
    return line


def _training_inputs(
    config, sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    return make_inputs(config, sizes, [1] * sizes.batch_size, device, dtype, seed, sizes.answer_tokens)


def _timed(name: str, function, ours: nn.Module, native: nn.Module, pairs: int, tick: Callable[[], None]) -> dict:
    values = alternate(lambda: function(ours), lambda: function(native), pairs, tick)
    ratio = ratio_of(*values)
    return make_line(name, ratio.ours, ratio.native, "s", ratio)
