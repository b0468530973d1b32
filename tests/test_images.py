"""Image files of all depths and damages, and folders and archives that change, lie or bear odd names."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from PIL import Image

from data.datasets import open_dataset
from data.images import LARGEST_IMAGE, UnreadableImage, center_crop_arr, printable, read_rgb
from data.order import StepSampler, training_loader


def png(width: int = 8, height: int = 8, seed: int = 0) -> bytes:
    """A PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    """Write the files, with their folders."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def archive_of(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive of the files."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def refusal(call: Callable[[], object], kind: type[Exception] = UnreadableImage) -> str:
    """The error message of a call, on one line."""
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).isprintable()  # neither newlines nor bytes of no encoding
    return str(error.value)


# -- More than 8 bits ----------------------------------------------------------------------------------------------

SIDE = 16
RAMP = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)  # 0 to 255: black to white


def tiff(values: np.ndarray, order: str, bits: int = 16, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed grey TIFF file, written from its specification; order is < or >, as in struct."""
    height, width = values.shape
    data = values.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        directory += struct.pack(f"{order}HHI", tag, 4 if tag in (273, 279) else 3, 1)
        directory += struct.pack(
            f"{order}I" if tag in (273, 279) else f"{order}HH", *((value,) if tag in (273, 279) else (value, 0))
        )
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return start + data + directory + bytes(4)


def grey_png(values: np.ndarray) -> bytes:
    """A 16-bit grey PNG file, written from its specification."""
    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def pgm(values: np.ndarray, largest: int) -> bytes:
    """A grey PGM file with values up to the largest."""
    height, width = values.shape
    return f"P5 {width} {height} {largest}\n".encode() + values.astype(">u2").tobytes()


