"""Draw what settings ask for, watched: the network's guess of the data on the way, what it costs, and a way to stop.

All drawings share one network. Its evaluations wait in one queue, first come, first served: drawings of several people
advance in turns, and the seconds of an evaluation are its own.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from PIL import Image

from page.settings import Settings
from pipeline import Pipeline, Solver
from runtime.logs import to_uint8
from runtime.speed import use_precision
from transport import ODE, ClassifierFreeGuidance, Guidance, Interval, Transport

FRAMES = 10  # pictures of the data that the network expects, at equal distances in t
Tell = Callable[[dict[str, Any]], None]


class Way(NamedTuple):
    """One of the ways in which the same noise is turned into pictures."""

    name: str
    pipe: Pipeline
    solver: Solver
    guidance: Guidance


# ---------------------------------------------------------------------------------------------------------------
# Watching


Field = Callable[..., torch.Tensor]
Evaluate = Callable[[Field, Interval, Transport, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class WatchedGuidance(Guidance):
    """Guidance whose evaluations somebody else makes: evaluate(network, interval, transport, x, t, y)."""

    evaluate: Evaluate = field(kw_only=True)

    def of(self, model: Any) -> WatchedNetwork:
        return WatchedNetwork(super().of(model), self.evaluate)


class WatchedNetwork:
    """A guided network whose evaluations somebody else makes, as solvers take it."""

    def __init__(self, guided: ClassifierFreeGuidance, evaluate: Evaluate) -> None:
        self.guided = guided
        self.evaluate = evaluate
        self.num_levels = guided.num_levels
        self.breakpoints = guided.breakpoints

    def on_interval(self, interval: Interval, transport: Transport) -> Field:
        network = self.guided.on_interval(interval, transport)

        def evaluate(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.evaluate(network, interval, transport, x, t, y)

        return evaluate


class Watch:
    """The evaluations of one way: made in turn, timed, and shown when t has gone on by another tenth.

    Args:
        studio: that makes them
        tell:   is given what to show; it raises to stop the drawing
    """

    def __init__(self, studio: Studio, tell: Tell) -> None:
        self.studio = studio
        self.tell = tell
        self.evaluations = [0] * studio.pipe.model.num_levels
        self.seconds = [0.0] * studio.pipe.model.num_levels
        self.next_frame = 0

    @property
    def finest_seconds(self) -> float | None:
        """Seconds that as many evaluations would take at the finest level; None if none were made there."""
        count = self.evaluations[-1]
        return self.seconds[-1] / count * sum(self.evaluations) if count else None

    def evaluate(
        self,
        network: Field,
        interval: Interval,
        transport: Transport,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:
        """The guided prediction (N, C, h, w) for x (N, C, h, w), t (N,), y (N,) of an interval of time."""
        prediction, seconds = self.studio.in_turn(lambda: self.studio.timed(network, x, t, y))
        level, now = interval.level - transport.schedule.num_levels, float(t[0])  # from the finest one: its own has one
        self.evaluations[level] += 1
        self.seconds[level] += seconds
        event = {"kind": "step", "t": now, "level": level % len(self.seconds)}
        if now * FRAMES > self.next_frame - 1e-6:
            self.next_frame = int(now * FRAMES + 1e-6) + 1
            data = transport.convert(prediction, x, t, "data", transport.prediction_at(interval.level))
            event["pictures"] = self.studio.in_turn(lambda: self.studio.pictures(data))
        self.tell(event)
        return prediction


# ---------------------------------------------------------------------------------------------------------------
# Drawing


class Studio:
    """A trained network that draws for several people at once.

    Args:
        pipe: on its device
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.queue = ThreadPoolExecutor(1, "network")
        self.level_macs: dict[tuple[int, tuple[int, int]], int] = {}
        self.budgets: dict[tuple[float, Solver, Guidance], Pipeline] = {}

    def warm_up(self) -> None:
        """Evaluate each level once: what is set up at the first evaluation is no part of a drawing's seconds."""
        self.in_turn(lambda: self.pipe.latents([0], ODE("euler", num_steps=self.pipe.model.num_levels)))

    def in_turn(self, work: Callable[[], Any]) -> Any:
        """The result of work that nothing else of the network's runs beside."""
        return self.queue.submit(work).result()

    @torch.no_grad()
    def timed(self, network: Field, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
        """An evaluation, in the network's precision, and its seconds."""
        start = time.perf_counter()
        with use_precision(self.pipe.precision, self.pipe.device):
            prediction = network(x, t, y=y)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return prediction, time.perf_counter() - start

    @torch.no_grad()
    def pictures(self, x1: torch.Tensor) -> list[str]:
        """Samples (N, C, h, w), decoded, as PNG files in data URLs."""
        files = []
        for image in to_uint8(self.pipe.autoencoder.decode(x1)):
            buffer = io.BytesIO()
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(buffer, format="png")
            files.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
        return files

    def latent_size(self, settings: Settings) -> tuple[int, int]:
        """Size of the network's inputs."""
        if settings.size is None:
            return self.pipe.model.input_size
        return self.pipe.model.input_size_of(settings.size, self.pipe.autoencoder.factor)

    def at_edges(self, settings: Settings) -> Pipeline:
        """The network with the settings' edges."""
        return self.pipe if settings.edges is None else self.pipe.with_edges(settings.edges)

    def finest(self, settings: Settings) -> Way:
        """The finest level alone, with as many steps."""
        guidance = replace(settings.guidance, scales=settings.scales[-1:])
        solver = replace(settings.solver, num_steps=sum(settings.steps))
        return Way("finest level alone (SiT)", self.pipe.finest_only(), solver, guidance)

    def at_budget(self, share: float, settings: Settings) -> Way:
        """The network at a budget; it takes a second to find, once."""
        key = share, settings.solver, settings.guidance
        if key not in self.budgets:
            self.budgets[key] = self.pipe.at_budget(*key)
        return Way(f"budget {share:g}", self.budgets[key], *key[1:])

    def ways(self, settings: Settings) -> list[Callable[[], Way]]:
        """Functions that make the ways to draw, in their order, each called when its turn comes.

        Raises:
            ValueError: if there is no such way.
        """
        if settings.show == "budgets":
            self.at_budget(min(settings.budgets), settings)  # those that are refused, if any is
            self.at_budget(max(settings.budgets), settings)
            return [partial(self.at_budget, share, settings) for share in settings.budgets]
        pyramid = Way("pyramid", self.at_edges(settings), settings.solver, settings.guidance)
        both = [pyramid, self.finest(settings)] if settings.show == "finest" else [pyramid]
        return [partial(Way, *way) for way in both]

    # -- What it costs -------------------------------------------------------------------------------------------

    def macs(self, level: int, size: tuple[int, int]) -> int:
        """Multiply-accumulates of an evaluation at a level."""
        if (level, size) not in self.level_macs:
            self.level_macs[level, size] = self.pipe.model.macs(level, size)
        return self.level_macs[level, size]

    def cost_of(self, rows: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
        """Cost of a picture from its evaluations at each level, the finest one last."""
        rows = [0] * (self.pipe.model.num_levels - len(rows)) + list(rows)
        level_gmacs = [count * self.macs(level, size) / 1e9 for level, count in enumerate(rows)]
        return {"nfe": sum(rows), "gmacs": sum(level_gmacs), "evaluations": rows, "level_gmacs": level_gmacs}

    def cost(self, way: Way, settings: Settings) -> dict[str, Any]:
        """Count what a picture will cost, without the network; without meaning where the solver chooses its steps.

        Raises:
            ValueError: if the settings do not fit the network.
        """
        size = self.latent_size(settings)
        counter = way.pipe.check(way.solver, way.guidance, batch=len(settings.classes), size=size)
        return self.cost_of(counter.rows, size)

    def plan(self, settings: Settings) -> dict[str, Any]:
        """Tell what a drawing will cost beside the finest level alone, and at which times its levels were not trained.

        Raises:
            ValueError: if the settings do not fit the network.
        """
        self._check(settings)
        own, chosen = self.pipe.transport.schedule, self.at_edges(settings).transport.schedule
        budgets, finest = (settings.show == show for show in ("budgets", "finest"))
        if budgets and not own.elastic:
            raise ValueError(
                "budgets need a network that was trained with --elastic, whose levels know all times: of this one each "
                "level knows its own times alone"
            )
        counted = not settings.solver.adaptive and not budgets
        pyramid = Way("pyramid", self.at_edges(settings), settings.solver, settings.guidance)
        return {
            "edges": chosen.level_edges,
            "pyramid": self.cost(pyramid, settings) if counted else None,
            "finest": self.cost(self.finest(settings), settings) if counted and self.has_finest else None,
            "not_trained": [] if budgets else own.not_trained(chosen),
            "finest_from": own.edges[-2] if finest and not own.elastic else 0.0,  # time at which its training begins
        }

    @property
    def has_finest(self) -> bool:
        """True if the finest level serves all times, which that of experts does not."""
        return len(self.pipe.model.networks) == 1

    def _check(self, settings: Settings) -> None:
        if max(settings.classes) >= self.pipe.model.num_classes:
            raise ValueError(
                f"class {max(settings.classes)} is out of range: the network knows 0 to "
                f"{self.pipe.model.num_classes - 1}"
            )

    # -- The drawing ---------------------------------------------------------------------------------------------

    def draw(self, settings: Settings, tell: Tell) -> None:
        """Draw all ways, and tell what happens: {"kind": "way" | "step" | "done", "way": its number, ...}.

        Raises:
            ValueError, FloatingPointError: as Pipeline.images; and whatever `tell` raises.
        """
        self._check(settings)
        size = self.latent_size(settings)
        ways = self.in_turn(lambda: self.ways(settings))
        for number, make in enumerate(ways):
            way = self.in_turn(make)
            self.in_turn(partial(self.cost, way, settings))  # refuses now what would fail at the end
            schedule, levels = way.pipe.transport.schedule, range(self.pipe.model.num_levels)
            spans = [
                (level, *ends)
                for level, ends in zip(levels[-schedule.num_levels :], pairwise(schedule.edges), strict=True)
            ]
            tell({"kind": "way", "way": number, "ways": len(ways), "name": way.name, "spans": spans})
            self._draw(way, settings, size, lambda event, number=number: tell({**event, "way": number}))

    def _draw(self, way: Way, settings: Settings, size: tuple[int, int], tell: Tell) -> None:
        watch, counted = Watch(self, tell), way.pipe.counted()
        guidance = WatchedGuidance(**vars(way.guidance), evaluate=watch.evaluate)
        x1 = counted.latents(settings.classes, way.solver, guidance, seed=settings.seed, size=size)
        pictures = self.in_turn(lambda: self.pictures(x1))
        rows = [count / len(settings.classes) for count in counted.model.rows]
        cost = self.in_turn(lambda: self.cost_of(rows, size)) | {"seconds": sum(watch.seconds)}
        tell({"kind": "done", "pictures": pictures, "cost": cost, "finest_seconds": watch.finest_seconds})
