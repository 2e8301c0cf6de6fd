"""Tensors of all processes, for losses that compare samples with one another."""

import torch
import torch.distributed
from accelerate.utils import gather, pad_across_processes
from torch.distributed.nn.functional import all_gather


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks; the tensor itself where there is one process.

    Every process must call it, with any number of rows; those that need a gradient in one process need one in all. Gradients
    of all processes' losses are added up, so that with the mean over processes that data-parallel training takes, the
    gradient is that of one process with all rows.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return tensor
    sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = pad_across_processes(tensor)
    parts = all_gather(padded) if tensor.requires_grad else gather(padded[None])
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])
