"""A page in the browser that draws pictures with a trained network and shows what the pyramid saves.

    python app.py --ckpt results/demo        # then open the address that it prints

Everything stays on this machine: the server listens on 127.0.0.1, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import train_utils as cli
from page.drawing import Studio
from page.server import PageServer
from page.settings import MAX_IMAGES, Settings
from pipeline import Pipeline
from runtime.errors import UserError, note, run_script, user_input
from runtime.logs import shown_classes
from runtime.speed import default_precision, precision_note
from transport import ADAPTIVE_METHODS, ODE_METHODS, SDE_METHODS

DEMO = "results/demo"
PORT = 7860
SHOWN_CLASSES = 4
NETWORK = (  # flags that sample.py has as well; --image-size is among the settings
    *("ckpt", "model", "num_classes", "vae", "weights", "precision", "compile", "offload_experts"),
    *cli.PROCESS_FLAGS,
)
SCALES = {True: 1.5, False: 4.0}  # of guidance: for pixels, for latents


def build_parser() -> cli.ArgumentParser:
    """The flags of app.py: those of sample.py that name the network."""
    parser = cli.ArgumentParser(prog="app.py", description="Serve a page that draws with a trained network.")
    parser.add_argument(
        "--port", type=cli.number(int, 0, 65535), default=PORT, help="of 127.0.0.1; 0 for any that is free"
    )
    cli.add_network_args(parser)
    names = ("level_edges", "cfg_scales", "cfg_channels", "cfg_interval")
    names += ("rope", "decouple", "attention_scale", "interpolation", "ori_max_pe_len")
    parser.set_defaults(**dict.fromkeys(names))  # of load_pipeline
    return parser


def network_flags(args: argparse.Namespace) -> list[str]:
    """The flags of sample.py that name the network, as they were given."""
    parser, words = build_parser(), []
    for name in NETWORK:
        value = getattr(args, name)
        if value != parser.get_default(name):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def python_arguments(args: argparse.Namespace, pipe: Pipeline) -> tuple[str, str]:
    """Arguments of Pipeline.load that name the network, and the call of `to` that prepares it."""
    source = args.ckpt if args.ckpt and len(args.ckpt) > 1 else pipe.source
    process = {name: getattr(args, name) for name in cli.PROCESS_FLAGS if getattr(args, name) is not None}
    load = {"weights": None if args.weights == "ema" else args.weights, "vae": args.vae, "process": process}
    words = [repr(source), *(f"{name}={value!r}" for name, value in load.items() if value)]
    words = [word.replace("'", '"') for word in words]
    default = default_precision(pipe.device, training=False)
    to = {
        "precision": pipe.precision if pipe.precision != default else None,
        "compile": args.compile,
        "offload_experts": args.offload_experts,
    }
    where = [f'"{pipe.device.type}"', *(f"{name}={value!r}".replace("'", '"') for name, value in to.items() if value)]
    return ", ".join(words), "" if where == ['"cpu"'] else f".to({', '.join(where)})"


def about(pipe: Pipeline) -> dict[str, Any]:
    """The network, and what can be chosen, for the page."""
    model, schedule = pipe.model, pipe.transport.schedule
    patches = [patch for network in model.networks.values() for patch in network.patch_sizes]
    return {
        "name": pipe.name,
        "trained": pipe.trained,
        "source": pipe.source,
        "device": str(pipe.device),
        "classes": model.num_classes,
        "input_size": model.input_size,
        "factor": pipe.autoencoder.factor,
        "any_size": model.position == "rope",
        "elastic": bool(schedule.elastic) and pipe.level_errors is not None,
        "experts": len(model.networks),
        "edges": schedule.level_edges,
        "fixed": sorted(level - 1 for level in getattr(model, "fixed_edges", {})),  # edges between experts
        "levels": [
            {"patch": patch, "tokens": model.num_tokens(level), "gmacs": model.macs(level) / 1e9}
            for level, patch in enumerate(patches)
        ],
        "methods": {"ODE": ODE_METHODS, "SDE": SDE_METHODS},
        "adaptive": ADAPTIVE_METHODS,
        "max_images": MAX_IMAGES,
    }


def first_settings(pipe: Pipeline) -> Settings:
    """What the page opens with."""
    levels = [pipe.model.macs(level) for level in range(pipe.model.num_levels)]
    least = min(0.99, levels[0] / levels[-1])
    budgets = tuple(math.ceil(100 * (1 - (1 - least) * part / 4)) / 100 for part in range(5))
    return Settings(
        classes=tuple(shown_classes(pipe.model.num_classes)[:SHOWN_CLASSES]),
        size=pipe.image_size if pipe.model.position == "rope" else None,
        scales=(SCALES[pipe.autoencoder.name == "none"],) * pipe.model.num_levels,
        edges=pipe.transport.schedule.level_edges or None,
        budgets=budgets,
    )


def serve(argv: Sequence[str] | None = None) -> PageServer:
    """The server that these command-line arguments ask for, ready to answer (UserError for what cannot be)."""
    args = build_parser().parse_args(argv)
    if not args.ckpt and not args.model:
        if not Path(DEMO).exists():
            raise UserError(f"{DEMO} is not there: run `make demo` first, or give --ckpt (make app CKPT=...)")
        args.ckpt = [DEMO]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = args.precision or default_precision(device, training=False)
    if line := precision_note(precision, device):
        note(line)
    with user_input():
        pipe = cli.load_pipeline(args, any_size=True)
        pipe.to(device, precision, args.compile, args.offload_experts)
        studio = Studio(pipe)
        studio.warm_up()
        settings, facts = first_settings(pipe), about(pipe)
    names = network_flags(args), python_arguments(args, pipe)
    try:
        return PageServer(studio, settings, facts, *names, args.port)
    except OSError as error:
        raise UserError(f"port {args.port} of 127.0.0.1: {error.strerror}; give another --port") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run app.py with these command-line arguments, until Ctrl-C."""
    with serve(argv) as server:
        about = server.about
        print(f"{about['name']}, {about['trained']}: open {server.url} (Ctrl-C ends)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_script(main)
