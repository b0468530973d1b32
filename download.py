"""Fetch published weights, or write weights in another layout.

    python download.py PPF-XL-2                                     into the cache folder
    python download.py convert IN OUT --layout {ours,ppflow,sit,fit}    from any layout to any that fits

IN is the name of published weights, a run's folder, a folder of save_pretrained, or a file in this program's, SiT's,
PPFlow's or FiT's layout. OUT is a .pt or a .safetensors file; weights/pretrained.py says what it holds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from runtime.errors import run_script, user_input
from train_utils import ArgumentParser, positive_int
from weights.layouts import LAYOUTS
from weights.pretrained import convert, default_transport
from weights.published import PUBLISHED, download, published_name


def words(value: object) -> str:
    """A setting as one gives it to a flag."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Run download.py with these command-line arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["convert"]:
        parser = ArgumentParser(prog="download.py convert", description="Write weights of any layout in another.")
        parser.add_argument(
            "source",
            metavar="IN",
            nargs="+",
            help="published name, run folder, checkpoint or weights; several experts become one file",
        )
        parser.add_argument("out", metavar="OUT", help="file to write: .pt or .safetensors")
        parser.add_argument("--layout", choices=LAYOUTS, required=True, help="whose names and shapes OUT has")
        parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged, or the last ones")
        parser.add_argument("--num-heads", type=positive_int, help="where IN does not tell (default: by its width)")
        args = parser.parse_args(argv[1:])
        overrides = {} if args.num_heads is None else {"num_heads": args.num_heads}
        with user_input():
            done = convert(args.source, args.out, args.layout, args.weights, **overrides)
        print(f"{done.name}, step {done.step}, in the layout {args.layout}: {args.out}")
        lost = {key: value for key, value in done.transport.items() if value != default_transport(done.model)[key]}
        if args.layout != "ours" and lost:
            said = ", ".join(f"{key} {words(value)}" for key, value in lost.items())
            print(f"note: that layout has no place for {said}: give it to whatever reads the file")
        return
    parser = ArgumentParser(
        prog="download.py",
        description="Fetch published weights into the cache folder ($PPFLOW_CACHE, or ~/.cache/ppflow).",
        epilog="download.py convert --help: write weights in another layout",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PUBLISHED)} (none given: all but FiT's)")
    parser.add_argument("--verify", action="store_true", help="read files that are there, and compare their sha256")
    args = parser.parse_args(argv)
    with user_input():
        wanted = args.names or [name for name in PUBLISHED if not name.startswith("FiT")]  # those are 33 GB
        for name in [published_name(name) for name in wanted]:
            path = download(name, verify=args.verify)
            print(f"{name}: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    run_script(main)
