"""Make this folder's run anew: four steps of a very small network, by the code of commit 64904e4.

    git worktree add /some/where 64904e4 && cd /some/where && python .../tests/earlier_run/make.py

Later code must continue from its second step and sample from it (tests/test_continuing.py).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.getcwd())

import models

HERE = Path(__file__).resolve().parent
SIZE = {"depth": 1, "hidden_size": 4, "num_heads": 1}
FLAGS = [
    "--data-path",
    "digits",
    "--model",
    "PPF-T-2",
    "--global-batch-size",
    "16",
    "--lr",
    "1e-2",
    "--num-workers",
    "0",
    "--sample-every",
    "0",
    "--ckpt-every",
    "2",
    "--log-every",
    "1",
    "--max-grad-norm",
    "1",
    "--max-steps",
    "4",
]


def main() -> None:
    models.MODELS["PPF-T-2"] |= SIZE
    import train

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        train.train([*FLAGS, "--run-dir", "run"])
        for name in ("checkpoints/0000002.pt", "checkpoints/0000002.pt.sha256", "metrics.jsonl"):
            (HERE / name).parent.mkdir(exist_ok=True)
            shutil.copy(Path("run") / name, HERE / name)


if __name__ == "__main__":
    main()