WIDE = {  # of values 0 to 65535
    "png": grey_png,
    "pgm": lambda values: pgm(values, 65535),
    "plain.pgm": lambda values: f"P2 {SIDE} {SIDE} 65535\n{' '.join(map(str, values.flatten()))}\n".encode(),
    "little.tiff": lambda values: tiff(values.astype("<u2"), "<"),
    "big.tif": lambda values: tiff(values.astype(">u2"), ">"),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_ramp_of_16_bits_reads_like_one_of_8(tmp_path, name):
    files = {f"a/0.{name}": WIDE[name](257 * RAMP), f"b/1.{name}": WIDE[name](np.full_like(RAMP, 32767))}
    for path in (folder_of(tmp_path / "folder", files), archive_of(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)):
        dataset = open_dataset(str(path), SIDE)
        expected = torch.from_numpy(RAMP.astype(np.float32) / 127.5 - 1)
        torch.testing.assert_close(dataset.load(0)[0], expected.expand(3, SIDE, SIDE))
        assert set(dataset.load(1)[0].flatten().tolist()) == {np.float32(127) / np.float32(127.5) - 1}  # 127.498


def test_values_between_those_of_8_bits_are_rounded_to_the_nearest():
    values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    for write in WIDE.values():
        pixels = np.asarray(read_rgb(io.BytesIO(write(values))))
        np.testing.assert_array_equal(pixels, np.rint(values / 65535 * 255)[..., None].repeat(3, axis=2))


def test_the_largest_value_of_a_pgm_is_white():
    pixels = np.asarray(read_rgb(io.BytesIO(pgm(4 * RAMP.astype(np.uint32) + 3, 1023))))
    assert np.abs(pixels[..., 0] - (4.0 * RAMP + 3) / 1023 * 255).max() <= 1


REFUSED = {
    "floats": (tiff((RAMP / 255).astype("<f4"), "<", bits=32, sample_format=3), "mode F"),
    "32 bits": (tiff((RAMP.astype("<i4") * 2**20), "<", bits=32, sample_format=2), "mode I"),
    "32 bits, small values": (tiff(RAMP.astype("<i4"), "<", bits=32, sample_format=2), "mode I"),
    "signed": (tiff(RAMP.astype("<i2") - 128, "<", sample_format=2), "mode I"),
    "white is 0": (tiff(257 * RAMP, "<", photometric=0), "mode I;16"),
    "12 bits": (tiff(np.zeros((16, 16), np.uint16), "<", bits=12), "mode I;16"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_values_of_unknown_range_are_refused_by_name(tmp_path, which):
    data, mode = REFUSED[which]
    path = folder_of(tmp_path, {"a/0.tif": data})
    message = refusal(lambda: open_dataset(str(path), SIDE).load(0))
    assert f"cannot read the image {tmp_path}/a/0.tif" in message
    assert f"in Pillow's {mode} it is unknown which value is white: save it with 8 bits" in message


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_every_order_of_bytes_is_read(monkeypatch, mode):
    little = mode in ("I;16", "I;16L") or (mode == "I;16N" and sys.byteorder == "little")
    image = Image.frombytes(mode, (SIDE, SIDE), (257 * RAMP).astype("<u2" if little else ">u2").tobytes())
    monkeypatch.setattr(Image, "open", lambda file: image)
    np.testing.assert_array_equal(np.asarray(read_rgb(io.BytesIO()))[..., 0], RAMP)


# -- What is stored is what is seen, as for ADM --------------------------------------------------------------------


def test_exif_turns_nothing():
    """ADM's loader calls Image.open and convert("RGB"), which ignore Exif's orientation."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    assert Image.open(buffer).getexif()[0x0112] == 6
    np.testing.assert_array_equal(np.asarray(read_rgb(buffer)), pixels)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert Image.open(buffer).n_frames == 3
    np.testing.assert_array_equal(np.asarray(read_rgb(buffer)), np.asarray(frames[0]))


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 1000), (1000, 1), (1, 130), (7, 900), (2000, 30), (24, 1600)]
)
def test_long_images_are_cropped_like_others(width, height, monkeypatch):
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    image.putpixel((width // 2, height // 2), (0, 90, 180))
    crop = center_crop_arr(image, 16)
    monkeypatch.setattr("data.sizes.LONGEST", np.inf)
    whole = center_crop_arr(image, 16)
    assert crop.shape == whole.shape == (16, 16, 3)
    assert np.abs(crop.astype(int) - whole).max() <= 2  # roundings


def test_a_line_of_pixels_is_never_made_millions_of_pixels_long(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def record(self: Image.Image, size: tuple[int, int], *arguments: object) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", record)
    for width, height in ((1, 10_000), (10_000, 1), (8_000_000, 20)):
        assert center_crop_arr(Image.new("RGB", (width, height)), 256).shape == (256, 256, 3)
    assert set(sizes) == {(256, 256)}


# -- Damage --------------------------------------------------------------------------------------------------------


def wrong_chunk_length() -> bytes:
    """A PNG whose image data seem to be longer than they are; Pillow then raises SyntaxError."""
    data = bytearray(png())
    place = data.index(b"IDAT") - 4
    length = int.from_bytes(data[place : place + 4], "big")
    # The next chunk begins at what seems to be the end of this one, and its checksum is right.
    data[place : place + 4] = (length - 20).to_bytes(4, "big")
    end = place + 8 + length - 20
    data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
    return bytes(data)


def endless_text() -> bytes:
    """A PNG with a chunk of 2 GB, of which nothing follows."""
    return png()[:33] + (2**31 - 1).to_bytes(4, "big") + b"tEXt"


DAMAGED = {"wrong length": wrong_chunk_length, "endless": endless_text}


def test_pillow_raises_an_error_of_its_own_at_a_wrong_length():
    with pytest.raises(SyntaxError), Image.open(io.BytesIO(wrong_chunk_length())) as image:
        image.load()


@pytest.mark.parametrize("which", DAMAGED)
def test_whatever_pillow_raises_the_image_is_named(tmp_path, which):
    files = {"a/0.png": DAMAGED[which]()}
    for path in (folder_of(tmp_path / "folder", files), archive_of(tmp_path / "a.zip", files)):
        dataset = open_dataset(str(path), 8)
        assert f"cannot read the image {path}/a/0.png: " in refusal(lambda dataset=dataset: dataset.load(0))


def test_a_worker_process_names_it_too(tmp_path):
    dataset = open_dataset(str(folder_of(tmp_path, {"a/0.png": wrong_chunk_length()})), 8)
    with pytest.raises(OSError, match=r"(?s)worker process 0.*cannot read the image .*a/0\.png"):
        list(training_loader(dataset, 0, StepSampler(0, 1, 1), num_workers=1, pin_memory=False))


@pytest.mark.parametrize(
    "error", [SyntaxError("bad"), EOFError(), struct.error("x\ny"), MemoryError(), RecursionError()]
)
def test_errors_of_every_kind_are_one_line_with_a_reason(tmp_path, monkeypatch, error):
    def fail(file: object) -> None:
        raise error

    dataset = open_dataset(str(folder_of(tmp_path, {"a/0.png": png()})), 8)
    monkeypatch.setattr(Image, "open", fail)
    message = refusal(lambda: dataset.load(0))
    assert message.endswith((str(error).replace("\n", " ") or type(error).__name__,))


@pytest.mark.filterwarnings("ignore")
def test_thousands_of_damaged_files_are_read_or_named(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.open(io.BytesIO(png(20, 16)))
    files = []
    for kind, options in (
        ("PNG", {}),
        ("JPEG", {}),
        ("WEBP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {}),
        ("GIF", {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    dataset = open_dataset(str(folder_of(tmp_path, {"a/0.png": png()})), 8)
    read = 0
    for number in range(1500):
        data = bytearray(files[number % len(files)])
        for place in rng.integers(0, min(len(data), 200), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        (tmp_path / "a" / "0.png").write_bytes(data[: rng.integers(1, len(data))] if number % 5 == 0 else data)
        try:
            image, message = dataset.load(0)[0], None
        except UnreadableImage as error:
            image, message = None, str(error)
        if message is None:
            assert image.shape == (3, 8, 8)
            read += 1
        else:
            assert message.startswith(f"cannot read the image {tmp_path}/a/0.png: ")
            assert message.isprintable()
    assert 300 < read < 1200  # of both there are enough


# -- Archives that lie ---------------------------------------------------------------------------------------------


def tell_size(archive: Path, name: str, size: int) -> None:
    """Write another unpacked size of a file into the archive's directory."""
    data = bytearray(archive.read_bytes())
    place = data.index(b"PK\1\2")
    while data[place + 46 : place + 46 + len(name)] != name.encode():
        place = data.index(b"PK\1\2", place + 4)
    data[place + 24 : place + 28] = size.to_bytes(4, "little")
    archive.write_bytes(data)


@pytest.mark.slow
def test_an_entry_that_inflates_to_hundreds_of_megabytes_takes_no_memory(tmp_path):
    files = {"0.png": png(), "1.png": bytes(LARGEST_IMAGE + 1)}
    path = archive_of(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)
    liar = tmp_path / "liar.zip"
    liar.write_bytes(path.read_bytes())
    tell_size(liar, "1.png", 1000)
    code = f"""if True:
        import resource
        from data.datasets import open_dataset
        for path in ({str(path)!r}, {str(liar)!r}):
            dataset = open_dataset(path)
            dataset.load(0)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                dataset.load(1)
            except OSError as error:
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    (kilobytes, message), (more, another) = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert message == f"cannot read the image {path}/1.png: it has 134,217,729 bytes, more than 134,217,728"
    assert f"cannot read the image {liar}/1.png: the archive is damaged there" in another
    assert max(int(kilobytes), int(more)) < 10_000


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", [-1, 1])
def test_entries_of_another_size_than_told_are_damaged(tmp_path, method, change):
    path = archive_of(tmp_path / "a.zip", {"0.png": png(), "1.png": png(seed=1)}, method)
    tell_size(path, "1.png", len(png(seed=1)) + change)
    dataset = open_dataset(str(path))
    dataset.load(0)
    assert "1.png: the archive is damaged there" in refusal(lambda: dataset.load(1))


@pytest.mark.parametrize("label", [2**40, 10**6, 2**70])
def test_absurd_labels_are_refused_with_the_image(tmp_path, label):
    files = {"0.png": png(), "1.png": png()}
    description = json.dumps({"labels": [["0.png", 999_999], ["1.png", label]]}).encode()
    path = archive_of(tmp_path / "a.zip", {**files, "dataset.json": description})
    message = refusal(lambda: open_dataset(str(path)), ValueError)
    assert message == f"{path}/dataset.json puts 1.png into class {label}: there are at most 1,000,000"
    description = json.dumps({"labels": [["0.png", 999_999], ["1.png", 0]]}).encode()
    archive_of(path, {**files, "dataset.json": description})
    assert open_dataset(str(path)).num_classes == 10**6


def test_a_list_of_labels_that_inflates_without_end_is_refused(tmp_path):
    path = archive_of(tmp_path / "a.zip", {"0.png": png(), "dataset.json": b"{}"}, zipfile.ZIP_DEFLATED)
    tell_size(path, "dataset.json", 2**31)
    assert f"{path} cannot be read as a zip archive: its dataset.json has 2,147,483,648" in refusal(
        lambda: open_dataset(str(path)), ValueError
    )
    archive_of(path, {"0.png": png(), "dataset.json": b"[" * 100_000}, zipfile.ZIP_DEFLATED)
    assert "dataset.json is not" in refusal(lambda: open_dataset(str(path)), ValueError)


def test_archives_without_images_are_one_line(tmp_path):
    archive_of(tmp_path / "empty.zip", {})
    archive_of(tmp_path / "folders.zip", {"a/": b"", "a/b.png/": b"", "c/": b""})
    for name in ("empty.zip", "folders.zip"):
        message = refusal(lambda name=name: open_dataset(str(tmp_path / name)), ValueError)
        assert f"{tmp_path / name} holds no images" in message


# -- Data that change while they are read --------------------------------------------------------------------------


def test_a_folder_that_changes_is_named(tmp_path):
    path = folder_of(tmp_path, {"a/0.png": png(), "a/1.png": png(seed=1), "b/2.png": png(seed=2)})
    dataset = open_dataset(str(path), 8)
    (path / "a" / "0.png").unlink()
    assert refusal(lambda: dataset.load(0)) == f"cannot read the image {path}/a/0.png: No such file or directory"
    (path / "a" / "1.png").write_bytes(png()[:60])
    assert "a/1.png: " in refusal(lambda: dataset.load(1))
    (path / "b" / "2.png").unlink()
    (path / "b" / "2.png").mkdir()
    assert refusal(lambda: dataset.load(2)) == f"cannot read the image {path}/b/2.png: Is a directory"


@pytest.mark.parametrize("how", ["truncated", "rewritten", "replaced by another", "gone"])
def test_an_archive_that_changes_is_named(tmp_path, how):
    files = {f"{number}.png": png(seed=number) for number in range(3)}
    path = archive_of(tmp_path / "a.zip", files)
    dataset, late = open_dataset(str(path)), open_dataset(str(path), 8)  # the second has no file open yet
    dataset.load(2)
    other = archive_of(tmp_path / "other.zip", {f"{number}.png": png(seed=3 + number) for number in range(3)})
    if how == "truncated":
        os.truncate(path, 100)
    elif how == "rewritten":
        path.write_bytes(other.read_bytes())
    else:
        (other.replace if how != "gone" else Path.rename)(
            *((path,) if how != "gone" else (path, tmp_path / "moved.zip"))
        )
    kind = OSError if how == "gone" else UnreadableImage
    assert f"cannot read the image {path}/2.png: " in refusal(lambda: late.load(2), kind)
    if how in ("truncated", "rewritten"):
        assert "damaged there, or has changed since it was opened" in refusal(lambda: dataset.load(2))
    else:
        dataset.load(2)  # what is open stays as it was


def test_a_failing_disk_is_no_fault_of_the_image(tmp_path, monkeypatch):
    dataset = open_dataset(str(folder_of(tmp_path / "drive", {"a/0.png": png()})), 8)
    (tmp_path / "drive").rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"cannot read the image .*a/0\.png: No such file or directory") as error:
        dataset.load(0)
    assert not isinstance(error.value, UnreadableImage)
    (tmp_path / "away").rename(tmp_path / "drive")
    dataset.load(0)

    def fail(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(dataset, "open_image", fail)
    with pytest.raises(OSError, match=r"cannot read the image .*a/0\.png: Stale file handle") as error:
        dataset.load(0)
    assert not isinstance(error.value, UnreadableImage)


# -- Many, and odd names -------------------------------------------------------------------------------------------


def test_a_thousand_classes_of_one_image(tmp_path):
    dataset = open_dataset(str(folder_of(tmp_path, {f"{number:04d}/x.png": png() for number in range(1000)})), 8)
    assert (len(dataset), dataset.num_classes) == (1000, 1000)
    assert [dataset.load(index)[1] for index in (0, 567, 999)] == [0, 567, 999]


ODD = [
    "a\nb.png",
    "é 猫.png",
    "x" * 251 + ".png",
    os.fsdecode(b"\xff\xfe.png"),
    "a\u202eb.png",
    "'\".png",
    "\ud83d.png",
]


@pytest.mark.parametrize("name", [name for name in ODD if name != "\ud83d.png"])
def test_names_of_every_kind_are_read_and_shown(tmp_path, name):
    path = folder_of(tmp_path, {f"a/{name}": png(), f"b{name[:3]}/0.png": b"no image"})
    dataset = open_dataset(str(path), 8)
    dataset.load(0)
    assert "it is no image" in refusal(lambda: dataset.load(1))
    os.unlink(path / "a" / name)
    message = refusal(lambda: dataset.load(0))
    message.encode()  # as any log does
    assert (name in message) == name.isprintable()


def test_names_are_shown_so_that_they_can_be_told_apart():
    assert [printable(name) for name in ODD[:2]] == ["a\\nb.png", "é 猫.png"]
    assert len({printable(name) for name in ODD}) == len(ODD)


@pytest.mark.slow
def test_names_are_read_and_shown_where_text_is_ascii(tmp_path):
    """An image of each kind with a name outside ASCII, and a damaged one, in an ASCII locale."""
    names = ["é.png".encode(), b"\xff.png"]
    for folder, data in ((b"a", png()), (b"b", b"no image")):
        os.mkdir(os.path.join(os.fsencode(tmp_path), folder))
        for name in names:
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), folder, name))).write_bytes(data)
    archive = archive_of(tmp_path / "a.zip", {"a/é.png": png(), "b/é.png": b"no image"})
    code = f"""if True:
        import json
        from data.datasets import open_dataset
        for path in ({str(tmp_path)!r}, {str(archive)!r}):
            dataset = open_dataset(path, 8)
            for index in range(len(dataset)):
                try:
                    print(dataset.load(index)[1])
                except OSError as error:
                    print(ascii(str(error)))
            print(json.dumps(dataset.identity()))"""
    environment = {**os.environ, **ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["0", "0"]
    assert all("it is no image" in line for line in lines[2:4])
    assert json.loads(lines[4]) == open_dataset(str(tmp_path), 8).identity()  # whatever this process's locale is
    assert lines[5] == "0"
    assert "it is no image" in lines[6]
    assert json.loads(lines[7]) == open_dataset(str(archive), 8).identity()
