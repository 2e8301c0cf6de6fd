"""Training loops that take turns: one step of each, and no two at a time."""

import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from measure import synchronize
from transformers import Trainer, TrainerCallback


class _Turn(TrainerCallback):
    """Ends a trainer's turn with each of its steps, and notes how long it took.

    A turn is all that a training loop does for a step: reading and collating the next batch, the step, the log.
    """

    def __init__(self, turns: "Turns", number: int):
        self.turns, self.number = turns, number
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(args.device)
        self.seconds.append(self.turns.clock() - self.started)
        # A collection in the middle of one side would be charged to that side alone.
        gc.collect()
        self.turns.pass_on(self.number)
        self.begin()

    def begin(self) -> None:
        self.turns.wait_for(self.number)
        self.started = self.turns.clock()


class Turns:
    """Runs trainers step by step in turn, each in a thread of its own, of which one runs at a time.

    So all see the same machine, and each is HF `Trainer` as it is. All must have the same number of steps.

    Args:
        trainers: Not yet begun.
        clock: One of `measure.CLOCKS`.
        tick: Called after each step.
    """

    def __init__(self, trainers: Sequence[Trainer], clock: Callable[[], float], tick: Callable[[], None]):
        self.clock, self.tick = clock, tick
        self.trainers = list(trainers)
        self._may_go = [threading.Semaphore(0) for _ in trainers]
        self._failed = False
        self._turns = [_Turn(self, number) for number in range(len(self.trainers))]

    def run(self) -> list[list[float]]:
        """Seconds of each step of each trainer."""
        for trainer, turn in zip(self.trainers, self._turns):
            trainer.add_callback(turn)
        with ThreadPoolExecutor(len(self.trainers)) as threads:
            running = [threads.submit(self._train, number) for number in range(len(self.trainers))]
            self._may_go[0].release()
        for future in running:
            if not isinstance(future.exception(), _Stopped):
                future.result()
        return [turn.seconds for turn in self._turns]

    def wait_for(self, number: int) -> None:
        self._may_go[number].acquire()
        if self._failed:
            raise _Stopped

    def pass_on(self, number: int) -> None:
        self.tick()
        self._may_go[(number + 1) % len(self._may_go)].release()

    def _train(self, number: int) -> None:
        try:
            self._turns[number].begin()
            self.trainers[number].train()
        except BaseException:
            self._failed = True
            for semaphore in self._may_go:
                semaphore.release()
            raise
        self._may_go[(number + 1) % len(self._may_go)].release()


class _Stopped(Exception):
    """Another trainer failed."""


def losses(trainer: Trainer) -> list[float]:
    """The loss of each step, as the trainer logged it."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def release(trainer: Trainer) -> None:
    """Let go of what a trainer holds: its model, gradients and optimizer."""
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
