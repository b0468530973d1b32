"""Run a script under torchrun as if rank 1 were on a node of its own, where something is wrong.

    torchrun --nproc_per_node=2 tests/failing_rank.py FAULT SCRIPT FLAG...

FAULT is what is special about rank 1:

    in=FOLDER     it works in another folder, where relative paths lead to other files, or to none
    full-disk     its disk takes no more than 100 bytes in a file
    crash         the script's code has a mistake there
    flags=FLAGS   it was started with these flags as well
"""

from __future__ import annotations

import os
import resource
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def crash(*_: object) -> None:
    raise AttributeError("a mistake in the code")


def main() -> None:
    kind, _, value = sys.argv[1].partition("=")
    script, flags = str(ROOT / sys.argv[2]), sys.argv[3:]
    sys.path.insert(0, str(ROOT))
    if os.environ["RANK"] == "1":
        if kind == "in":
            os.chdir(value)
        elif kind == "full-disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        elif kind == "crash":
            from data.datasets import Digits

            Digits.load = crash
        elif kind == "flags":
            flags += value.split()
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
