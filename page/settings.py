"""Settings of a drawing, as one value: in a link, in sample.py's flags and in Python."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl, urlencode

from transport import ODE, SDE, Guidance

MAX_IMAGES = 64  # of a drawing, in one batch
MAX_STEPS = 1000  # of a trajectory, whose cost is counted by walking it
MAX_PIXELS = 2048 * 2048  # of an image
MAX_BUDGETS = 10
SOLVERS = {"ODE": ODE, "SDE": SDE}
SHOWS = ("pyramid", "finest", "budgets")


@dataclass(frozen=True)
class Settings:
    """A drawing: everything but the network that its pictures depend on.

    Args:
        classes: ids, one for each picture
        seed:    of the noise
        size:    (height, width) of the pictures; None for the network's own
        mode:    "ODE" or "SDE"
        method:  of the solver
        steps:   over the whole trajectory, or one number per level
        scales:  of guidance: one, or one per level, coarsest first
        edges:   times at which the patch size changes; None for the network's own
        show:    "pyramid" alone, "finest" for the finest level alone beside it, or "budgets"
        budgets: what is drawn one below the other then, instead of the edges

    Raises:
        ValueError: if a value makes no sense for any network.
    """

    classes: tuple[int, ...] = (0,)
    seed: int = 0
    size: tuple[int, int] | None = None
    mode: str = "ODE"
    method: str = "ab2"
    steps: tuple[int, ...] = (50,)
    scales: tuple[float, ...] = (1.5,)
    edges: tuple[float, ...] | None = None
    show: str = "pyramid"
    budgets: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.3)

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_IMAGES:
            raise ValueError(f"give 1 to {MAX_IMAGES} classes, not {len(self.classes)}")
        if any(not 0 <= label < 2**31 for label in self.classes):
            raise ValueError("classes are numbers from 0 on")
        if not 0 <= self.seed < 2**53:  # a browser's numbers
            raise ValueError(f"the seed is a whole number from 0 to 2^53 - 1, not {self.seed}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError("a size is a height and a width, as 160x480")
        if self.size is not None and math.prod(self.size) > MAX_PIXELS:
            raise ValueError(
                f"{'x'.join(map(str, self.size))} is too much for a page: give {MAX_PIXELS} pixels or less"
            )
        if not self.steps or min(self.steps) < 1 or sum(self.steps) > MAX_STEPS:
            raise ValueError(f"give at least one step, and {MAX_STEPS} or less together")
        for name, choices in (("mode", SOLVERS), ("show", SHOWS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 1 <= len(self.budgets) <= MAX_BUDGETS:
            raise ValueError(f"give 1 to {MAX_BUDGETS} budgets, not {len(self.budgets)}")
        _ = self.solver, self.guidance  # they check what is theirs

    @property
    def solver(self) -> ODE | SDE:
        return SOLVERS[self.mode](self.method, self.steps[0] if len(self.steps) == 1 else self.steps)

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.scales)

    # -- In a link -----------------------------------------------------------------------------------------------

    def query(self) -> str:
        """The settings as the query of a URL; those of the network itself are left out."""
        pairs = [(each.name, getattr(self, each.name)) for each in fields(self)]
        return urlencode([(name, _written(value)) for name, value in pairs if value is not None], safe=",")

    @staticmethod
    def from_query(query: str, default: Settings) -> Settings:
        """The settings of a URL's query; what it does not tell is the default's.

        Raises:
            ValueError: if a name is unknown or given twice, or a value is none of its kind.
        """
        values: dict[str, Any] = {}
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name not in READ:
                raise ValueError(f"unknown setting {name!r}: there are {', '.join(READ)}")
            if name in values:
                raise ValueError(f"the setting {name!r} is given twice")
            values[name] = READ[name](text)
        return Settings(**{each.name: values.get(each.name, getattr(default, each.name)) for each in fields(default)})

    # -- As a command, and in Python -----------------------------------------------------------------------------

    def command(self, network: Sequence[str]) -> str:
        """The command line of sample.py that draws the same pictures.

        Args:
            network: flags that name the network
        """
        flags: dict[str, Sequence[Any]] = {
            "--class-labels": self.classes,
            "--seed": (self.seed,),
            "--image-size": self.size or (),
            "--sampling-method": (self.method,),
            "--num-sampling-steps": () if self.solver.adaptive else self.steps,
            "--cfg-scales": self.scales,
            "--budget": self.budgets if self.show == "budgets" else (),
            "--level-edges": (self.edges or ()) if self.show != "budgets" else (),
        }
        words = ["sample.py", self.mode, *network]
        for flag, values in flags.items():
            words += [flag, *map(_plain, values)] if values else []
        return "python " + shlex.join([*words, *["--compare-finest"] * (self.show == "finest")])

    def python(self, load: str, prepare: str = "") -> str:
        """A program that draws the same pictures.

        Args:
            load:    arguments of Pipeline.load that name the network
            prepare: a call after it, as ".to(...)"
        """
        edges = "" if self.edges is None or self.show == "budgets" else f", level_edges={_tuple(self.edges)}"
        number = self.steps[0] if len(self.steps) == 1 else _tuple(self.steps)
        steps = "" if self.solver.adaptive else f", num_steps={number}"
        size = "" if self.size is None else f", size={_tuple(self.size)}"
        lines = [
            "from pipeline import Pipeline",
            f"from transport import {self.mode}, Guidance",
            "",
            f"pipe = Pipeline.load({load}{edges}){prepare}",
            f'solver = {self.mode}("{self.method}"{steps})',
            f"guidance = Guidance({_tuple(self.scales)})",
        ]
        classes = f"[{', '.join(map(str, self.classes))}]"
        drawing = f"images({classes}, solver, guidance, seed={self.seed}{size}"
        if self.show == "budgets":
            lines.append(f"images = [pipe.{drawing}, budget=budget) for budget in {_tuple(self.budgets)}]")
        else:
            lines.append(f"images = pipe.{drawing})  # (N, C, H, W) in about [-1, 1]")
        if self.show == "finest":
            if len(self.steps) > 1 and not self.solver.adaptive:
                lines.append(f'solver = {self.mode}("{self.method}", num_steps={sum(self.steps)})')
            if len(self.scales) > 1:
                lines.append(f"guidance = Guidance({_tuple(self.scales[-1:])})")
            lines.append(f"finest = pipe.finest_only().{drawing})")
        return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------
# Words


def _list_of(kind: Callable[[str], Any], what: str) -> Callable[[str], tuple]:
    def read(text: str) -> tuple:
        return tuple(_one(kind, what, part) for part in text.replace(",", " ").split())

    return read


def _one(kind: Callable[[str], Any], what: str, text: str) -> Any:
    """A finite number of a kind, int or float (ValueError otherwise)."""
    try:
        value = kind(text)
        finite = math.isfinite(value)
    except (ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"{what}: {text!r} is not a {'whole ' * (kind is int)}number")
    return value


def _size(text: str) -> tuple[int, ...] | None:
    return _list_of(int, "size")(text.lower().replace("x", " ")) or None


READ: dict[str, Callable[[str], Any]] = {
    "classes": _list_of(int, "classes"),
    "seed": lambda text: _one(int, "seed", text.strip()),
    "size": _size,
    "mode": str,
    "method": str,
    "steps": _list_of(int, "steps"),
    "scales": _list_of(float, "guidance"),
    "edges": _list_of(float, "edges"),
    "show": str,
    "budgets": _list_of(float, "budgets"),
}


def _plain(value: float | str) -> str:
    """A number in the fewest digits that tell it and no exponent, which argparse takes for a flag; a word as it is."""
    if isinstance(value, str):
        return value
    return str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")


def _written(value: Any) -> str:
    return ",".join(map(_plain, value)) if isinstance(value, tuple) else str(value)


def _tuple(values: Sequence[float]) -> str:
    """A tuple in Python."""
    inside = ", ".join(map(_plain, values))
    return f"({inside},)" if len(values) == 1 else f"({inside})"
