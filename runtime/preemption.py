"""Ending a run early: SIGTERM and SIGUSR1, which clusters send before they take a machine away, and Ctrl-C (SIGINT)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75, "try again later" in sysexits.h
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO = 1.0  # seconds in which a second signal counts as the first one: Slurm and torchrun both send it


class Preempted(Exception):
    """Something that may be left out was interrupted."""


class Preemption:
    """While it is entered, SIGTERM, SIGUSR1 and SIGINT set `requested`; a second signal ends the process at once.

    Until `working` is set there is nothing to save, and the first signal ends the process as well. Under torchrun the
    death of its agent counts as a signal: a run without one would go on beside the run that takes its place.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.working = False
        self._time = 0.0
        self._before: dict[int, Any] = {}
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def requested(self) -> bool:
        """Return True when the run should save and end."""
        return self.signal is not None or self._agent not in (None, os.getppid())

    @property
    def exit_code(self) -> int:
        """Exit code of a run that has saved and ends before its last step."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else EXIT_PREEMPTED

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.working:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os._exit(EXIT_PREEMPTED)
        if self.signal is not None and (self._agent is None or time.monotonic() > self._time + ECHO):
            os._exit(128 + number)  # what a shell shows for a process that died of this signal
        if self.signal is None:
            self.signal, self._time = number, time.monotonic()
            if number == signal.SIGINT and int(os.environ.get("RANK", 0)) == 0:
                os.write(2, b"\ninterrupted: saving after this step; Ctrl-C again ends at once and saves nothing\n")

    def __enter__(self) -> Preemption:
        numbers = (*PREEMPTION_SIGNALS, signal.SIGINT)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # All is saved: when one process ends, torchrun sends SIGTERM to the others, which should end likewise.
            signal.signal(number, signal.SIG_IGN if isinstance(error, SystemExit) else handler)


def ignore_preemption_signals(worker: int) -> None:
    """In a loader's worker process: leave signals that whole process groups are sent to the main process.

    A worker that died would end the run before it can save. Its parent still ends it, by the same SIGTERM.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where nobody is preempted
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process().pid

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
