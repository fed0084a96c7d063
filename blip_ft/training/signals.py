"""Stop on SIGINT and SIGTERM after a step, in the main process and in the workers of data loaders."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import dropwhile
from typing import Any

from transformers import Trainer, TrainerCallback

from blip_ft.arguments import BlipTrainingArguments

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """Raised between two steps, when weights, optimizer and random state are consistent."""


class Signals:
    """Delays SIGINT and SIGTERM until a step has ended; a second SIGINT stops at once.

    The Trainer's enable_jit_checkpoint (5.23) is not used: it ignores SIGINT, exits with 0 and supports one process.
    """

    received: int | None = None

    def __enter__(self) -> Signals:
        self.process = os.getpid()
        in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
        self.previous = {
            number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM) if in_main
        }
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        unblock_sigterm()

    def _remember(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            return  # in a worker, which the current step still needs
        if number == self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        logger.warning("%s: stopping after this step.", signal.Signals(number).name)

    def stop_if_received(self) -> None:
        if self.received:
            raise Stopped


def ignore_signals_in_worker(worker: int, init: Callable[[int], None] | None = None) -> None:
    """A worker_init_fn: workers ignore SIGINT and SIGTERM so that the current step can finish; the parent stops them.

    Terminals send SIGINT, and timeout, torchrun and Slurm send SIGTERM, to workers too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # other systems do not report the sender of a signal
        block_sigterm()
        threading.Thread(target=_end_by_parent, daemon=True).start()
    if init:
        init(worker)


@contextmanager
def explain_lost_worker(how_to_resume: Callable[[], str]) -> Iterator[None]:
    """Turn the error of a data loader's worker that was killed or failed into one message.

    how_to_resume: returns the last sentences of the message.
    Raises: ChildProcessError; ValueError if the worker raised one, which is a mistake of the user.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        if "DataLoader worker" not in text:
            raise
        kind: type[Exception] = ChildProcessError
        # torch includes the exception of the worker, with its traceback
        if " in DataLoader worker process" not in text:
            reason = (
                f"A worker process that loads images has ended ({text.splitlines()[0].strip()}). Usually the system "
                "has killed it because memory ran out: lower --dataloader_num_workers, or the batch size"
            )
        elif "/torch_" in text and "No space left" in text:
            reason = (
                "The worker processes that load images have too little shared memory (/dev/shm). Give the container "
                "more (docker run --shm-size), or set --dataloader_num_workers 0"
            )
        else:
            kind = ValueError if isinstance(error, ValueError) else kind
            lines = text.splitlines()
            place = max(number for number, line in enumerate(lines) if line.startswith('  File "'))
            said = "\n".join(dropwhile(lambda line: line.startswith(" "), lines[place:])).strip()
            reason = f"A worker process that loads images failed: {said.removeprefix('ValueError: ').removesuffix('.')}"
        raise kind(f"{reason}. {how_to_resume()}") from error


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def block_sigterm() -> None:
    """Block SIGTERM while workers start: they inherit the mask, and would be killed before worker_init_fn runs."""
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def unblock_sigterm() -> None:
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class StopCallback(TrainerCallback):
    """Stops all processes after the same step, and blocks SIGTERM while the workers of an epoch start."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        block_sigterm()

    def on_step_begin(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        unblock_sigterm()  # the first batch has arrived, so all workers have started

    def on_step_end(self, args: BlipTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        signals, accelerator = self.trainer.signals, self.trainer.accelerator
        if args.world_size > 1:
            # processes may receive a signal at different steps
            if signals.received:
                accelerator.set_trigger()
            if accelerator.check_trigger():
                signals.received = signals.received or signal.SIGTERM
        signals.stop_if_received()
