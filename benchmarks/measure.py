"""Time two things fairly against one another, and measure the peak memory of one."""

import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


#: Pairs before the counted ones: memory is mapped, kernels are chosen, caches are filled.
WARMUP_PAIRS = 1

#: Clocks to time with. On a CPU shared with other programs, `process` leaves out the time that these ran.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one call, on one of `CLOCKS`."""
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def alternate(
    ours: Callable[[], float], native: Callable[[], float], pairs: int, tick: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Call both in turn, ours then native, and return what each returned; the first `WARMUP_PAIRS` are not counted.

    Taking turns lets both see the same machine: a clock that drops or another process hits neighbours alike, and the
    ratio of a pair stays. `tick` is called after each pair.
    """
    our_values, native_values = [], []
    for pair in range(-WARMUP_PAIRS, pairs):
        # A collection in the middle of one side would be charged to that side alone.
        gc.collect()
        our_value = ours()
        gc.collect()
        native_value = native()
        if pair >= 0:
            our_values.append(our_value)
            native_values.append(native_value)
        tick()
    return our_values, native_values


@dataclass
class Ratio:
    """Ours divided by native, pair by pair.

    Args:
        ours: Median of our values.
        native: Median of native's values.
        median: Median of the ratios of the pairs.
        quartiles: First and third quartile of the ratios: the spread of single pairs.
        interval: 95 % bootstrap confidence interval of the median: how well the median itself is known.
        pairs: Number of pairs.
    """

    ours: float
    native: float
    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    pairs: int


def ratio_of(our_values: list[float], native_values: list[float], seed: int = 0) -> Ratio:
    """Median and spread of the ratios of pairs."""
    ratios = np.asarray(our_values) / np.asarray(native_values)
    generator = np.random.default_rng(seed)
    resampled = np.median(generator.choice(ratios, size=(2000, len(ratios))), axis=1)
    return Ratio(
        ours=statistics.median(our_values),
        native=statistics.median(native_values),
        median=float(np.median(ratios)),
        quartiles=tuple(float(value) for value in np.quantile(ratios, [0.25, 0.75])),
        interval=tuple(float(value) for value in np.quantile(resampled, [0.025, 0.975])),
        pairs=len(ratios),
    )


@dataclass
class PeakMemory:
    """Memory of a process around one step, in bytes.

    Args:
        method: How it was measured.
        libraries: In use before any model was built: the interpreter and the libraries. 0 where these are not counted.
        before: In use right before the step.
        peak: The most in use during the step.
    """

    method: str
    libraries: int
    before: int
    peak: int

    @property
    def total(self) -> int:
        """All that the model and its step took at the worst moment: weights, optimizer and what the step adds."""
        return self.peak - self.libraries

    @property
    def increment(self) -> int:
        """What the step added to what was there before it."""
        return self.peak - self.before


class PeakMeter:
    """Reads memory in use and its peak since `reset`.

    On CUDA, the allocator's own counters. On Linux, the resident set of the process, whose high-water mark the kernel
    keeps and resets on request. Elsewhere `ru_maxrss`, which cannot be reset: there the peak is right as long as
    nothing before the step took more, so building the models must stay below a training step.
    """

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, device: torch.device):
        self.device = device
        self.resets = device.type == "cpu" and self._try_reset()
        if device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
        elif self.resets:
            self.method = "VmHWM of /proc/self/status, reset right before the step"
        else:
            self.method = "ru_maxrss, over the whole process"

    def in_use(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS") if self._STATUS.exists() else self.peak()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.resets:
            self._CLEAR.write_text("5")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.resets:
            return self._status("VmHWM")
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _status(self, key: str) -> int:
        for line in self._STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"{self._STATUS} has no {key}.")

    def _try_reset(self) -> bool:
        """Whether the kernel lets a process reset its own high-water mark (5: "reset the peak resident set size")."""
        try:
            self._CLEAR.write_text("5")
        except OSError:
            return False
        return "VmHWM:" in self._STATUS.read_text()


def peak_of_step(make_step: Callable[[], Callable[[], Any]], device: torch.device) -> PeakMemory:
    """Peak memory of the second step that `make_step` builds.

    The first step is not measured: it makes the optimizer's state and whatever is made once.
    """
    meter = PeakMeter(device)
    _return_freed_memory()
    libraries = meter.in_use()
    step = make_step()
    step()
    gc.collect()
    synchronize(device)
    before = meter.in_use()
    meter.reset()
    step()
    synchronize(device)
    return PeakMemory(meter.method, libraries, before, meter.peak())


def _return_freed_memory() -> None:
    """Make glibc give freed blocks of 64 KiB and more back at once, so that the resident set is what is in use.

    Left alone it keeps freed memory for later, which would count with the weights. Elsewhere nothing changes.
    """
    m_mmap_threshold = -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(m_mmap_threshold, 64 * 1024)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a new process and return its result, so that no memory of this one is counted.

    `function` must be importable by name.
    """
    # "spawn" starts a new interpreter; a fork would begin with this process's memory.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()
