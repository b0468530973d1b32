"""Checkpoints: complete or absent, verified before a run continues from them, written while training goes on.

    RUN/checkpoints/0001000.pt           {"model", "ema", "opt", "config", "step"}: tensors and plain data
    RUN/checkpoints/0001000.pt.sha256    its digest, in the format of sha256sum -c

The digest is on the disk before the checkpoint gets its name, so a file with a step for a name is a whole one, and any
bit of it that flips later is noticed. A file without a digest (copied alone) is checked by the CRCs of its zip records.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn

from runtime.errors import user_input
from runtime.files import check_tensors, complete_file, tensors_of, with_tensors

PARTS = {"model", "ema", "opt", "config", "step"}
READ_ATTEMPTS = 3
READ_PAUSE = 2.0  # seconds between attempts
CHUNK = 1 << 22  # bytes that are hashed and written at a time

# ---------------------------------------------------------------------------------------------------------------
# Names


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run_dir / "checkpoints" / f"{step:07d}.pt"


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, by their steps."""
    files = [path for path in (run_dir / "checkpoints").glob("*.pt") if re.fullmatch("[0-9]+", path.stem)]
    return sorted(files, key=lambda path: int(path.stem))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of a run with the most steps; complete, but not verified."""
    return next(reversed(checkpoints_of(run_dir)), None)


def describe_newest_checkpoint(run_dir: Path) -> str:
    """Name the newest checkpoint, for the message of a run that fails."""
    kept = newest_checkpoint(run_dir)
    return f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"


def digest_path(path: Path) -> Path:
    """Path of the digest of a checkpoint."""
    return path.with_name(f"{path.name}.sha256")


# ---------------------------------------------------------------------------------------------------------------
# Reading


def find_damage(path: Path) -> str | None:
    """Find out what is wrong with a checkpoint's file; None if every bit is as it was written.

    A file that cannot be read is not damaged: network disks fail for seconds, and what they hold is whole afterwards.

    Raises:
        OSError: if reading fails READ_ATTEMPTS times.
    """
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return _damage(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            if attempt == READ_ATTEMPTS:
                raise OSError(
                    f"cannot read checkpoint {path}: {error.strerror or error}. Nothing was changed: try again, or "
                    "move the file away to go on from an older one"
                ) from error
            time.sleep(READ_PAUSE)


def _damage(path: Path) -> str | None:
    if not digest_path(path).exists():
        try:
            with zipfile.ZipFile(path) as archive:
                record = archive.testzip()
        except OSError:
            raise
        except Exception as error:  # zipfile has half a dozen kinds for bits that flipped in its directory
            return f"it cannot be read: {error or type(error).__name__}"
        return None if record is None else f"its record {record} is damaged"
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    if digest_path(path).read_bytes() != digest_line(path, digest.hexdigest()):
        return f"it does not match {digest_path(path).name}"
    return None


def digest_line(path: Path, digest: str) -> bytes:
    """Content of a checkpoint's digest file."""
    return f"{digest}  {path.name}\n".encode()


def newest_good(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest undamaged checkpoint of a run, and what is wrong with the newer ones.

    Raises:
        ValueError: if there are checkpoints, but all are damaged.
        OSError:    if one cannot be read.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints_of(run_dir)):
        reason = find_damage(path)
        if reason is None:
            return path, damaged
        damaged[path] = reason
    if damaged:
        listed = "; ".join(f"{path}: {reason}" for path, reason in damaged.items())
        raise ValueError(f"no checkpoint of {run_dir} is whole ({listed}): delete them to start this run again")
    return None, damaged


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, and its digest: it counts no more, neither for continuing nor for --keep-last."""
    aside = path.with_name(f"{path.name}.damaged")
    if digest_path(path).exists():
        digest_path(path).replace(digest_path(aside))
    return path.replace(aside)


def find_checkpoint(path: str | Path) -> tuple[Path, dict[Path, str]]:
    """The file that --ckpt means: itself, or the newest good one of a run's folder; and the damaged newer ones.

    Raises:
        FileNotFoundError: if there is none.
        ValueError:        if it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        newest, damaged = newest_good(path)
        if newest is None:
            raise FileNotFoundError(f"{path} holds no checkpoints/*.pt: give a checkpoint, or a run's folder")
        return newest, damaged
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if reason := find_damage(path):
        raise ValueError(f"cannot read checkpoint {path}, is it truncated? {reason}")
    return path, {}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of train.py onto the CPU; find_checkpoint has verified it.

    Raises:
        ValueError: if the file is no checkpoint of this program.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot read checkpoint {path} ({reason})") from error
    if not isinstance(checkpoint, dict) or not set(checkpoint) >= PARTS:
        raise ValueError(
            f"{path} is not a checkpoint of this train.py, which alone can be continued: "
            f"weights of other programs go to --initialize_from (training) or --ckpt (sampling)"
        )
    return checkpoint


