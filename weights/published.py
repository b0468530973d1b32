"""Download weights that their authors publish.

A file appears under its name only when it is complete and checked.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from tqdm import tqdm

from models import create_model, plain_spelling
from positions import RopeScaling
from runtime.files import check_tensors, complete_file
from weights.files import choose_weights, read_file
from weights.layouts import export_state_dict, foreign_layout


class Published(NamedTuple):
    """Weights that their authors offer.

    They publish no digests, so none is pinned: a download is checked by its tensors' names and shapes, and its digest
    is printed, to compare with others. A digest given here is checked before the file gets its name.
    """

    file: str
    url: str
    sha256: str | None = None
    model: str | None = None  # the registry's name, where that is another
    fields: Mapping[str, Any] = MappingProxyType({})  # arguments of the network that no tensor's shape tells
    rope_scaling: RopeScaling | None = None  # with which its authors sample, where that is not weights.fit's


FIT_HUB = "https://huggingface.co/InfImagine"
# Trained on up to 512x512 pixels, with positions that are stretched as if they still came from 256x256.
TRAINED_AT_512 = {"fields": {"input_size": 64}, "rope_scaling": RopeScaling("ntk")}

# From the READMEs of PPFlow, SiT and FiT; dl=1 asks Dropbox for the file, not for a page about it.
PUBLISHED = {
    "PPF-XL-2": Published(
        "PPF-XL-2.pt",
        "https://www.dropbox.com/scl/fi/uh4o7kra6fnwlrd2lmry0/PPF-XL-2.pt"
        "?rlkey=k26p7aw7zwar1a8x0em74vhor&st=upovbj1j&dl=1",
    ),
    "PPF-XL-3": Published(
        "PPF-XL-3.pt",
        "https://www.dropbox.com/scl/fi/0tnt99s21532sxfg804vq/PPF-XL-3.pt"
        "?rlkey=gt7shf2i23jb40pxzv9t0nje3&st=hlbtmvhi&dl=1",
    ),
    "SiT-XL/2": Published(
        "SiT-XL-2-256.pt",
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/"
        "SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1",
    ),
    "FiT-XL/2": Published("FiT-XL-2.bin", f"{FIT_HUB}/FiT/resolve/main/FiTv1_xl/model_ema.bin"),
    "FiTv2-XL/2": Published("FiTv2-XL-2.safetensors", f"{FIT_HUB}/FiTv2/resolve/main/FiTv2_XL/model_ema.safetensors"),
    "FiTv2-3B/2": Published("FiTv2-3B-2.bin", f"{FIT_HUB}/FiTv2/resolve/main/FiTv2_3B/model_ema.bin"),
    "FiTv2-HR-XL/2": Published(
        "FiTv2-HR-XL-2.safetensors",
        f"{FIT_HUB}/FiTv2/resolve/main/FiTv2_XL_HRFT/model_ema.safetensors",
        model="FiTv2-XL/2",
        **TRAINED_AT_512,
    ),
    "FiTv2-HR-3B/2": Published(
        "FiTv2-HR-3B-2.safetensors",
        f"{FIT_HUB}/FiTv2/resolve/main/FiTv2_3B_HRFT/model_ema.safetensors",
        model="FiTv2-3B/2",
        **TRAINED_AT_512,
    ),
}

TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes


def published_name(name: str) -> str:
    """The key of PUBLISHED for a model name in any spelling, or a file's name (FileNotFoundError if none)."""
    for known, published in PUBLISHED.items():
        if name == published.file or plain_spelling(name) == plain_spelling(known):
            return known
    raise FileNotFoundError(f"{name} is neither a file nor the name of published weights ({', '.join(PUBLISHED)})")


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
        ValueError:        if the file is not the published one.
        ConnectionError:   if it cannot be fetched.
    """
    name = published_name(name)
    folder = cache_folder(cache_dir)
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
    if verify and digest and file_sha256(target) != digest:
        raise ValueError(f"{target} is not what was downloaded: delete it, and it is fetched again")
    return target


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of downloads: PPFLOW_CACHE, or ~/.cache/ppflow (OSError if there is no home folder)."""
    try:
        return Path(cache_dir or os.environ.get("PPFLOW_CACHE") or "~/.cache/ppflow").expanduser()
    except RuntimeError as error:  # a user without an entry in passwd, in a container
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
    digest = file_sha256(part)
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
    state = choose_weights(read_file(path), "ema", path)
    with torch.device("meta"):
        model = create_model(PUBLISHED[name].model or name)
        check_tensors(state, export_state_dict(model, foreign_layout(model)), str(path))


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _fetch(name: str, part: Path) -> None:
    """Download into `part`, continuing from its end, until it is complete or an attempt brings nothing."""
    url = PUBLISHED[name].url

    def failed(reason: object) -> ConnectionError:
        kept = part.stat().st_size if part.exists() else 0
        note = f"; {kept:,} bytes are kept and the next attempt goes on from there" if kept else ""
        return ConnectionError(
            f"cannot fetch {name} from {url}: {reason}{note}. "
            "Or download it elsewhere, and give the file's path instead of the name"
        )

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
                return  # it was complete already
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
    """Append a reply's bytes, until it ends or the connection breaks; returns the length of the whole file."""
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
        tqdm(
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=name,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        ) as progress,
    ):
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
