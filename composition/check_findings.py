"""What `check` collects while it goes through the steps of `compose`: a refusal ends a step, not the whole."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from .compatibility_report import CompatibilityReport
from .compatibility_table import table_row
from .errors import CompositionError
from .nearest import nearest_types_to
from .parts import PartSource, pretrained_name
from .weightless_parts import WeightlessPart, find_config, open_part


class Findings:
    """The report as far as it is known, and why the rest is not.

    Args:
        report: Written into.
    """

    def __init__(self, report: CompatibilityReport):
        self.report = report
        self.unknown: list[str] = []

    @contextlib.contextmanager
    def refusals(self, nearest: Callable[[], list[str]] = list) -> Iterator[None]:
        """Take a refusal of this step down, and what `nearest` says comes nearest and works."""
        try:
            yield
        except CompositionError as error:
            self.report.reasons.append(str(error))
            self.report.nearest += nearest()

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Collect what composing would warn about, instead of showing it."""
        logger = logging.getLogger(__package__)
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.report.notes.append(record.getMessage())
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate

    def find_config(self, kind: str, source: PartSource, trust_remote_code: bool) -> Any:
        """The config, or the instance that was passed; `None` if its code is not trusted."""
        with self.refusals():
            return find_config(kind, source, trust_remote_code)
        return None

    def open(
        self, kind: str, source: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> WeightlessPart | None:
        """The part of a config or an instance; `None` for `None`, and if there is no such part in it."""
        if source is None:
            return None
        config = source.config if isinstance(source, PreTrainedModel) else source
        with self.refusals(lambda: nearest_types_to(kind, config.model_type)):
            part = open_part(kind, source, dtype, trust_remote_code)
            if part.made_causal and pretrained_name(source):
                name, of_a_pair = type(part.model).__name__, getattr(source, "is_encoder_decoder", False)
                self.report.notes.append(
                    f"{name} was trained to read the output of an encoder, which it does without when composed: train the "
                    "language model, not the projector alone."
                    if of_a_pair
                    else f"{name} was trained as an encoder. Composed, it is a causal decoder and must learn to write: "
                    "train the language model, not the projector alone."
                )
            return part
        return None

    def consult_table(self, part: WeightlessPart) -> None:
        """Complete what was run by what the computed table says.

        Raises:
            CompositionError: the table says that the type does not work.
        """
        missing = part.consult_table()
        if missing is not None:
            self.unknown.append(missing)
        row = table_row(part.kind, part.model.config.model_type) or {"marks": []}
        self.report.notes += [f"{type(part.model).__name__}: {mark}." for mark in row["marks"]]

    def finish(self) -> None:
        """Write the verdict."""
        report = self.report
        report.works = False if report.reasons else None if self.unknown else True
        report.reasons = report.reasons or self.unknown
        for name in ("reasons", "nearest", "notes"):
            setattr(report, name, list(dict.fromkeys(getattr(report, name))))
