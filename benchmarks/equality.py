"""Do the composed model and LLaVA compute the same? Each check gives one number and the limit it must keep."""

from dataclasses import dataclass

import torch
from llava_pair import Sizes, make_inputs, native_name
from torch import nn


@dataclass
class Check:
    """One comparison.

    Args:
        name: What is compared, and how the number is made.
        value: The difference found.
        limit: The largest that passes.
    """

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # false for NaN


def check_equality(ours: nn.Module, native: nn.Module, sizes: Sizes, seed: int) -> list[Check]:
    """Logits, loss, gradients and generated tokens, for samples of one, two and one pictures, padded on the left.

    In fp32, and in eval mode.
    """
    device = ours.device
    inputs = make_inputs(ours.config, sizes, [1, 2, 1], device, ours.dtype, seed, sizes.answer_tokens)
    labels = inputs.pop("labels")
    # Ours counts positions without the padding, as `generate` does for every model. LLaVA's forward counts the padding
    # unless it is told, so it is told.
    mask = inputs["attention_mask"]
    native_inputs = {**inputs, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}

    with torch.no_grad():
        our_logits, native_logits = ours(**inputs).logits, native(**native_inputs).logits
        # Generation must not depend on the difference that is left here: ours never generates its placeholder, and
        # LLaVA must be told not to.
        our_tokens = ours.generate(**inputs, max_new_tokens=16)
        native_tokens = native.generate(**inputs, max_new_tokens=16, suppress_tokens=[ours.config.image_token_id])
    checks = [
        Check("logits, largest absolute difference", _largest_difference(our_logits, native_logits), 1e-5),
        Check("16 greedy tokens a sample, how many differ", float((our_tokens != native_tokens).sum()), 0),
    ]
    # Without room for 16 new tokens in both, the comparison above would be of nothing.
    if our_tokens.shape != (3, mask.shape[1] + 16):
        raise RuntimeError(f"Generation gave {tuple(our_tokens.shape)}, not 16 tokens for each of 3 samples.")

    # Ours computes logits only where there is a label, LLaVA everywhere; the loss and its gradients are the same.
    our_loss = ours(**inputs, labels=labels).loss
    native_loss = native(**native_inputs, labels=labels).loss
    our_loss.backward()
    native_loss.backward()
    checks.append(Check("loss, absolute difference", float((our_loss - native_loss).detach().abs()), 1e-5))
    checks.append(Check("gradients, largest relative difference", _gradient_difference(ours, native), 1e-5))
    for model in (ours, native):
        model.zero_grad(set_to_none=True)
    return checks


def _largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.float() - second.float()).abs().max())


def _gradient_difference(ours: nn.Module, native: nn.Module) -> float:
    """The largest ||ours - native|| / ||native|| over all parameters.

    Some gradients are zero but for rounding (the bias of a key shifts every score of a softmax alike), and rounding
    has no relative accuracy. So no parameter is judged more strictly than one whose elements have 1e-4 of the root
    mean square of all gradients. Parameters that nothing reads (the tower's last layer) must have no gradient on
    either side.
    """
    native_parameters = dict(native.named_parameters())
    pairs = [(name, p, native_parameters[native_name(name)]) for name, p in ours.named_parameters()]
    for name, our_parameter, native_parameter in pairs:
        if (our_parameter.grad is None) != (native_parameter.grad is None):
            raise RuntimeError(f"Only one of the two models gives {name} a gradient.")
    pairs = [pair for pair in pairs if pair[1].grad is not None]
    square = sum(float(theirs.grad.double().square().sum()) for _, _, theirs in pairs)
    rms = (square / sum(theirs.numel() for _, _, theirs in pairs)) ** 0.5
    return max(
        float((our.grad - theirs.grad).double().norm())
        / max(float(theirs.grad.double().norm()), 1e-4 * rms * theirs.numel() ** 0.5)
        for _, our, theirs in pairs
    )
