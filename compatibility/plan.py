"""Which pairs are measured, and in what order: every type with a fixed partner, then random pairs of what works."""

import random
from collections.abc import Callable, Iterable
from typing import Any

from .journal import Journal
from .pair_checks import FAILS, WORKS, PairResult
from .worker_processes import run_in_processes


#: The parts that every type of the other kind is measured with: plain ones, without marks of their own.
TOWER = "clip_vision_model"
LANGUAGE_MODEL = "llama"

#: Vision type and language model type, and how they are joined where it is not the usual way.
Pair = tuple[str, ...]
Result = dict[str, Any]


def type_pairs(vision_types: Iterable[str], text_types: Iterable[str]) -> list[Pair]:
    """Every vision type with one language model, every language model type with one tower."""
    return list(
        dict.fromkeys(
            [*((vision, LANGUAGE_MODEL) for vision in vision_types), *((TOWER, text) for text in text_types)]
        )
    )


def random_pairs(vision_types: Iterable[str], text_types: Iterable[str], count: int, seed: int) -> list[Pair]:
    """`count` different pairs of the given types, or as many as there are; none of those of `type_pairs`."""
    pairs = [
        (vision, text)
        for vision in sorted(set(vision_types) - {TOWER})
        for text in sorted(set(text_types) - {LANGUAGE_MODEL})
    ]
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def working_types(results: dict[Pair, Result]) -> tuple[list[str], list[str]]:
    """Vision types and language model types that work with their fixed partner."""
    works = [pair for pair, result in results.items() if result["status"] == WORKS]
    vision = sorted(vision for vision, text in works if text == LANGUAGE_MODEL)
    text = sorted(text for vision, text in works if vision == TOWER)
    return vision, text


def measure(
    pairs: Iterable[Pair],
    journal: Journal,
    check: Callable[..., Result],
    num_workers: int,
    timeout: float,
    memory: int | None,
    on_result: Callable[[Result], None],
) -> dict[Pair, Result]:
    """Results of the pairs: from the journal where it has them, else measured, each in a process of its own.

    Args:
        check: Gives the result of a vision type, a language model type, and a combination where the pair has one.
        on_result: Called with every result, known or new.
    """
    pairs = list(pairs)
    results = {pair: journal.results[pair] for pair in pairs if pair in journal.results}
    for result in results.values():
        on_result(result)
    waiting = [pair for pair in pairs if pair not in results]
    for pair, ending in run_in_processes(lambda pair: check(*pair), waiting, num_workers, timeout, memory):
        result = ending.result
        if result is None:
            failed = {"process": ending.failure}
            result = PairResult(*pair, status=FAILS, reason=ending.failure, failed=failed).to_dict()
        journal.add(result)
        results[pair] = result
        on_result(result)
    return results
