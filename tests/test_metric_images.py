"""Images of an evaluation: all kinds of sources give the same arrays; damaged and incomplete ones are refused."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import sample_ddp
from metrics.images import open_images
from runtime.rng import label_of
from runtime.sample_store import PngStore, ShardStore

N, HEIGHT, WIDTH = 11, 5, 6
PIXELS = np.random.default_rng(0).integers(0, 256, (N, HEIGHT, WIDTH, 3), dtype=np.uint8)
LABELS = np.arange(N) % 4
SETTINGS = {"checkpoint": "PPF-T-2, step 20", "label_sampling": "random", "global_seed": 3, "png": True}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npz(root: Path) -> Path:
    np.savez(root / "images.npz", PIXELS, LABELS)
    return root / "images.npz"


def compressed(root: Path) -> Path:
    np.savez_compressed(root / "compressed.npz", arr_0=PIXELS, arr_1=LABELS.astype(np.int32))
    return root / "compressed.npz"


def folder(root: Path) -> Path:
    """Pictures in nested folders, made in another order than that of their names."""
    for index in reversed(range(N)):
        file = root / "pictures" / f"{index // 4}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(PIXELS[index]))
    (root / "pictures" / "notes.txt").write_text("no picture")
    (root / "pictures" / ".hidden.png").write_text("no picture")
    return root / "pictures"


def archive(root: Path, described: bool = True, method: int = zipfile.ZIP_STORED) -> Path:
    """An archive as of EDM."""
    with zipfile.ZipFile(root / "archive.zip", "w", method) as file:
        names = [f"{index // 4:05d}/img{index:08d}.png" for index in range(N)]
        for name, pixels in zip(names, PIXELS, strict=True):
            file.writestr(name, png(pixels))
        if described:
            labels = {"labels": [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]}
            file.writestr("dataset.json", json.dumps(labels))
    return root / "archive.zip"


def samples(root: Path, make: Callable[[Path], object], **settings: object) -> Path:
    """A folder as sample_ddp.py writes it: the first two batches of a process, then one of another."""
    store = make(root / "samples-cfg-1.5")
    for batch in ([4, 5, 6, 7], [8, 9, 10], [0, 1, 2, 3]):
        store.write(batch, PIXELS[batch], None)
    (store.folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    return store.folder


def png_samples(root: Path) -> Path:
    return samples(root, PngStore)


def shard_samples(root: Path) -> Path:
    return samples(root, ShardStore, png=False)


def samples_npz(root: Path) -> Path:
    """The .npz beside a folder of samples, of a version that wrote no classes into it."""
    made = samples(root, PngStore, num_classes=10)
    np.savez(made.with_name(made.name + ".npz"), PIXELS)
    return made.with_name(made.name + ".npz")


KINDS = [npz, compressed, folder, archive, png_samples, shard_samples, samples_npz]


def refusal(path: object, indices: range | None = None) -> str:
    """The message of an error while opening, or reading these images: one printable line."""

    def attempt() -> None:
        images = open_images(path)
        assert indices is not None, "it was opened"
        images.read(indices)

    with pytest.raises((ValueError, OSError)) as error:
        attempt()
    assert str(error.value).isprintable()
    return str(error.value)


# -- Kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_images_in_any_order(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    images = open_images(kind(tmp_path))
    assert len(images) == N
    assert images.image_size == (HEIGHT, WIDTH)
    assert images.source.startswith(str(tmp_path))
    for indices in (range(N), range(1, N, 3), [7, 0, 7, 10, 3], np.array([2]), []):
        found = images.read(indices)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, PIXELS[np.asarray(indices, int)])


@pytest.mark.parametrize("kind", [npz, compressed, archive])
def test_labels_are_those_in_the_file(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    labels = open_images(kind(tmp_path)).labels
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, LABELS)


def test_folders_are_no_classes(tmp_path: Path) -> None:
    assert open_images(folder(tmp_path)).labels is None
    assert open_images(archive(tmp_path, described=False)).labels is None


def test_deflated_archives_are_read(tmp_path: Path) -> None:
    images = open_images(archive(tmp_path, method=zipfile.ZIP_DEFLATED))
    np.testing.assert_array_equal(images.read(range(N)), PIXELS)


def test_the_word_digits_is_those_of_scikit_learn(tmp_path: Path) -> None:
    images = open_images("digits")
    digits = load_digits()
    assert len(images) == 1797
    assert images.image_size == (8, 8)
    np.testing.assert_array_equal(images.labels, digits.target)
    grey = np.floor(digits.images * 255 / 16 + 0.5)  # no value is halfway between two but 127.5
    found = images.read([0, 1796])
    assert np.abs(found - grey[[0, 1796], ..., None]).max() <= 1
    assert (found[..., 0] == found[..., 2]).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "1"])
def test_pictures_of_all_modes_become_rgb_without_alpha(mode: str, tmp_path: Path) -> None:
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "RGBA":
        picture = Image.fromarray(np.stack([ramp, ramp, ramp, ramp], -1))
    else:
        picture = Image.fromarray(ramp).convert(mode)
    for name in "ab":
        picture.save(tmp_path / f"{name}.png")
    wanted = np.asarray(picture.convert("L")) if mode in ("1", "P") else ramp
    np.testing.assert_array_equal(open_images(tmp_path).read([1])[0], np.repeat(wanted[..., None], 3, -1))


def test_grey_arrays_become_rgb(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", PIXELS[..., :1])
    np.testing.assert_array_equal(open_images(tmp_path / "grey.npz").read([4])[0], np.repeat(PIXELS[4, ..., :1], 3, -1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_is_never_loaded_whole(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "large.npz", np.zeros((6000, 64, 64, 3), np.uint8))
    tracemalloc.start()
    images = open_images(tmp_path / "large.npz")
    images.read([9, 500, 5999])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # of 74e6; zipfile skips in steps of 16 MiB


# -- Samples of sample_ddp.py ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [png_samples, shard_samples, samples_npz])
def test_samples_know_their_settings(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    settings = open_images(kind(tmp_path)).settings
    assert settings["checkpoint"] == SETTINGS["checkpoint"]
    assert open_images(npz(tmp_path)).settings is None


@pytest.mark.parametrize("sampling", ["random", "balanced"])
@pytest.mark.parametrize("make", [PngStore, ShardStore])
def test_samples_have_the_labels_that_were_drawn(make: type, sampling: str, tmp_path: Path) -> None:
    made = samples(tmp_path, make, png=make is PngStore, num_classes=10, label_sampling=sampling)
    wanted = [label_of(index, 10, 3, sampling) for index in range(N)]
    np.testing.assert_array_equal(open_images(made).labels, wanted)
    np.savez(made.with_name(made.name + ".npz"), PIXELS)
    np.testing.assert_array_equal(open_images(made.with_name(made.name + ".npz")).labels, wanted)


def test_samples_of_unknown_classes_have_no_labels(tmp_path: Path) -> None:
    assert open_images(png_samples(tmp_path)).labels is None


@pytest.mark.parametrize("kind", [[], ["--no-png"]])
def test_what_sample_ddp_writes_is_read(kind: list[str], tiny_run: Path, tmp_path: Path) -> None:
    flags = f"ODE --ckpt {tiny_run} --num-fid-samples 5 --num-sampling-steps 2 --sample-dir {tmp_path} --global-seed 4"
    sample_ddp.main([*flags.split(), "--per-proc-batch-size", "2", *kind])
    (file,) = tmp_path.glob("*.npz")
    from_file, from_folder = open_images(file), open_images(file.with_name(file.name.removesuffix(".npz")))
    np.testing.assert_array_equal(from_file.read(range(5)), from_folder.read(range(5)))
    np.testing.assert_array_equal(from_file.labels, from_folder.labels)
    np.testing.assert_array_equal(from_file.labels, [label_of(index, 10, 4, "random") for index in range(5)])
    assert from_file.settings == from_folder.settings
    assert from_file.settings["gmacs_per_image"] > 0


@pytest.mark.parametrize("kind", [png_samples, shard_samples])
def test_a_set_of_samples_with_gaps_is_refused(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    made = kind(tmp_path)
    lost = next(iter((made / "shards").glob("000004-*")), made / "000" / "000006.png")
    missing = 4 if lost.suffix == ".npz" else 1
    if missing == 4:  # a damaged file counts as missing, as for sample_ddp.py
        lost.write_bytes(lost.read_bytes()[:100])
    else:
        lost.unlink()
    assert f"lacks {missing} of its {N} samples: run the same sample_ddp.py command" in refusal(made)


def test_latents_and_empty_sets_are_refused(tmp_path: Path) -> None:
    made = samples(tmp_path, lambda path: ShardStore(path, "latents"), png=False, scaling={"shift": 0, "scale": 1})
    assert "holds latents, not images" in refusal(made)
    empty = tmp_path / "empty"
    (empty / "shards").mkdir(parents=True)
    for png_kept in (True, False):
        (empty / "settings.json").write_text(json.dumps(SETTINGS | {"png": png_kept}))
        assert "run the same sample_ddp.py command" in refusal(empty)


def test_a_folder_above_a_set_of_samples_is_refused(tmp_path: Path) -> None:
    made = png_samples(tmp_path)
    assert f"holds a set of sample_ddp.py's samples, {made}: give that folder" in refusal(tmp_path)
    (made / "settings.json").write_text("{")
    assert "settings.json is damaged" in refusal(made)
    (made / "settings.json").write_text('{"theme": "dark"}')  # another program's
    assert len(open_images(made)) == N


# -- Identity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_identity_stays_until_the_images_change(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    path = kind(tmp_path)
    before = open_images(path).identity()
    assert open_images(path).identity() == before
    file = next(file for file in sorted([path, *path.rglob("[0-9]*")]) if file.suffix in (".npz", ".png", ".zip"))
    os.utime(file, ns=(1, 1))
    assert open_images(path).identity() != before


# -- Refused -------------------------------------------------------------------------------------------------------


def test_paths_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    assert "absent does not exist: looked for an .npz" in refusal(tmp_path / "absent")
    assert "holds no pictures" in refusal(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    assert "is no images: looked for" in refusal(tmp_path / "text.txt")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "holds no images" in refusal(tmp_path / "empty.zip")


def test_pickles_are_refused_before_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "stats.pkl").write_bytes(b"")
    assert "executes the code in it: give the images themselves, or an .npz" in refusal(tmp_path / "stats.pkl")
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}, None]))
    assert "objects.npz: arr_0 holds pickled objects" in refusal(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": PIXELS / np.float32(255)}, r"arr_0 is float32, not uint8: save round(127.5 * (x + 1))"),
        ({"arr_0": PIXELS.transpose(0, 3, 1, 2)}, "arr_0 is (11, 3, 5, 6) uint8, not images (N, H, W, 3)"),
        ({"arr_0": PIXELS[0]}, "arr_0 is (5, 6, 3) uint8, not images"),
        ({"arr_0": PIXELS[..., [0, 1, 2, 0]]}, "arr_0 is (11, 5, 6, 4) uint8, not images"),
        ({"arr_0": np.asfortranarray(PIXELS)}, "arr_0 is in Fortran's order"),
        ({"arr_0": PIXELS[:1]}, "holds 1 image: a distribution needs 2 or more"),
        ({"arr_0": PIXELS[:0]}, "holds 0 images: a distribution needs 2 or more"),
        ({"nats": np.zeros(3)}, "holds nats, no images: looked for arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "holds statistics (mu, sigma) alone, no images"),
        ({"arr_0": PIXELS, "arr_1": LABELS[:4]}, "arr_1 is (4,) int64, not a class number for each image (11,)"),
        ({"arr_0": PIXELS, "arr_1": LABELS / 2}, "arr_1 is (11,) float64"),
        ({"arr_0": PIXELS, "arr_1": LABELS - 1}, "arr_1 has labels from -1 to 2: they count from 0"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_refused(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert message in refusal(tmp_path / "wrong.npz")


def test_mixed_sizes_are_refused_with_two_of_them(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "2" / "10.png").write_bytes(png(PIXELS[0, :4]))
    message = refusal(path, range(N))
    assert "00.png is 5x6 and" in message
    assert "10.png 4x6: all images must have one size" in message
    made = shard_samples(tmp_path)
    ShardStore(made).write([8, 9, 10], PIXELS[:3, :4], None)
    assert "4x6: all must have one size" in refusal(made)


def test_one_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png(PIXELS[0]))
    assert "holds 1 image: a distribution needs 2 or more" in refusal(tmp_path)


@pytest.mark.parametrize("kind", [npz, compressed, archive])
def test_truncated_files_are_named_at_once(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    path = kind(tmp_path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert path.name in refusal(path)


def test_pictures_of_floats_are_refused(tmp_path: Path) -> None:
    """Nobody says which of their values is white."""
    for name in "ab":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / f"{name}.tiff")
    assert "a.tiff: in Pillow's mode F it is unknown which value is white" in refusal(tmp_path)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path)
    file = path / "1" / "06.png"
    file.write_bytes(file.read_bytes()[:60])
    assert str(file) in refusal(path, range(N))
    (path / "0" / "00.png").write_bytes(b"")
    assert f"{path}/0/00.png: it is no image" in refusal(path)  # the first, while opening


def test_a_damaged_entry_of_an_archive_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"img00000007.png") + 60] ^= 255
    path.write_bytes(content)
    assert "img00000007.png" in refusal(path, range(N))


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS // 64 * 64])
def test_damage_in_a_compressed_array_is_found(pixels: np.ndarray, tmp_path: Path) -> None:
    """Noise is stored in blocks, where only the CRC at the end tells."""
    np.savez_compressed(tmp_path / "damaged.npz", np.tile(pixels, (100, 1, 1, 1)))
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[len(content) * 3 // 4] ^= 255
    (tmp_path / "damaged.npz").write_bytes(content)
    assert "damaged.npz: arr_0 is damaged" in refusal(tmp_path / "damaged.npz", range(100 * N))


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lies.npz", "w") as file, file.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(1000))
    assert "arr_0 is damaged: it has 1128 bytes, not 12288000000128" in refusal(tmp_path / "lies.npz")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path)
    images = open_images(path)
    np.savez(path, PIXELS[:, :4], LABELS)
    with pytest.raises(OSError, match="has changed since it was opened: start again"):
        images.read([0])


def test_numbers_beyond_the_last_image_are_an_error(tmp_path: Path) -> None:
    for kind in (npz, compressed, folder):
        with pytest.raises(IndexError):
            open_images(kind(tmp_path)).read([N])
