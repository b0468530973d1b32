"""Pretrained weights: where they are, and how each layout of them becomes a model.

    python download.py PPF-XL-2                                     into the cache folder
    python download.py convert IN OUT --layout {ours,ppflow,sit}    from any layout to any that fits

IN is what load_pretrained takes: the name of published weights, a run's folder, a folder of save_pretrained, or a file
in this program's, SiT's or PPFlow's layout. OUT is a .pt or a .safetensors file. In our own layout it holds the
weights, the config and the step, without what only training needs:

    .pt            {"ema": state dict, "config": {"model_name", "model", "transport", "vae"}, "step": int}
    .safetensors   the state dict; the metadata has "config", as JSON, and "step"

Nothing here unpickles code: torch files are read with weights_only=True.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import inspect
import json
import os
import pickle
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock  # a requirement of torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from autoencoder import SHORT_NAMES
from checkpoints import newest_checkpoint
from layouts import (
    LAYOUTS,
    check_tensors,
    export_state_dict,
    fields_from_shapes,
    import_state_dict,
    initialize_levels,
    layout_of,
    load_own_state_dict,
    own_state_dict,
    registry_name,
)
from models import PyramidalPatchDiT, canonical_name, create_model
from train_utils import ArgumentParser, complete_file, positive_int, run_script, user_input
from transport import PatchSchedule

__all__ = ["PUBLISHED", "Pretrained", "download", "export_state_dict", "initialize_levels", "load_pretrained"]


class Published(NamedTuple):
    """Weights that their authors offer.

    They publish no digests, so none is pinned: a download is known by its tensors' names and shapes, and its digest is
    printed, to be compared with what others got. A digest given here is checked before the file gets its name.
    """

    file: str
    url: str
    sha256: str | None = None


# From the READMEs of PPFlow and SiT; dl=1 asks Dropbox for the file, not for a page about it.
PUBLISHED = {
    "PPF-XL-2": Published("PPF-XL-2.pt", "https://www.dropbox.com/scl/fi/uh4o7kra6fnwlrd2lmry0/PPF-XL-2.pt"
                          "?rlkey=k26p7aw7zwar1a8x0em74vhor&st=upovbj1j&dl=1"),
    "PPF-XL-3": Published("PPF-XL-3.pt", "https://www.dropbox.com/scl/fi/0tnt99s21532sxfg804vq/PPF-XL-3.pt"
                          "?rlkey=gt7shf2i23jb40pxzv9t0nje3&st=hlbtmvhi&dl=1"),
    "SiT-XL/2": Published("SiT-XL-2-256.pt", "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/"
                          "SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1"),
}  # fmt: skip

TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes


# ---------------------------------------------------------------------------------------------------------------
# Models out of files


class Pretrained(NamedTuple):
    """A network with the process it was trained for."""

    model: PyramidalPatchDiT
    transport: dict[str, Any]  # arguments of create_transport
    vae: str  # "none" for pixels, or a diffusers id or path
    name: str  # in the registry where the sizes are there, else a description
    step: int  # of training; 0 if unknown
    scaling: dict[str, Any] | None = None  # of the latents, where it is not the autoencoder's own
    stated: frozenset[str] = frozenset()  # what of `transport` the file tells, or is known of published weights

    @property
    def schedule(self) -> PatchSchedule:
        return PatchSchedule(tuple(self.transport["level_edges"]))


def load_pretrained(
    name_or_path: str | Path, weights: str = "ema", cache_dir: str | Path | None = None, **overrides: Any
) -> Pretrained:
    """A trained model, in evaluation mode on the CPU, from weights in any layout.

    Args:
        name_or_path: PPF-XL-2, PPF-XL-3 or SiT-XL/2, downloaded on first use; a run's folder for its newest checkpoint;
                      a folder of save_pretrained; or a file in SiT's, PPFlow's or our layout (.pt or .safetensors)
        weights:      "ema", or "model" for the last ones of a training checkpoint
        cache_dir:    where downloads are kept (default: PPFLOW_CACHE, or ~/.cache/ppflow)
        overrides:    arguments of PyramidalPatchDiT that win over what the file tells; num_heads and a height other
                      than the width are in no tensor's shape

    Raises:
        FileNotFoundError: if there is no such file or published model.
        ValueError:        if the file is damaged or of another model; the message names the tensor.
        ConnectionError:   if a download fails.
    """
    path = _locate(name_or_path, cache_dir)
    checkpoint = read_file(path)
    state, source = _choose(checkpoint, weights, path), str(path)
    other_size = "input_size" in overrides
    if layout_of(state, source) == "ours":
        config = checkpoint.get("config")
        if not isinstance(config, dict) or "model" not in config:
            raise ValueError(f"{path} holds our weights without their config: give a checkpoint of train.py, or what "
                             "download.py convert or save_pretrained wrote")  # fmt: skip
        model = PyramidalPatchDiT(**{**config["model"], **overrides})
        load_own_state_dict(model, state, source, other_size)
        described, vae, scaling = config.get("transport", {}), config.get("vae"), config.get("scaling")
        step = int(checkpoint.get("step", 0))
    else:
        model = PyramidalPatchDiT(**fields_from_shapes(state, source, **overrides))
        import_state_dict(model, state, source, other_size)
        args, moments = checkpoint.get("args"), (checkpoint.get("opt") or {}).get("state", {})
        described = vars(args) if isinstance(args, argparse.Namespace) else {}
        vae, scaling = SHORT_NAMES.get(described.get("vae")), None
        step = max((int(parameter.get("step", 0)) for parameter in moments.values()), default=0)  # Adam counts them
    transport = {key: described.get(key, default) for key, default in default_transport(model).items()}
    vae = vae or (SHORT_NAMES["ema"] if model.in_channels == 4 else "none")  # four channels are Stable Diffusion's
    name = registry_name(model) or _describe(model)
    published = not Path(name_or_path).expanduser().exists()
    stated = frozenset(transport if published else transport.keys() & described.keys())
    return Pretrained(model.eval(), transport, vae, name, step, scaling, stated)


def default_transport(model: PyramidalPatchDiT) -> dict[str, Any]:
    """The process that the published weights were trained for, and files that say nothing of it."""
    return {
        "path_type": "Linear",
        "prediction": "velocity",
        "loss_weight": None,
        "train_eps": None,
        "sample_eps": None,
        "level_edges": list(PatchSchedule.default(model.num_levels).level_edges),
    }


def _describe(model: PyramidalPatchDiT) -> str:
    patches = "+".join(f"{p}x{q}" for p, q in model.patch_sizes)
    return f"PyramidalPatchDiT {patches}, {model.depth} blocks, {model.hidden_size} wide"


def _locate(name_or_path: str | Path, cache_dir: str | Path | None) -> Path:
    """The file with the weights: a path wins over a name."""
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise FileNotFoundError(f"{name_or_path}: {error}") from error
    if path.is_dir():
        file = path / "model.safetensors" if (path / "model.safetensors").is_file() else newest_checkpoint(path)
        if file is None:
            raise FileNotFoundError(f"{path} holds neither checkpoints/*.pt nor model.safetensors")
        return file
    if path.is_file():
        return path
    return download(str(name_or_path), cache_dir)


def read_file(path: Path) -> dict[str, Any]:
    """What a file holds, onto the CPU: a state dict, or a dict of them with what else training saved.

    Raises:
        ValueError: if it cannot be read, or holds code.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # PPFlow's and SiT's "args": plain data
            # Mapped, not read: tensors that are not needed (the optimizer's) cost nothing.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} holds {refused[1]}, not only tensors and plain data: it is not opened") from error
        # Where torch advises weights_only=False, the file is none of torch's.
        advice = isinstance(error, pickle.UnpicklingError) or not str(error).strip()
        reason = type(error).__name__ if advice else re.split(r"\. |\n", str(error).strip())[0]
        raise ValueError(f"cannot read {path} ({path.stat().st_size:,} bytes), is it truncated? ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Any]:
    """A safetensors file as a checkpoint: its config is in its metadata, or next to it (save_pretrained)."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "config" in metadata:
        return {"ema": state, "config": json.loads(metadata["config"]), "step": int(metadata["step"])}
    beside = path.with_name("config.json")
    if path.name == "model.safetensors" and beside.is_file():
        config = json.loads(beside.read_text())
        names = inspect.signature(PyramidalPatchDiT).parameters
        return {"ema": state, "config": {**config, "model": {key: config[key] for key in names if key in config}}}
    return state


def _choose(checkpoint: dict[str, Any], weights: str, path: Path) -> dict[str, torch.Tensor]:
    """The averaged or the last weights of a checkpoint; a bare state dict has one set, which counts as averaged."""
    sets = {key: checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), dict)}
    sets = sets or {"ema": checkpoint}
    if weights not in sets:
        raise ValueError(f"{path} has no weights {weights!r}, only {', '.join(map(repr, sets))}")
    for name, value in sets[weights].items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} is no checkpoint: {name} is a {type(value).__name__}, not a tensor")
    return sets[weights]


# ---------------------------------------------------------------------------------------------------------------
# Downloads: complete and checked under their name, or absent


def published_name(name: str) -> str:
    """The key of PUBLISHED that a name or a file's name means (FileNotFoundError if none)."""
    names = {published.file: known for known, published in PUBLISHED.items()}
    with contextlib.suppress(ValueError):
        names[name] = names.get(name) or canonical_name(name)
    if names.get(name) not in PUBLISHED:
        raise FileNotFoundError(f"{name} is neither a file nor the name of published weights ({', '.join(PUBLISHED)})")
    return names[name]


def download(name: str, cache_dir: str | Path | None = None, verify: bool = False) -> Path:
    """The file of published weights, fetched if it is not in the cache.

    An interrupted download is kept as FILE.part and continued. A complete one is opened, and its tensors compared with
    those of the model, before it gets its name; its size and sha256 are written to FILE.sha256 (for sha256sum -c).

    Args:
        name:      a key of PUBLISHED in any spelling, or its file's name
        cache_dir: as for load_pretrained
        verify:    read a cached file and compare its sha256; otherwise its size only

    Raises:
        FileNotFoundError: if there are no published weights of this name.
        ValueError:        if the file is not what it should be.
        ConnectionError:   if it cannot be fetched.
    """
    name = published_name(name)
    folder = _cache_folder(cache_dir)
    target = folder / PUBLISHED[name].file
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{target}.lock").acquire()  # the processes of a node ask at once: one fetches
        except OSError as error:
            raise OSError(f"{name} cannot be kept in {folder} ({error}): set PPFLOW_CACHE to another folder") from error
        with lock:
            if not target.is_file():
                _fetch_checked(name, target)
    recorded, digest = target.with_name(f"{target.name}.sha256"), PUBLISHED[name].sha256
    if recorded.is_file():
        size, found = _recorded(recorded)
        if target.stat().st_size != size:
            raise ValueError(f"{target} is not what was downloaded: delete it, and it is fetched again")
        digest = digest or found
    if verify and digest and _sha256(target) != digest:
        raise ValueError(f"{target} is not what was downloaded: delete it, and it is fetched again")
    return target


def _cache_folder(cache_dir: str | Path | None) -> Path:
    try:
        return Path(cache_dir or os.environ.get("PPFLOW_CACHE") or "~/.cache/ppflow").expanduser()
    except RuntimeError as error:  # nobody's process, in a container
        raise OSError("this user has no home folder for downloads: set PPFLOW_CACHE to a folder") from error


def _recorded(path: Path) -> tuple[int, str]:
    """Size and digest in a FILE.sha256 (ValueError if it is damaged)."""
    content = re.fullmatch(r"# (\d+) bytes\n(\w+)  .*\n", path.read_text(errors="replace"))
    if content is None:
        raise ValueError(f"{path} is damaged: delete it, and {path.stem} too if you do not trust it")
    return int(content[1]), content[2]


def _fetch_checked(name: str, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    _fetch(name, part)
    digest = _sha256(part)
    try:
        if PUBLISHED[name].sha256 not in (None, digest):
            raise ValueError(f"the sha256 of what it gave is {digest}, not {PUBLISHED[name].sha256}")
        check_published(part, name)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{PUBLISHED[name].url} did not give the weights of {name}: {error}") from error
    with complete_file(target.with_name(f"{target.name}.sha256")) as temporary:
        temporary.write_text(f"# {part.stat().st_size} bytes\n{digest}  {target.name}\n")
    os.replace(part, target)
    tqdm.write(f"{name}: sha256 {digest}", file=sys.stderr)


def check_published(path: Path, name: str) -> None:
    """Refuse a file that is not the published weights of a model (ValueError); the message names the tensor."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{path}: {damaged} is damaged")
    state = _choose(read_file(path), "ema", path)
    with torch.device("meta"):
        model = create_model(name)
        check_tensors(state, export_state_dict(model, "sit" if model.num_levels == 1 else "ppflow"), str(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _fetch(name: str, part: Path) -> None:
    """Download into `part`, going on from what it holds, for as long as every attempt brings something."""
    url = PUBLISHED[name].url

    def failed(reason: object) -> ConnectionError:
        kept = part.stat().st_size if part.exists() else 0
        note = f"; {kept:,} bytes are kept and the next attempt goes on from there" if kept else ""
        return ConnectionError(f"cannot fetch {name} from {url}: {reason}{note}. "
                               "Or download it elsewhere, and give the file's path instead of the name")  # fmt: skip

    while True:
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "ppflow", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as reply:
                total = _append(reply, part, have, name)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
                raise failed(f"HTTP {error.code} {error.reason}") from error
            total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if total and int(total[1]) == have:
                return  # it was complete
            part.unlink()  # of another file
            if not (total and int(total[1]) < have):
                raise failed("it does not continue the part of an earlier attempt, which is deleted") from error
            continue
        except (OSError, http.client.HTTPException) as error:
            raise failed(getattr(error, "reason", error) or type(error).__name__) from error
        now = part.stat().st_size
        if now == total:
            return
        if now <= have:
            raise failed(f"the connection ended after {now:,} of {total:,} bytes")


def _append(reply: http.client.HTTPResponse, part: Path, have: int, name: str) -> int:
    """Write what a reply brings; returns how long the whole file is. A connection that breaks off just ends it."""
    if reply.headers.get_content_type() == "text/html":
        raise OSError("the address answers with a web page, not with the file")
    if reply.status == http.client.PARTIAL_CONTENT:
        length = re.fullmatch(rf"bytes {have}-\d+/(\d+)", reply.headers.get("Content-Range", ""))
    else:  # the whole file, from the beginning
        length, have = re.fullmatch(r"(\d+)", reply.headers.get("Content-Length", "")), 0
    if length is None:
        raise OSError("the server does not say which part of how long a file it sends")
    total = int(length[1])
    with (
        open(part, "ab" if have else "wb") as file,
        tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name,
             mininterval=0.5 if sys.stderr.isatty() else 15) as progress,
    ):  # fmt: skip
        for block in _blocks(reply):
            file.write(block)
            progress.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    return total


def _blocks(reply: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = reply.read1(CHUNK)
        except (OSError, http.client.HTTPException):
            return
        if not block:
            return
        yield block


# ---------------------------------------------------------------------------------------------------------------
# Command line


def convert(source: str | Path, out: str | Path, layout: str, weights: str = "ema", **overrides: Any) -> Pretrained:
    """Write weights of any layout as a .pt or .safetensors file in another.

    Args:
        source:    what load_pretrained takes
        out:       the file to write; the module's docstring says what it holds
        layout:    "ours", "ppflow" or "sit"; the last two hold weights alone, no schedule
        weights:   which of a checkpoint's; as for load_pretrained
        overrides: as for load_pretrained

    Raises:
        ValueError, OSError: if the source cannot be read, or the model has no such layout.
    """
    out = Path(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{out} ends neither in .pt nor in .safetensors")
    pretrained = load_pretrained(source, weights, **overrides)
    content: dict[str, Any]
    metadata = {"format": "pt"}  # which safetensors' readers expect
    if layout == "ours":
        config = {
            "model_name": pretrained.name,
            "model": pretrained.model.config,
            "transport": pretrained.transport,
            "vae": pretrained.vae,
            "scaling": pretrained.scaling,
        }
        state = own_state_dict(pretrained.model)
        content = {"ema": state, "config": config, "step": pretrained.step}
        metadata |= {"config": json.dumps(config), "step": str(pretrained.step)}
    else:
        content = state = export_state_dict(pretrained.model, layout)
    with complete_file(out) as temporary:
        if out.suffix == ".pt":
            torch.save(content, temporary)
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata)
    return pretrained


def main(argv: Sequence[str] | None = None) -> None:
    """Run download.py with these command-line arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["convert"]:
        parser = ArgumentParser(prog="download.py convert", description="Write weights of any layout in another.")
        parser.add_argument("source", metavar="IN", help="published name, run folder, checkpoint or weights")
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
            print(f"note: that layout has no place for {lost}: give it to whatever reads the file")
        return
    parser = ArgumentParser(
        prog="download.py",
        description="Fetch published weights into the cache folder ($PPFLOW_CACHE, or ~/.cache/ppflow).",
        epilog="download.py convert --help: write weights in another layout",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PUBLISHED)} (none given: all of them)")
    parser.add_argument("--verify", action="store_true", help="read files that are there, and compare their sha256")
    args = parser.parse_args(argv)
    with user_input():
        for name in [published_name(name) for name in args.names] or PUBLISHED:
            path = download(name, verify=args.verify)
            print(f"{name}: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    run_script(main)
