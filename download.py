"""Fetch published weights, or write weights in another layout, or as a pipeline of another library.

    python download.py PPF-XL-2                                     into the cache folder
    python download.py convert IN OUT --layout {ours,ppflow,sit,fit}    from any layout to any that fits
    python download.py export IN FOLDER --format diffusers          what diffusers loads without this program

IN is the name of published weights, a run's folder, a folder of save_pretrained, or a file in this program's, SiT's,
PPFlow's or FiT's layout. OUT is a .pt or a .safetensors file; weights/pretrained.py says what it holds. FOLDER becomes
a folder with weights, autoencoder, code and a model card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline import Pipeline
from runtime.errors import run_script, user_input
from train_utils import ArgumentParser, positive_int
from weights.layouts import LAYOUTS
from weights.pretrained import convert, default_transport, is_published
from weights.published import PUBLISHED, download, published_name


def main(argv: Sequence[str] | None = None) -> None:
    """Run download.py with these command-line arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["convert"]:
        return convert_command(argv[1:])
    if argv[:1] == ["export"]:
        return export_command(argv[1:])
    parser = ArgumentParser(
        prog="download.py",
        description="Fetch published weights into the cache folder ($PPFLOW_CACHE, or ~/.cache/ppflow).",
        epilog="download.py convert --help: write weights in another layout; download.py export --help: as a pipeline "
        "of diffusers",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PUBLISHED)} (none given: all but FiT's)")
    parser.add_argument("--verify", action="store_true", help="read files that are there, and compare their sha256")
    args = parser.parse_args(argv)
    with user_input():
        wanted = args.names or [name for name in PUBLISHED if not name.startswith("FiT")]  # those are 33 GB
        for name in [published_name(name) for name in wanted]:
            path = download(name, verify=args.verify)
            print(f"{name}: {path} ({path.stat().st_size:,} bytes)")


def convert_command(argv: Sequence[str]) -> None:
    """Run download.py convert."""
    parser = ArgumentParser(prog="download.py convert", description="Write weights of any layout in another.")
    parser.add_argument(
        "source",
        metavar="IN",
        nargs="+",
        help="published name, run folder, checkpoint or weights; several experts become one file",
    )
    parser.add_argument("out", metavar="OUT", help="file to write: .pt or .safetensors")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="whose names and shapes OUT has")
    add_weights_args(parser)
    args = parser.parse_args(argv)
    overrides = {} if args.num_heads is None else {"num_heads": args.num_heads}
    with user_input():
        done = convert(args.source, args.out, args.layout, args.weights, **overrides)
    print(f"{done.name}, step {done.step}, in the layout {args.layout}: {args.out}")
    lost = {key: value for key, value in done.transport.items() if value != default_transport(done.model)[key]}
    if args.layout != "ours" and lost:
        said = ", ".join(f"{key} {words(value)}" for key, value in lost.items())
        print(f"note: that layout has no place for {said}: give it to whatever reads the file")


def export_command(argv: Sequence[str]) -> None:
    """Run download.py export."""
    parser = ArgumentParser(
        prog="download.py export",
        description="Write weights of any layout as a folder that diffusers loads without this program: "
        "DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True).",
    )
    parser.add_argument(
        "source",
        metavar="IN",
        nargs="+",
        help="published name, run folder, checkpoint or weights; several experts become one network",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder to write: new, or empty")
    parser.add_argument("--format", choices=["diffusers"], required=True, help="whose folders FOLDER is like")
    parser.add_argument("--vae", help="another autoencoder than the weights': ema, mse, a hub id or a local folder")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help='names of the classes: a text file with one a line, by their ids, or "imagenet" (default: imagenet for '
        "published weights, else none)",
    )
    add_weights_args(parser)
    args = parser.parse_args(argv)
    from weights.diffusers.export import check_new, class_names, export, pipeline_of  # slow to import, as diffusers is

    overrides = {} if args.num_heads is None else {"num_heads": args.num_heads}
    with user_input():
        check_new(args.folder)
        source = args.source[0] if len(args.source) == 1 else args.source
        pipe = Pipeline.load(source, args.weights, args.vae, **overrides)
        pipe.transport.check_served()
        labels = args.labels or ("imagenet" if is_published(source) else None)
        names = None if labels is None else class_names(labels, pipe.model.num_classes)
        pipeline = pipeline_of(pipe.model, pipe.transport, pipe.autoencoder, names, pipe.level_errors)
        export(pipeline, args.folder, pipe.name, pipe.step)
    print(f"{pipe.name}, step {pipe.step}, as a pipeline of diffusers: {args.folder}")


def words(value: object) -> str:
    """A setting as one gives it to a flag."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def add_weights_args(parser: ArgumentParser) -> None:
    """Add the flags that say which weights of a file are meant."""
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged, or the last ones")
    parser.add_argument("--num-heads", type=positive_int, help="where IN does not tell (default: by its width)")


if __name__ == "__main__":
    run_script(main)
