"""What `anyvlm.verify` found out: steps, their checks, and the first thing that is wrong."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


PASSED, FAILED, NOT_CHECKED, NOT_REACHED = "passed", "failed", "not checked", "not reached"


@dataclass
class CheckResult:
    """One check.

    Args:
        name: Short, unique within its step.
        status: `"passed"`, `"failed"`, `"not checked"` (`detail` says why) or `"not reached"` (something before it failed).
        detail: What was found, in a sentence.
        figures: What was measured, JSON-able.
        tolerance: The largest difference (or the bounds) that passes; `None` where things must be equal.
        tolerance_reason: Why that much.
        advice: What to do when it fails.
    """

    name: str
    status: str = NOT_REACHED
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    tolerance: Any = None
    tolerance_reason: str | None = None
    advice: str = ""


@dataclass
class StepResult:
    """One step: checks about one part of the model.

    Args:
        name: `"checkpoint"`, `"language_model"`, `"vision_tower"`, `"projector"`, `"processor"` or `"whole"`.
        title: The same for people.
        checks: In the order in which they were made.
    """

    name: str
    title: str
    checks: list[CheckResult]

    @property
    def status(self) -> str:
        """`"failed"` if any check failed; `"passed"` if any passed and none failed; else that of all."""
        found = [check.status for check in self.checks]
        return next(status for status in (FAILED, PASSED, NOT_CHECKED, NOT_REACHED) if status in found)


@dataclass
class VerificationReport:
    """Whether a composed model is what its sources make of it, step by step.

    Args:
        checkpoint: What was verified, as text.
        against: Each source, as text, and what it was compared with: `{"source": …, "as": …}`.
        steps: In order.
        notes: What is worth knowing and no failure.
        seconds: How long this took.
    """

    checkpoint: str
    against: list[dict[str, str]]
    steps: list[StepResult]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """No check failed (some may not have been made; each says why)."""
        return self.first_failure is None

    @property
    def first_failure(self) -> tuple[str, str] | None:
        """Names of the first step and check that failed."""
        return next(((step.name, check.name) for step, check in self._checks() if check.status == FAILED), None)

    def check(self, step: str, name: str) -> CheckResult:
        """A check by the names of its step and itself."""
        return next(check for own, check in self._checks() if (own.name, check.name) == (step, name))

    def verdict(self) -> str:
        """One sentence, and what to do."""
        for step, check in self._checks():
            if check.status == FAILED:
                return f"First failure: {step.title.lower()}, {check.name}: {check.detail} {check.advice}".strip()
        unchecked = sum(check.status == NOT_CHECKED for _, check in self._checks())
        if not unchecked:
            return "Nothing is wrong."
        return (
            f"Nothing is wrong, as far as it was checked ({unchecked} {'check' if unchecked == 1 else 'checks'} could "
            "not be made)."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able; numbers that are not finite as text."""
        values = _finite(asdict(self))
        for step, own in zip(self.steps, values["steps"]):
            own["status"] = step.status
        first = self.first_failure
        return {"passed": self.passed, "first_failure": list(first) if first else None, **values}

    def lines(self) -> list[tuple[str, str, str, str]]:
        """`(step, check, status, what was found)` for each check; the step is named once."""
        rows, last = [], None
        for step, check in self._checks():
            rows.append(("" if step is last else step.title, check.name, check.status, check.detail))
            last = step
        return rows

    def __str__(self) -> str:
        lines = []
        for title, name, status, detail in self.lines():
            lines += [title] if title else []
            lines.append(f"  {status:11}  {name}" + (f": {detail}" if detail else ""))
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes), self.verdict()])

    def _checks(self) -> Iterator[tuple[StepResult, CheckResult]]:
        for step in self.steps:
            for check in step.checks:
                yield step, check


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
