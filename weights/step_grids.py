"""Step grids that were measured, beside the weights that they are of: FILE-grid-KEY.json, a file for each key.

The key is of all that the measured grid depends on, so weights that change, or another guidance, have another file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experts import Network
from runtime.files import complete_file
from transport import ODE, Guidance, Transport
from transport.grids import Grid, checked_grid

MEASUREMENT = 1  # another number when grids are measured in another way: those of before are then not found


def what_decides(model: Network, transport: Transport, digest: str, solver: ODE, guidance: Guidance) -> dict[str, Any]:
    """Everything that a measured grid depends on, in values that JSON has.

    Args:
        digest: `fingerprint` of the weights as they were read
    """
    values = {
        "measurement": MEASUREMENT,
        "weights": digest,
        "method": solver.method,
        "guidance": asdict(guidance),
        "level_edges": transport.schedule.level_edges,
        "path_type": transport.path.name,
        "prediction": transport.prediction,
        "sample_eps": transport.sample_eps,
        "aug_dim": transport.aug_dim,
        "size": model.input_size,
        "rope_scaling": asdict(model.rope_scaling) if model.position == "rope" else None,
    }
    return json.loads(json.dumps(values))


def kept_grid(weights: Path, values: dict[str, Any], measure: Callable[[], Grid]) -> Grid:
    """The grid that was measured before, or `measure`s and is kept from now on.

    Args:
        weights: the file of the weights
        values:  of `what_decides`

    Raises:
        OSError: if the grid cannot be written beside the weights.
    """
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    file = weights.with_name(f"{weights.stem}-grid-{key}.json")
    try:
        record = json.loads(file.read_text())
        if record["measured_for"] == values:
            return checked_grid(record["grid"])
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged: measure
        pass
    with complete_file(file) as temporary:  # a folder that cannot be written to is found before the work
        temporary.touch()
        grid = measure()
        temporary.write_text(json.dumps({"measured_for": values, "grid": grid}) + "\n")
    return grid
