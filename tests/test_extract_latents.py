"""extract_latents.py: latent files hold the autoencoder's output for the images, however the run went."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, start_script
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_autoencoders import save_kl, save_tiny
from test_images import wrong_chunk_length

import extract_latents as room
from data.autoencoder import load_autoencoder
from data.datasets import open_dataset
from data.images import ImageFolderDataset, center_crop_arr
from data.latent_files import STORAGE, shard_files, shard_name
from data.order import StepSampler, posterior_generators, training_loader
from extract_latents import extract

SIZE = 16
CLASSES = {"ant": 5, "bee": 1, "cat": 7}
LABELS = [0] * 5 + [1] + [2] * 7


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three classes, 13 pictures of many sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in CLASSES.items():
        (folder / name).mkdir()
        for number in range(count):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            size = tuple(rng.integers(SIZE, 3 * SIZE, 2).tolist())
            Image.fromarray(coarse).resize(size).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_kl(tmp_path_factory.mktemp("vae"))


def flags(pictures: Path, vae: Path, out: Path, *more: object) -> list[str]:
    common = ["--data-path", pictures, "--out", out, "--vae", vae, "--image-size", SIZE, "--num-workers", 0]
    return [str(flag) for flag in (*common, "--batch-size", 3, "--shard-size", 4, "--dtype", "fp32", *more)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, pictures, vae) -> Path:
    """The latent files of one uninterrupted process."""
    out = tmp_path_factory.mktemp("reference")
    extract(flags(pictures, vae, out))
    return out


def contents(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in shard_files(out)}


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as shard:
        return shard.metadata()


def assert_same_shards(a: Path, b: Path) -> None:
    left, right = contents(a), contents(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys()
        for key, tensor in left[name].items():  # one thread or two round differently
            torch.testing.assert_close(tensor, right[name][key], atol=1e-5, rtol=1e-5)
        assert metadata(a / name) == metadata(b / name)


def crops(pictures: Path) -> torch.Tensor:
    """(13, 3, S, S) in [-1, 1]."""
    files = sorted(pictures.glob("*/*.png"))
    pixels = np.stack([center_crop_arr(Image.open(file).convert("RGB"), SIZE) for file in files])
    return torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1


# -- Content of the latent files-----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "precision"), [("fp32", 1e-5), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_shards_hold_the_moments_of_images_and_mirror_images(tmp_path, pictures, vae, dtype, precision):
    extract(flags(pictures, vae, tmp_path, "--dtype", dtype))
    shards = contents(tmp_path)
    assert list(shards) == [shard_name(number) for number in range(4)]
    assert [len(shard["labels"]) for shard in shards.values()] == [4, 4, 4, 1]
    stored = {name: torch.cat([shard[name] for shard in shards.values()]) for name in shards[shard_name(0)]}
    assert stored.keys() == {"latents", "latents_flip", "latents_std", "latents_flip_std", "labels"}
    assert stored["labels"].tolist() == LABELS
    space, images = load_autoencoder(str(vae)), crops(pictures)
    for name, pixels in (("latents", images), ("latents_flip", images.flip(-1))):
        with torch.no_grad():
            posterior = space.model.encode(pixels).latent_dist
        for key, exact in ((name, posterior.mean), (f"{name}_std", posterior.std)):
            assert stored[key].dtype == STORAGE[dtype]
            torch.testing.assert_close(stored[key].float(), exact, atol=1e-5, rtol=precision)
    assert (stored["latents"] - stored["latents_flip"]).abs().max() > 0.1


def test_shards_say_where_they_come_from(reference, vae):
    said = metadata(reference / shard_name(2))
    assert said["autoencoder"] == str(vae)
    assert (said["image_size"], said["num_classes"], said["shards"]) == (str(SIZE), "3", "4")
    assert (json.loads(said["scale"]), json.loads(said["shift"]), said["skipped"]) == (0.18215, 0.0, "[]")
    mask = os.umask(0)
    os.umask(mask)
    assert (reference / shard_name(2)).stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_archive_gives_the_same_shards(tmp_path, pictures, vae, reference):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in pictures.glob("*/*.png"):
            archive.write(file, file.relative_to(pictures))
    extract(flags(tmp_path / "pictures.zip", vae, tmp_path / "out"))
    assert_same_shards(tmp_path / "out", reference)


def test_a_deterministic_autoencoder_has_no_deviation(tmp_path, pictures):
    tiny = save_tiny(tmp_path / "tiny")
    extract(flags(pictures, tiny, tmp_path / "out"))
    stored = contents(tmp_path / "out")[shard_name(1)]
    assert stored.keys() == {"latents", "latents_flip", "labels"}
    with torch.no_grad():
        exact = load_autoencoder(str(tiny)).model.encode(crops(pictures)[4:8]).latents
    torch.testing.assert_close(stored["latents"], exact)
    dataset = open_dataset(str(tmp_path / "out"))
    (generator,) = posterior_generators(0, [0])
    assert dataset.load(4, generator)[0].shape == dataset.image_shape
    torch.testing.assert_close(dataset.load(4)[0], exact[0])


def test_training_sees_the_same_from_shards_as_from_images(pictures, vae, reference):
    space = load_autoencoder(str(vae))
    images, shards = open_dataset(str(pictures), SIZE), open_dataset(str(reference), SIZE)
    assert shards.image_shape == space.latent_shape(images.image_shape)
    assert (shards.num_classes, shards.vae, shards.scaling) == (images.num_classes, space.name, space.scaling)
    batches = [training_loader(dataset, 5, StepSampler(0, 6, 8), 0, pin_memory=False) for dataset in (images, shards)]
    for step, ((pixels, labels), (latents, same_labels)) in enumerate(zip(*batches, strict=True)):
        generators = posterior_generators(5, range(8 * step, 8 * step + 8))
        torch.testing.assert_close(space.encode(pixels, generators), latents, atol=1e-5, rtol=1e-4)
        assert torch.equal(labels, same_labels)


# -- Stopping and continuing ---------------------------------------------------------------------------------------


def test_a_second_run_makes_only_what_is_missing(tmp_path, pictures, vae, reference, capsys):
    extract(flags(pictures, vae, tmp_path))
    printed = capsys.readouterr()
    assert "13 images in 4 shards, latents 4x8x8" in printed.out
    assert "13/13" in printed.err  # the progress bar
    assert "image/s" in printed.err
    kept = {file: file.stat().st_mtime_ns for file in shard_files(tmp_path)}
    missing, damaged = tmp_path / shard_name(1), tmp_path / shard_name(3)
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-4])
    torn = [tmp_path / f".latents_000001.{number}.safetensors" for number in (1, 22)] + [tmp_path / ".tmpAbCdEf"]
    for file in torn:
        file.write_bytes(b"torn")
    extract(flags(pictures, vae, tmp_path, "--batch-size", 2))
    assert "2 of 4 shards are there already" in capsys.readouterr().out
    assert_same_shards(tmp_path, reference)
    changed = {file for file in shard_files(tmp_path) if file.stat().st_mtime_ns != kept[file]}
    assert changed == {missing, damaged}
    assert not any(file.exists() for file in torn)
    extract(flags(pictures, vae, tmp_path))
    assert "4 of 4 shards are there already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_leaves_only_complete_shards(tmp_path, pictures, vae, reference):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "extract_latents.py"), *flags(pictures, vae, out, "--batch-size", 1)]
    process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not shard_files(out):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    expected = contents(reference)
    for name, shard in contents(out).items():
        torch.testing.assert_close(shard["latents"], expected[name]["latents"], atol=1e-5, rtol=1e-5)
    extract(flags(pictures, vae, out))
    assert_same_shards(out, reference)
    assert {file.name for file in out.iterdir()} == {*expected, "settings.json"}


SETTINGS = [("--dtype", "bf16"), ("--shard-size", "5"), ("--image-size", "8"), ("--precision", "tf32")]


@pytest.mark.parametrize(("flag", "value"), SETTINGS)
def test_other_settings_do_not_continue_a_run(refuses, pictures, vae, reference, flag, value):
    before = contents(reference).keys()
    line = refuses(extract, *flags(pictures, vae, reference, flag, value))
    assert f"{flag} was" in line
    assert f"is {value} now" in line
    assert contents(reference).keys() == before


def test_the_encoder_runs_as_in_training(refuses, pictures, vae, tmp_path, capsys):
    line = refuses(extract, *flags(pictures, vae, tmp_path / "out", "--precision", "bf16"))
    assert "--precision: the encoder runs in fp32 or tf32, as it does in training, not in bf16" in line
    assert not (tmp_path / "out").exists()


def test_data_may_move_between_the_parts_of_a_run_but_not_change(refuses, pictures, vae, tmp_path, reference):
    source, out = shutil.copytree(pictures, tmp_path / "source"), tmp_path / "out"
    extract(flags(source, vae, out))
    (out / shard_name(2)).unlink()
    moved = source.rename(tmp_path / "moved")
    extract(flags(f"{moved}/", vae, out))
    assert_same_shards(out, reference)
    (moved / "ant").rename(moved / "zebra")
    line = refuses(extract, *flags(moved, vae, out))
    assert "the files or labels in" in line
    assert "give another --out" in line


def test_a_run_begun_before_data_were_compared_goes_on(refuses, pictures, vae, tmp_path, reference):
    shutil.copytree(reference, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    del settings["data"]
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    elsewhere = shutil.copytree(pictures, tmp_path / "elsewhere")
    assert "--data-path was" in refuses(extract, *flags(elsewhere, vae, tmp_path / "out"))
    extract(flags(pictures, vae, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["data"]


def test_other_data_or_autoencoders_do_not_continue_a_run(refuses, tmp_path, pictures, vae, reference):
    other = save_kl(tmp_path / "other")
    assert "--vae was" in refuses(extract, *flags(pictures, other, reference))
    for name in ("a", "b"):
        (tmp_path / "fewer" / name).mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "fewer" / name / "0.png")
    out = tmp_path / "out"
    extract(flags(tmp_path / "fewer", vae, out))
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "fewer" / "a" / "1.png")
    assert "the number of images was 2" in refuses(extract, *flags(tmp_path / "fewer", vae, out))


def test_shards_of_unknown_settings_are_left_alone(refuses, tmp_path, pictures, vae):
    extract(flags(pictures, vae, tmp_path))
    (tmp_path / "settings.json").unlink()
    assert "shards but no settings.json" in refuses(extract, *flags(pictures, vae, tmp_path))
    (tmp_path / "settings.json").write_text("{")
    assert "cannot read" in refuses(extract, *flags(pictures, vae, tmp_path))


# -- Images that cannot be read, several processes -----------------------------------------------------------------


@pytest.fixture
def with_damage(tmp_path, pictures) -> tuple[Path, Path]:
    """The pictures with one more class, whose files are no images and fill a latent file."""
    folder = tmp_path / "damaged"
    for file in pictures.glob("*/*.png"):
        copy = folder / file.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for number in range(4):
        (folder / "bee" / f"x{number}.png").write_text("no image")  # numbers 6 to 9: in shards 1 and 2
    return folder, folder / "bee" / "x0.png"


def test_an_unreadable_image_stops_the_run_and_is_named(refuses, with_damage, tmp_path, vae):
    folder, first = with_damage
    line = refuses(extract, *flags(folder, vae, tmp_path / "out"))
    assert f"cannot read the image {first}" in line
    assert "--skip-unreadable" in line
    assert [file.name for file in shard_files(tmp_path / "out")] == [shard_name(0)]


def test_unreadable_images_are_skipped_counted_and_listed(with_damage, tmp_path, vae, reference, capsys):
    folder, first = with_damage
    out = tmp_path / "out"
    extract(flags(folder, vae, out, "--skip-unreadable", "--shard-size", 2, "--num-workers", 1))
    printed = capsys.readouterr().out
    assert "13 images in 9 shards" in printed
    assert "skipped 4 that cannot be read:" in printed
    assert f"cannot read the image {first}" in printed
    assert [len(shard["labels"]) for shard in contents(out).values()] == [2, 2, 2, 0, 0, 2, 2, 2, 1]
    dataset = open_dataset(str(out))
    clean = open_dataset(str(reference))
    torch.testing.assert_close(dataset.load_many(range(13)), clean.load_many(range(13)), atol=1e-5, rtol=1e-5)
    extract(flags(folder, vae, out, "--shard-size", 2))  # nothing to do, and what was left out is not forgotten
    assert "skipped 4 that cannot be read:" in capsys.readouterr().out


def test_an_image_at_which_pillow_raises_an_odd_error_is_skipped_too(refuses, pictures, vae, tmp_path, capsys):
    folder = shutil.copytree(pictures, tmp_path / "damaged")
    (folder / "bee" / "1.png").write_bytes(wrong_chunk_length())
    line = refuses(extract, *flags(folder, vae, tmp_path / "out"))
    assert f"cannot read the image {folder}/bee/1.png: " in line
    for workers in (0, 1):
        out = tmp_path / f"out{workers}"
        extract(flags(folder, vae, out, "--skip-unreadable", "--num-workers", workers))
        assert f"skipped 1 that cannot be read:\n  cannot read the image {folder}/bee/1.png" in capsys.readouterr().out
        assert len(open_dataset(str(out))) == 13


def test_a_disk_or_archive_that_cannot_be_read_is_not_skipped(refuses, pictures, vae, tmp_path, monkeypatch):
    """Otherwise a drive that is unmounted for a minute would leave out all images of that minute."""
    read = ImageFolderDataset.open_image

    def stale(self: ImageFolderDataset, index: int) -> object:
        if index == 6:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, index)

    monkeypatch.setattr(ImageFolderDataset, "open_image", stale)
    line = refuses(extract, *flags(pictures, vae, tmp_path / "out", "--skip-unreadable"))
    assert f"cannot read the image {pictures}/cat/0.png: Stale file handle; the same command continues" in line
    monkeypatch.undo()
    extract(flags(pictures, vae, tmp_path / "out"))  # which is so
    assert len(open_dataset(str(tmp_path / "out"))) == 13

    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in pictures.glob("*/*.png"):
            archive.write(file, file.relative_to(pictures))
    prepare = room.prepare

    def lose_it(*arguments: object) -> object:
        prepared = prepare(*arguments)
        (tmp_path / "pictures.zip").unlink()
        return prepared

    monkeypatch.setattr(room, "prepare", lose_it)
    line = refuses(extract, *flags(tmp_path / "pictures.zip", vae, tmp_path / "zip", "--skip-unreadable"))
    assert "pictures.zip/ant/0.png: No such file or directory" in line


def test_names_that_no_encoding_has_are_skipped_and_listed(pictures, vae, tmp_path, capsys):
    folder = shutil.copytree(pictures, tmp_path / "odd")
    for name in (b"a\nb.png", b"\xff.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), b"ant", name))).write_bytes(b"no image")
    extract(flags(folder, vae, tmp_path / "out", "--skip-unreadable"))
    printed = capsys.readouterr().out
    assert [line.rsplit("/", 1)[1] for line in printed.splitlines()[-2:]] == [
        "a\\nb.png: it is no image",
        "\\udcff.png: it is no image",
    ]


@pytest.mark.slow
def test_two_processes_make_the_same_shards_and_either_can_stop_the_run(with_damage, tmp_path, vae):
    """The second process fails at the damaged files; then the run continues without them."""
    folder, first = with_damage
    command = flags(folder, vae, tmp_path / "two", "--num-workers", 1)
    stopped = start_script("extract_latents.py", *command, processes=2)
    assert stopped.returncode != 0
    assert f"extract_latents.py: error: rank 1: cannot read the image {first}" in stopped.stderr
    done = start_script("extract_latents.py", *command, "--skip-unreadable", processes=2)
    assert done.returncode == 0, done.stderr
    assert "13 images in 5 shards" in done.stdout
    assert "skipped 4 that cannot be read:" in done.stdout
    assert "process 1 of 2" in done.stderr
    extract([*flags(folder, vae, tmp_path / "one"), "--skip-unreadable"])
    assert_same_shards(tmp_path / "two", tmp_path / "one")


# -- Bad input -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_encoded_is_refused(refuses, tmp_path, pictures, vae, reference):
    out = tmp_path / "out"
    assert "holds digits" in refuses(extract, "--data-path", "digits", "--out", out, "--vae", vae)
    assert "holds latents" in refuses(extract, "--data-path", reference, "--out", out, "--vae", vae)
    assert "does not exist" in refuses(extract, *flags(tmp_path / "nowhere", vae, out))
    assert "does not divide 15x15" in refuses(extract, *flags(pictures, vae, out, "--image-size", 15))
    assert "--vae none" in refuses(extract, *flags(pictures, Path("none"), out))
    assert "--dtype" in refuses(extract, *flags(pictures, vae, out, "--dtype", "fp64"))
    assert not out.exists()


def test_latents_too_large_for_the_type_are_refused(refuses, tmp_path, pictures):
    vae = save_kl(tmp_path / "vae", offset=1e5)
    line = refuses(extract, *flags(pictures, vae, tmp_path / "out", "--dtype", "fp16"))
    assert "not finite in fp16: give --dtype fp32" in line
    assert shard_files(tmp_path / "out") == []


def test_a_place_that_cannot_be_written_is_one_line(refuses, tmp_path, pictures, vae):
    (tmp_path / "file").touch()
    assert "file" in refuses(extract, *flags(pictures, vae, tmp_path / "file" / "out"))
    assert "file" in refuses(extract, *flags(pictures, vae, tmp_path / "file"))


def test_small_sets_have_work_for_many_processes(tmp_path, pictures, vae):
    extract([*flags(pictures, vae, tmp_path)[:-6], "--dtype", "fp16"])
    assert len(shard_files(tmp_path)) == 13
    assert len(open_dataset(str(tmp_path))) == 13


def test_shards_are_not_written_among_the_images(pictures, vae, tmp_path, refuses) -> None:
    for out in (pictures, pictures / "latents"):
        assert "is in --data-path" in refuses(extract, *flags(pictures, vae, out))
    assert sorted(path.name for path in pictures.iterdir()) == sorted(CLASSES)
