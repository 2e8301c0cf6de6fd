"""Running a part to learn about it: with what, where, and leaving it as it was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool = False) -> Iterator[None]:
    """`eval()` (or `train()`) for a while; then each module's mode as it was."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def num_channels(config: PreTrainedConfig) -> int:
    return getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3


def synthetic_pictures(num_pictures: int, channels: int, image_size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Random pictures `(num_pictures, channels, height, width)`, normalised, with the 1/f spectrum of natural images.

    White noise would put a tower far from where it works; natural pictures have amplitude falling as 1/frequency
    (Field 1987, "Relations between the statistics of natural images and the response properties of cortical cells").
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = image_size
    noise = torch.randn(num_pictures, channels, height, width, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width)[None] * width)
    pictures = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp(min=1), s=image_size)
    return pictures / pictures.std()
