"""A page in the browser that draws pictures with a trained network and shows what the pyramid saves.

    python app.py --ckpt results/demo        # then open the address that it prints

Everything stays on this machine: the server listens on 127.0.0.1, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import train_utils as cli
from page.drawing import Studio
from page.server import PageServer
from page.settings import Settings
from pipeline import Pipeline
from runtime.errors import UserError, note, run_script, user_input
from runtime.logs import shown_classes
from runtime.speed import default_precision, precision_note
from transport import ODE_METHODS, SDE_METHODS

DEMO = "results/demo"
PORT = 7860
SHOWN_CLASSES, BUDGETS = 4, 5  # that the page opens with
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
            values = {"prediction": str(value).split(" "), "ckpt": value}.get(name, [] if value is True else [value])
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def python_arguments(args: argparse.Namespace, pipe: Pipeline) -> tuple[str, str]:
    """Arguments of Pipeline.load that name the network, and the call of `to` that prepares it."""
    source = args.ckpt if args.ckpt and len(args.ckpt) > 1 else pipe.source
    process = {name: getattr(args, name) for name in cli.PROCESS_FLAGS if getattr(args, name) is not None}
    load = {"weights": args.weights if args.weights != "ema" else None, "vae": args.vae, "process": process}
    words = [json.dumps(source), *(f"{name}={json.dumps(value)}" for name, value in load.items() if value)]
    where = [json.dumps(pipe.device.type)]
    if pipe.precision != default_precision(pipe.device, training=False):
        where.append(f"precision={json.dumps(pipe.precision)}")
    where += [f"{name}=True" for name in ("compile", "offload_experts") if getattr(args, name)]
    return ", ".join(words), "" if where == ['"cpu"'] else f".to({', '.join(where)})"


def about(studio: Studio) -> dict[str, Any]:
    """The network, and what can be chosen, for the page."""
    pipe, model = studio.pipe, studio.pipe.model
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
        "elastic": bool(pipe.transport.schedule.elastic),
        "edges": pipe.transport.schedule.level_edges,
        "fixed": sorted(level - 1 for level in getattr(model, "fixed_edges", {})),  # edges between experts
        "levels": [
            {"patch": patch, "tokens": model.num_tokens(level), "gmacs": studio.macs(level, model.input_size) / 1e9}
            for level, patch in enumerate(patches)
        ],
        "methods": {"ODE": ODE_METHODS, "SDE": SDE_METHODS},
    }


def first_settings(studio: Studio) -> Settings:
    """Settings that the page opens with; its budgets lie at equal distances from 1 to about the least."""
    pipe, model = studio.pipe, studio.pipe.model
    coarsest, finest = (studio.macs(level, model.input_size) for level in (0, model.num_levels - 1))
    shares = [1 - (1 - coarsest / finest) * part / (BUDGETS - 1) for part in range(BUDGETS)]
    return Settings(
        classes=tuple(shown_classes(model.num_classes)[:SHOWN_CLASSES]),
        size=pipe.image_size if model.position == "rope" else None,
        scales=(SCALES[pipe.autoencoder.name == "none"],) * model.num_levels,
        edges=pipe.transport.schedule.level_edges or None,
        budgets=tuple(math.ceil(100 * share) / 100 for share in shares),
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
        settings, facts = first_settings(studio), about(studio)
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
