"""Pictures of several domains in the same batches, those of one with answers, those of the others without."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .collator import place_media


class MixedDomains(torch.utils.data.Dataset):
    """Each item is a list: a sample of the source, with its answers, and one of each target, without. `AnyVlmDataCollator`
    takes such lists, so every batch holds equally many pictures of each domain: `per_device_train_batch_size` counts lists.
    An epoch is one of the largest of the data sets; the others begin again.

    Args:
        source: Samples with answers, as `AnyVlmDataCollator` takes them; anything with a length and indices.
        targets: By the name of their domain, samples of which only what stands before the first answer is used: nothing is
            learnt from answers that they may have.
        source_domain: The name of the source's.
        column: Where the name is put in each sample, for `DomainAdversarialObjective`.
        seed: For which samples come together.

    Raises:
        ValueError: no target, an empty data set, or two domains of one name.
    """

    def __init__(
        self,
        source: Sequence[Mapping[str, Any]],
        targets: Mapping[str, Sequence[Mapping[str, Any]]],
        source_domain: str = "source",
        column: str = "domain",
        seed: int = 0,
    ):
        if not targets:
            raise ValueError("targets names no domain. Pass the pictures without answers: targets={'sketches': …}.")
        if source_domain in targets:
            raise ValueError(
                f"The source and a target are both called {source_domain!r}. Set source_domain to another."
            )
        domains = {source_domain: source, **targets}
        empty = [name for name, samples in domains.items() if len(samples) == 0]
        if empty:
            raise ValueError(f"There is no sample in {', '.join(empty)}.")
        self.source, self.targets = source, dict(targets)
        self.source_domain, self.column = source_domain, column
        # Data sets are often sorted, and pairs of one class would tell of the targets' answers.
        generator = torch.Generator().manual_seed(seed)
        self._orders = {
            name: torch.randperm(len(samples), generator=generator).tolist() for name, samples in domains.items()
        }

    def __len__(self) -> int:
        return max(map(len, self._orders.values()))

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} lists of samples, and no number {index}.")

        def sample_of(name: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            order = self._orders[name]
            return {**samples[order[index % len(order)]], self.column: name}

        return [
            sample_of(self.source_domain, self.source),
            *(without_answers(sample_of(name, samples)) for name, samples in self.targets.items()),
        ]


def without_answers(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample up to its first answer, with the pictures and videos that are shown until then."""
    placed, media = place_media(sample)
    roles = [message["role"] for message in placed]
    end = roles.index("assistant") if "assistant" in roles else len(placed)
    kept = {**sample, "messages": placed[:end]}
    for kind, found in media.items():
        if sample.get(f"{kind}s"):
            kept[f"{kind}s"] = found[: sum(_count(message["content"], kind) for message in placed[:end])]
    return kept


def _count(content: Any, kind: str) -> int:
    if isinstance(content, str):
        return content.count(f"<{kind}>")
    return sum(block.get("type") == kind for block in content or [])