def load_networks(checkpoint: dict[str, Any], source: Path, **networks: nn.Module) -> None:
    """Give networks the weights of the checkpoint's parts of the same names.

    Raises:
        UserError: if they do not fit; the message names the tensors.
    """
    with user_input():
        for part, network in networks.items():
            check_tensors(checkpoint[part], network.state_dict(), f"{source}: {part}")
            network.load_state_dict(checkpoint[part])


# ---------------------------------------------------------------------------------------------------------------
# Writing


class HashedFile:
    """A file to torch.save into that knows the digest of what it was given, and the error that stopped it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                self.digest.update(chunk)
                while chunk:  # an unbuffered file may take a part of it
                    chunk = chunk[self.file.write(chunk) :]
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def flush(self) -> None:
        """Nothing is kept back."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain data, and its digest.

    Raises:
        OSError: if the disk does not take it; nothing is left under its name.
    """
    with complete_file(path) as temporary:
        with open(temporary, "wb", buffering=0) as raw:
            file = HashedFile(raw)
            try:
                torch.save(checkpoint, file)
            except RuntimeError:  # in which torch wraps the file's own error
                if file.error is None:
                    raise
                raise file.error from None
            os.fsync(raw.fileno())
        with complete_file(digest_path(path)) as digest:
            digest.write_bytes(digest_line(path, file.digest.hexdigest()))
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(run_dir: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Delete the checkpoints before the last `keep_last`, but not those of every `keep_every`-th step."""
    for path in checkpoints_of(run_dir)[:-keep_last] if keep_last else []:
        if not keep_every or int(path.stem) % keep_every:
            path.unlink(missing_ok=True)
            digest_path(path).unlink(missing_ok=True)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed process had not finished writing."""
    for path in (run_dir / "checkpoints").glob(".[0-9]*"):
        path.unlink(missing_ok=True)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time, while training goes on.

    The thread first copies the tensors to the host, into buffers that are kept for the next time (pinned ones for
    CUDA), then writes the copy. Training may compute with the tensors meanwhile; before it changes them it calls
    wait_copied(). That is a whole forward and backward pass after save(), so usually there is nothing to wait for.

    The thread is no daemon: a program that ends, for whatever reason, waits for the file.

    Args:
        run_dir:    the run's folder
        keep_last:  how many of the last checkpoints to keep; None for all
        keep_every: keep those of every so many steps as well
        tell:       is given a line about each checkpoint, in the thread
    """

    def __init__(
        self,
        run_dir: Path,
        keep_last: int | None = None,
        keep_every: int | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.tell = tell
        self._buffers: list[torch.Tensor] = []
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._failed: str | None = None  # why the last checkpoint was not written
        self._error: BaseException | None = None  # what nobody expected

    def save(self, step: int, checkpoint: dict[str, Any]) -> None:
        """Start writing the checkpoint of a step; the one before it is waited for."""
        self.wait()
        sources = [tensor.detach() for tensor in tensors_of(checkpoint)]
        changed = next((tensor.device for tensor in sources if tensor.is_cuda), None)
        ready = torch.cuda.current_stream(changed).record_event() if changed else None
        plain = with_tensors(checkpoint, iter(sources))  # what is no tensor is copied here and now
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(step, plain, sources, ready), name="checkpoint")
        self._thread.start()

    def wait_copied(self) -> None:
        """Wait until the tensors given to save() may change."""
        self._copied.wait()

    def wait(self) -> str | None:
        """Wait for the file; returns why it could not be written, None if it was."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
        return self._failed

    def _run(self, step: int, plain: Any, sources: list[torch.Tensor], ready: torch.cuda.Event | None) -> None:
        path = checkpoint_path(self.run_dir, step)
        self._failed = None
        try:
            try:
                self._copy(sources, ready)
            finally:
                self._copied.set()
            needed = sum(buffer.nbytes for buffer in self._buffers) + CHUNK
            free = shutil.disk_usage(path.parent).free
            if free < needed:
                raise OSError(f"the disk is full: it takes {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")
            save_checkpoint(path, with_tensors(plain, iter(self._buffers)))
            self.tell(f"saved {path}")
            prune(self.run_dir, self.keep_last, self.keep_every)
        except OSError as error:
            self._failed = f"checkpoint {path} was not written: {error}; {describe_newest_checkpoint(self.run_dir)}"
            self.tell(f"warning: {self._failed}")
        except BaseException as error:
            self._error = error

    def _copy(self, sources: list[torch.Tensor], ready: torch.cuda.Event | None) -> None:
        """Copy tensors into the buffers, after what the device had to do before save()."""
        if not self._buffers:
            self._buffers = [
                torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda) for source in sources
            ]
        stream = contextlib.nullcontext()
        if ready is not None:
            side = torch.cuda.Stream(next(source.device for source in sources if source.is_cuda))
            side.wait_event(ready)
            stream = torch.cuda.stream(side)
        with stream:
            for source, buffer in zip(sources, self._buffers, strict=True):
                buffer.copy_(source, non_blocking=True)
        if ready is not None:
            side.synchronize()
