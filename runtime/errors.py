"""Errors a user can cause: one line on stderr that says what is wrong and what to do, and exit code 2."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from tqdm import tqdm

EXIT_INTERRUPTED = 130  # the exit code that a shell shows for Ctrl-C


class UserError(Exception):
    """Something the user gave cannot work; the message says what is wrong and what to do.

    Args:
        everywhere: every process raises this same error, so one on each node prints it
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Turn errors raised while reading what the user gave into a UserError."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def user_output(path: str | Path, advice: str) -> Iterator[None]:
    """Turn the error of a file or folder that cannot be written into a UserError that ends with advice."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; {advice}") from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit code 2.

    The line names the rank, unless all ranks fail alike and one on each node speaks for them. The process group is
    destroyed only when main returns or calls sys.exit, which all processes do together. A process that fails alone must
    not destroy it: NCCL would first wait for the others, and these may be waiting for this one.
    """
    rank = int(os.environ.get("RANK", 0))
    who = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may have bytes that no encoding has
    try:
        main()
    except SystemExit:
        destroy_processes()
        raise
    except UserError as error:
        if not error.everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            say(f"error: {'' if error.everywhere else who}{error}")
        exit_alone(2)
    except KeyboardInterrupt:
        say(f"{who}interrupted")
        exit_alone(EXIT_INTERRUPTED)
    except Exception as error:
        if is_lost_connection(error):
            say(f"{who}lost the connection to another process, whose own message says why")
        elif dist.is_initialized():
            say(f"{who}{type(error).__name__}")
            traceback.print_exc()
        else:
            raise
        exit_alone(1)
    destroy_processes()


def say(message: str) -> None:
    """Print one line about this script on stderr, below a progress bar: this process's, or rank 0's."""
    start = "" if int(os.environ.get("RANK", 0)) == 0 else "\n"
    tqdm.write(f"{start}{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)


def note(message: str) -> None:
    """Print a line that is no error, on the main process."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"note: {message}", file=sys.stdout)
        sys.stdout.flush()


def is_lost_connection(error: Exception) -> bool:
    """Return True for the error that a collective call raises because another process has died."""
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"gloo|Connection (closed|reset)", str(error)))


def exit_alone(code: int) -> NoReturn:
    """End this process without waiting for the others; a checkpoint that is being written is finished first."""
    if dist.is_initialized():
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a normal exit would take the process group down, and wait for the others
    sys.exit(code)


def destroy_processes() -> None:
    """Take the process group down. All processes must come here: NCCL waits for them."""
    if dist.is_initialized():
        dist.destroy_process_group()
