"""Datasets, ADM's crop and the order of training, against definitions written out again."""

import io
import itertools
import json
import math
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data.datasets import Digits, open_dataset
from data.images import ImageFolderDataset, UnreadableImage, center_crop_arr
from data.order import StepSampler, TrainingStream, training_loader


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# -- The centre crop -----------------------------------------------------------------------------------------------


def resize_matrix(old: int, new: int, kernel: np.ufunc, support: float) -> np.ndarray:
    """(new, old) weights of a resize that widens its kernel when it shrinks."""
    scale, stretch = old / new, max(old / new, 1)
    centers = (np.arange(new)[:, None] + 0.5) * scale
    distance = (np.arange(old)[None] + 0.5 - centers) / stretch
    weights = np.where(np.abs(distance) <= support, kernel(distance), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution."""
    x = np.abs(x)
    inner, outer = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def resize(pixels: np.ndarray, height: int, width: int, kernel: np.ufunc, support: float) -> np.ndarray:
    """Columns, then rows, each rounded to bytes."""
    for axis, new in ((1, width), (0, height)):
        matrix = resize_matrix(pixels.shape[axis], new, kernel, support)
        pixels = np.moveaxis(np.tensordot(matrix, pixels, axes=(1, axis)), 0, axis)
        pixels = np.clip(np.floor(pixels + 0.5), 0, 255)
    return pixels


def adm_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The rule in words: halve while twice too large; bicubic until the short side fits; cut the middle out."""
    pixels = pixels.astype(float)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    short = min(pixels.shape[:2])
    pixels = resize(pixels, *(round(side * size / short) for side in pixels.shape[:2]), bicubic, 2)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("width_height", [(100, 70), (70, 100), (333, 150), (64, 64), (20, 33), (17, 16), (129, 257)])
def test_the_crop_follows_adm(width_height):
    image = noise_image(*width_height)
    crop = center_crop_arr(image, 16)
    assert crop.shape == (16, 16, 3)
    assert crop.dtype == np.uint8
    difference = np.abs(crop - adm_crop(np.asarray(image), 16))
    assert difference.max() <= 1  # ties of the rounding
    assert (difference == 0).mean() > 0.99


def test_an_image_of_the_right_size_is_unchanged():
    image = noise_image(16, 16)
    np.testing.assert_array_equal(center_crop_arr(image, 16), np.asarray(image))


def test_an_image_with_the_right_short_side_is_only_cut():
    for width, height in ((16, 27), (27, 16)):
        image = noise_image(width, height)
        rows, columns = ((side - 16) // 2 for side in (height, width))
        expected = np.asarray(image)[rows : rows + 16, columns : columns + 16]
        np.testing.assert_array_equal(center_crop_arr(image, 16), expected)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_powers_of_two_average_boxes(factor):
    rng = np.random.default_rng(1)
    coarse = rng.integers(20, 230, (8, 8, 3))
    # A pattern whose average over every 2x2 square is zero: each halving is exact, and no single pixel is right.
    pattern = 20 * (-1) ** np.add.outer(np.arange(8 * factor), np.arange(8 * factor))
    fine = coarse.repeat(factor, axis=0).repeat(factor, axis=1) + pattern[..., None]
    image = Image.fromarray(fine.astype(np.uint8))
    np.testing.assert_array_equal(center_crop_arr(image, 8), coarse)

    image = noise_image(8 * factor, 8 * factor)
    mean = np.asarray(image).reshape(8, factor, 8, factor, 3).mean(axis=(1, 3))
    assert np.abs(center_crop_arr(image, 8) - mean).max() <= math.log2(factor)  # two roundings a halving


# -- Image folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, 4 + 2 + 1 images in all the modes that occur."""
    for name in ("cat", "ant", "bee"):
        (tmp_path / name).mkdir()
    Image.new("L", (20, 20), 100).save(tmp_path / "ant" / "0_grey.png")
    Image.new("RGBA", (20, 30), (10, 200, 30, 128)).save(tmp_path / "ant" / "1_transparent.png")
    Image.new("CMYK", (30, 20), (255, 0, 0, 0)).save(tmp_path / "ant" / "2_print.JPEG", quality=100)
    Image.new("RGB", (16, 16), (0, 0, 255)).convert("P").save(tmp_path / "ant" / "3_palette.png")
    noise_image(16, 16, 0).save(tmp_path / "bee" / "0.png")
    noise_image(40, 50, 1).save(tmp_path / "bee" / "1.jpg", quality=95)
    noise_image(16, 16, 2).save(tmp_path / "cat" / "0.webp", lossless=True)
    return tmp_path


def test_a_folder_of_class_folders_is_a_dataset(folder):
    dataset = open_dataset(str(folder), 16)
    assert len(dataset) == 7
    assert dataset.num_classes == 3
    assert dataset.image_shape == (3, 16, 16)
    assert [dataset.load(i)[1] for i in range(7)] == [0, 0, 0, 0, 1, 1, 2]  # classes in alphabetical order
    for i in range(7):
        image, _ = dataset.load(i)
        assert (image.shape, image.dtype) == ((3, 16, 16), torch.float32)
        assert image.min() >= -1
        assert image.max() <= 1


COLOURS = [(0, (100, 100, 100)), (1, (10, 200, 30)), (2, (0, 255, 255)), (3, (0, 0, 255))]


@pytest.mark.parametrize(("index", "colour"), COLOURS)
def test_every_mode_becomes_rgb(folder, index, colour):
    image, _ = open_dataset(str(folder), 16).load(index)
    expected = torch.tensor(colour)[:, None, None].expand(3, 16, 16) * (2 / 255) - 1
    torch.testing.assert_close(image, expected, atol=2 / 255 if index == 2 else 1e-6, rtol=0)  # 2 is a JPEG


def test_pixels_keep_their_place_and_value(folder):
    dataset = open_dataset(str(folder), 16)
    for index, seed in ((4, 0), (6, 2)):
        expected = np.asarray(noise_image(16, 16, seed), dtype=np.float64).transpose(2, 0, 1) / 255 * 2 - 1
        np.testing.assert_allclose(dataset.load(index)[0].numpy(), expected, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_reading_images_warns_of_nothing(folder):
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # otherwise torch warns once per process
    try:
        for index in range(7):
            open_dataset(str(folder), 16).load(index)
    finally:
        torch.set_warn_always(before)


def test_neighbouring_pixel_values_are_a_value_step_apart(folder):
    for dataset in (Digits(), open_dataset(str(folder), 16)):
        values = torch.cat([dataset.load(i)[0].flatten() for i in range(len(dataset))]).unique()
        steps = (values - values.min()) / dataset.value_step
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert values.diff().min().item() == pytest.approx(dataset.value_step, rel=1e-3)


def test_images_are_256_pixels_unless_asked_otherwise(folder):
    assert open_dataset(str(folder)).image_shape == (3, 256, 256)
    assert open_dataset(str(folder)).load(0)[0].shape == (3, 256, 256)


# -- Zip archives --------------------------------------------------------------------------------------------------

PICTURES = {  # name -> width, height, format, options that lose nothing (but for the JPEG)
    "00000/img00000001.png": (8, 8, "PNG", {}),
    "00000/img00000000.webp": (8, 8, "WEBP", {"lossless": True}),
    "00001/img00000002.jpg": (30, 20, "JPEG", {"quality": 95}),
    "img00000003.PNG": (16, 9, "PNG", {}),
}


def write_archive(
    path: Path, names: list[str] | None = None, description: object = None, method: int = zipfile.ZIP_STORED
) -> dict[str, bytes]:
    """Noise images under these names, and dataset.json unless it is None; the files as they were put in."""
    files = {}
    with zipfile.ZipFile(path, "w", method) as archive:
        for seed, name in enumerate(PICTURES if names is None else names):
            width, height, kind, options = PICTURES.get(name, (8, 8, "PNG", {}))
            buffer = io.BytesIO()
            noise_image(width, height, seed).save(buffer, kind, **options)
            files[name] = buffer.getvalue()
            archive.writestr(name, files[name])
        archive.writestr("readme.txt", "no image")
        archive.writestr("__MACOSX/00000/._img00000000.png", "no image either")
        if description is not None:
            archive.writestr("dataset.json", description if isinstance(description, str) else json.dumps(description))
    return files


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_holds_what_was_put_in(tmp_path, method):
    path = tmp_path / "pictures.zip"
    labels = {name: number for number, name in zip([7, 2, 0, 2], PICTURES, strict=True)}
    files = write_archive(path, description={"labels": [*labels.items(), ["gone.png", 99]]}, method=method)
    dataset = open_dataset(str(path), 8)
    assert (len(dataset), dataset.num_classes, dataset.image_shape, dataset.kind) == (4, 8, (3, 8, 8), "images")
    for index, name in enumerate(sorted(PICTURES)):
        image, label = dataset.load(index)
        pixels = center_crop_arr(Image.open(io.BytesIO(files[name])).convert("RGB"), 8)
        torch.testing.assert_close(image, torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1)
        assert label == labels[name]


@pytest.mark.parametrize("description", [{"labels": None}, {}])
def test_an_archive_without_labels_has_one_class(tmp_path, description):
    write_archive(tmp_path / "faces.zip", description=description)
    dataset = open_dataset(str(tmp_path / "faces.zip"))
    assert dataset.num_classes == 1
    assert [dataset.load(index)[1] for index in range(4)] == [0, 0, 0, 0]


FOLDERS = [
    (["b/0.png", "a/1.png", "b/deeper/2.png"], [0, 1, 1]),
    (["train/b/0.png", "train/a/1.png", "train/a/2.png"], [0, 0, 1]),
    (["0.png", "1.png"], [0, 0]),
    (["all/in/one/0.png", "all/in/one/1.png"], [0, 0]),
]


@pytest.mark.parametrize(("names", "labels"), FOLDERS)
def test_without_dataset_json_folders_are_classes(tmp_path, names, labels):
    write_archive(tmp_path / "folders.zip", names)
    dataset = open_dataset(str(tmp_path / "folders.zip"))
    assert [dataset.load(index)[1] for index in range(len(names))] == labels  # of the names in order
    assert dataset.num_classes == max(labels) + 1


def test_an_archive_may_have_a_folder_around_everything(tmp_path):
    write_archive(tmp_path / "inner.zip", ["0.png", "1.png"], {"labels": [["0.png", 4], ["1.png", 1]]})
    with zipfile.ZipFile(tmp_path / "inner.zip") as inner, zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        for name in inner.namelist():
            outer.writestr(f"set/{name}", inner.read(name))
    dataset = open_dataset(str(tmp_path / "outer.zip"))
    assert [dataset.load(index)[1] for index in range(2)] == [4, 1]


def test_an_archives_images_have_the_size_of_the_first_unless_asked_otherwise(tmp_path):
    write_archive(tmp_path / "pictures.zip")
    names = ["img00000003.PNG", "z.png"]  # 16x9, then 8x8
    write_archive(tmp_path / "others.zip", names)
    assert open_dataset(str(tmp_path / "others.zip")).image_shape == (3, 9, 9)
    assert open_dataset(str(tmp_path / "others.zip"), 4).image_shape == (3, 4, 4)
    for size in (None, 5):
        dataset = open_dataset(str(tmp_path / "others.zip"), size)
        assert {dataset.load(index)[0].shape for index in range(2)} == {(3, size or 9, size or 9)}


def test_archives_are_mirrored_like_folders(tmp_path):
    names = [f"{number}.png" for number in range(5)]
    write_archive(tmp_path / "flat.zip", names, {"labels": [[name, number] for number, name in enumerate(names)]})
    found = flips(open_dataset(str(tmp_path / "flat.zip")), 3, range(40))
    assert 8 < sum(found) < 32


def test_workers_read_an_archive_that_its_owner_has_open(tmp_path):
    write_archive(tmp_path / "flat.zip", [f"{number}.png" for number in range(6)])
    dataset = open_dataset(str(tmp_path / "flat.zip"))
    alone, shared = (
        [images for images, _ in training_loader(dataset, 0, StepSampler(0, 9, 4), workers, pin_memory=False)]
        for workers in (0, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    again = pickle.loads(pickle.dumps(dataset))  # what a spawned worker gets
    assert torch.equal(again.load(3)[0], dataset.load(3)[0])


def test_a_damaged_file_in_an_archive_is_named(tmp_path):
    path = tmp_path / "flat.zip"
    files = write_archive(path, ["0.png", "1.png"])
    whole = path.read_bytes()
    position = whole.index(files["1.png"]) + len(files["1.png"]) - 3
    path.write_bytes(whole[:position] + b"!!" + whole[position + 2 :])
    dataset = open_dataset(str(path))
    dataset.load(0)
    with pytest.raises(UnreadableImage, match=rf"cannot read the image {path}/1\.png"):
        dataset.load(1)


BAD_ARCHIVES = {
    "no images": ([], None, "holds no images"),
    "no label": (["0.png", "1.png"], {"labels": [["0.png", 0]]}, r"dataset\.json has no class number for 1\.png"),
    "vectors": (["0.png"], {"labels": [["0.png", [0.0, 1.0]]]}, r"no class number for 0\.png, but \[0\.0, 1\.0\]"),
    "negative": (["0.png"], {"labels": [["0.png", -1]]}, r"no class number for 0\.png, but -1"),
    "no pairs": (["0.png"], {"labels": [1, 2]}, "class number"),
    "no json": (["0.png"], "{", "class number"),
    "a stray image": (["a/0.png", "b/1.png", "2.png"], None, r"neither dataset\.json nor a class folder for 2\.png"),
}


@pytest.mark.parametrize("which", BAD_ARCHIVES)
def test_bad_archives_are_one_line(tmp_path, which):
    names, description, message = BAD_ARCHIVES[which]
    write_archive(tmp_path / "bad.zip", names, description)
    with pytest.raises(ValueError, match=message) as error:
        open_dataset(str(tmp_path / "bad.zip"))
    assert "\n" not in str(error.value)
    assert "bad.zip" in str(error.value)


def test_other_compressions_are_refused(tmp_path):
    write_archive(tmp_path / "bad.zip", ["0.png"], method=zipfile.ZIP_BZIP2)
    assert "pack the archive anew" in message_of(ValueError, tmp_path / "bad.zip")


def test_an_archive_whose_first_image_is_damaged_names_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("0.png", b"no image")
    message = message_of(UnreadableImage, tmp_path / "bad.zip")
    assert message == f"cannot read the image {tmp_path / 'bad.zip'}/0.png: it is no image"


# -- Flips ---------------------------------------------------------------------------------------------------------


def flips(dataset: ImageFolderDataset, seed: int, positions: range) -> list[bool]:
    """True for each mirrored position of the stream; checks that the others are the image itself."""
    upright = {label: dataset.load(label)[0] for label in range(len(dataset))}
    stream, found = TrainingStream(dataset, seed), []
    for position in positions:
        image, label = stream[position]
        mirrored = torch.equal(image, upright[label].flip(-1))
        assert mirrored != torch.equal(image, upright[label])
        found.append(mirrored)
    return found


@pytest.fixture
def small_folder(tmp_path: Path) -> ImageFolderDataset:
    """Five small images, each a class of its own."""
    for i in range(5):
        (tmp_path / str(i)).mkdir()
        noise_image(8, 8, i).save(tmp_path / str(i) / "image.png")
    return ImageFolderDataset(tmp_path, 8)


def test_half_of_the_images_are_mirrored_independently(small_folder):
    number = 1000
    found = np.array(flips(small_folder, 0, range(number)))
    bound = 4.5 * math.sqrt(number) / 2  # standard deviations of a fair coin
    assert abs(found.sum() - number / 2) < bound
    for lag in (1, 2, 5, 7):  # 5: the same position of the next epoch
        assert abs((found[lag:] == found[:-lag]).sum() - number / 2) < bound


def test_flips_are_a_function_of_seed_and_position(small_folder):
    first = flips(small_folder, 3, range(40))
    assert flips(small_folder, 3, range(17, 40)) == first[17:]
    assert flips(small_folder, 3, range(39, -1, -1)) == first[::-1]
    assert flips(small_folder, 4, range(40)) != first


def test_without_a_generator_nothing_is_mirrored(small_folder):
    for i in range(5):
        expected = torch.from_numpy(np.array(noise_image(8, 8, i))).permute(2, 0, 1) / 127.5 - 1
        for _ in range(8):
            torch.testing.assert_close(small_folder.load(i)[0], expected)


# -- Digits --------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_and_never_mirrored():
    dataset, bunch = open_dataset("digits"), load_digits()
    assert (len(dataset), dataset.num_classes, dataset.image_shape) == (1797, 10, (1, 8, 8))
    pictures = (bunch.images / 8 - 1).astype(np.float32)
    labels = {picture.tobytes(): label for picture, label in zip(pictures, bunch.target, strict=True)}
    stream = TrainingStream(dataset, seed=0)
    seen = [stream[position] for position in range(2 * 1797)]
    assert all(labels[image.numpy().tobytes()] == label for image, label in seen)
    assert {image.numpy().tobytes() for image, _ in seen[:1797]} == set(labels)


def test_digits_can_be_given_their_own_size():
    assert open_dataset("digits", 8).image_shape == (1, 8, 8)


# -- Identity ------------------------------------------------------------------------------------------------------


def identity(path: Path | str, image_size: int | None = 8) -> dict[str, object]:
    """A path's identity, which JSON can hold."""
    found = open_dataset(str(path), image_size).identity()
    assert json.loads(json.dumps(found)) == found
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_the_digits_are_always_the_same():
    found = identity("digits")
    assert found == identity("digits", None)
    assert (found["kind"], found["images"], found["num_classes"]) == ("digits", 1797, 10)


def test_a_folder_is_the_same_wherever_it_lies(folder, tmp_path_factory, monkeypatch):
    before = identity(folder)
    assert (before["kind"], before["images"], before["num_classes"]) == ("images", 7, 3)
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "elsewhere")
    monkeypatch.chdir(moved.parent)
    (moved.parent / "link").symlink_to("elsewhere")
    spellings = [moved, "elsewhere", "elsewhere/", "./elsewhere", "link", f"{moved}/../elsewhere//"]
    assert all(identity(spelling) == before for spelling in spellings)
    monkeypatch.setenv("HOME", str(moved.parent))
    assert ImageFolderDataset("~/elsewhere", 8).identity() == before
    assert identity(folder, 32) == before
    read = open_dataset("elsewhere/", 8)
    assert torch.equal(read.load(4)[0], open_dataset(str(folder), 8).load(4)[0])


def test_what_changes_in_a_folder_is_seen(folder):
    before = identity(folder)
    (folder / "bee").rename(folder / "0_new")  # its images are those of class 0 now
    assert changed(before, identity(folder)) == {"names", "labels"}
    (folder / "0_new").rename(folder / "bees")  # the same numbers
    assert changed(before, identity(folder)) == {"names"}
    (folder / "bees").rename(folder / "bee")
    assert identity(folder) == before
    (folder / "bee" / "1.jpg").rename(folder / "cat" / "1.jpg")
    assert changed(before, identity(folder)) == {"names", "labels"}
    (folder / "cat" / "1.jpg").rename(folder / "bee" / "1.jpg")
    noise_image(8, 8).save(folder / "cat" / "9.png")
    assert changed(before, identity(folder)) == {"images", "names", "labels"}
    (folder / "cat" / "9.png").unlink()
    (folder / "dog").mkdir()
    (folder / "cat" / "0.webp").rename(folder / "dog" / "0.webp")
    shutil.rmtree(folder / "cat")
    assert changed(before, identity(folder)) == {"names"}
    shutil.rmtree(folder / "dog")
    assert changed(before, identity(folder)) == {"images", "num_classes", "names", "labels"}


def test_names_that_join_to_the_same_text_differ(tmp_path):
    for root, names in (("x", ["a/bc.png", "a/d.png"]), ("y", ["a/b.png", "a/cd.png"])):
        for name in names:
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            noise_image(8, 8).save(tmp_path / root / name)
    assert changed(identity(tmp_path / "x"), identity(tmp_path / "y")) == {"names"}


def test_what_changes_in_an_archive_is_seen(tmp_path):
    names = ["a/0.png", "b/1.png"]
    labels = [[name, number] for number, name in enumerate(names)]
    path = tmp_path / "a.zip"
    write_archive(path, names, {"labels": labels})
    before = identity(path)
    (tmp_path / "moved").mkdir()
    shutil.copy(path, tmp_path / "moved" / "b.zip")
    assert identity(tmp_path / "moved" / "b.zip") == identity(os.path.relpath(path)) == before
    write_archive(path, names, {"labels": labels}, zipfile.ZIP_DEFLATED)  # packed otherwise
    assert identity(path) == before
    write_archive(path, names, {"labels": [[name, 1 - number] for name, number in labels]})
    assert changed(before, identity(path)) == {"labels"}
    write_archive(path, ["a/0.png", "c/1.png"], {"labels": [["a/0.png", 0], ["c/1.png", 1]]})
    assert changed(before, identity(path)) == {"names"}
    with zipfile.ZipFile(path, "w") as archive:  # another picture under the same name
        for seed, name in enumerate(names):
            buffer = io.BytesIO()
            noise_image(8, 8, 2 * seed).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
    assert changed(before, identity(path)) == {"names"}


# -- Order ---------------------------------------------------------------------------------------------------------


class Numbers:
    """A dataset of the numbers 0 ... n - 1, each with a random number from the augmentation's generator."""

    sizes = None

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def load(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        return torch.rand((), generator=generator, dtype=torch.float64), index


def order(n: int, seed: int, epoch: int) -> list[int]:
    stream = TrainingStream(Numbers(n), seed)
    return [stream[position][1] for position in range(epoch * n, (epoch + 1) * n)]


def test_each_image_comes_once_per_epoch_and_epochs_differ():
    orders = [order(23, 0, epoch) for epoch in range(5)] + [order(23, 1, epoch) for epoch in range(5)]
    assert all(sorted(one) == list(range(23)) for one in orders)
    assert len(set(map(tuple, orders))) == len(orders)


def test_orders_are_uniformly_random():
    """Every image is first, and follows image 0, about equally often."""
    epochs, n = 2000, 4
    stream = TrainingStream(Numbers(n), seed=0)
    orders = [[stream[epoch * n + i][1] for i in range(n)] for epoch in range(epochs)]
    permutations = [orders.count(list(one)) for one in itertools.permutations(range(n))]
    expected = epochs / len(permutations)
    assert sum((count - expected) ** 2 / expected for count in permutations) < 55  # chi2 of 23 degrees, p = 2e-4


def test_an_item_is_a_function_of_seed_and_position():
    forward = TrainingStream(Numbers(7), seed=5)
    items = [forward[position] for position in range(30)]
    for position in (29, 0, 13, 14, 6, 7, 28):
        assert TrainingStream(Numbers(7), seed=5)[position] == items[position]
        assert forward[position] == items[position]
    assert len({value.item() for value, _ in items}) == 30  # every position has its own random numbers
    assert TrainingStream(Numbers(7), seed=6)[0][0] != items[0][0]


def batches(sampler: StepSampler, num_workers: int = 0) -> list[tuple[list[float], list[int]]]:
    loader = training_loader(Numbers(10), 0, sampler, num_workers, pin_memory=False)
    return [(values.tolist(), indices.tolist()) for values, indices in loader]


def test_any_number_of_workers_gives_the_same_batches():
    alone = batches(StepSampler(0, 9, 4))
    assert len(alone) == 9
    assert batches(StepSampler(0, 9, 4), num_workers=2) == alone


def test_a_later_start_gives_the_rest_of_the_same_batches():
    everything = batches(StepSampler(0, 9, 4))
    assert batches(StepSampler(4, 9, 4)) == everything[4:]
    assert batches(StepSampler(9, 9, 4)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_partition_each_global_batch(world_size):
    samplers = [StepSampler(2, 7, 12, rank, world_size) for rank in range(world_size)]
    assert [len(sampler) for sampler in samplers] == [5] * world_size
    for step, parts in enumerate(zip(*samplers, strict=True), start=2):
        assert all(len(part) == 12 // world_size for part in parts)
        assert list(itertools.chain(*parts)) == list(range(12 * step, 12 * (step + 1)))


# -- Errors --------------------------------------------------------------------------------------------------------


def message_of(kind: type[Exception], path: Path | str, image_size: int | None = None) -> str:
    with pytest.raises(kind) as error:
        open_dataset(str(path), image_size)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_path_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "imagenet"
    assert f"{path} does not exist" in message_of(FileNotFoundError, path)


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "train.tar"
    path.touch()
    assert f"{path} is a file" in message_of(ValueError, path)


def test_an_empty_folder_holds_no_classes(tmp_path):
    message = message_of(FileNotFoundError, tmp_path)
    assert str(tmp_path) in message
    for looked_for in ("'digits'", "*.safetensors latent files", "zip archive", "one sub-folder per class"):
        assert looked_for in message


def test_images_without_class_folders_are_an_error(tmp_path):
    noise_image(8, 8).save(tmp_path / "0.png")
    assert "one sub-folder per class" in message_of(FileNotFoundError, tmp_path)


def test_a_class_folder_without_images_is_named(folder):
    (folder / "dodo").mkdir()
    (folder / "dodo" / "readme.txt").touch()
    message = message_of(FileNotFoundError, folder)
    assert "dodo" in message
    assert "ant" not in message.replace(str(folder), "")


def test_digits_have_one_size():
    assert "digits are 8x8" in message_of(ValueError, "digits", 32)


def damaged(path: Path, kind: str) -> None:
    if kind == "no image":
        path.with_suffix(".png").write_text("<html>404</html>")
    elif kind == "empty":
        path.with_suffix(".png").touch()
    elif kind == "truncated":
        noise_image(64, 64).save(path.with_suffix(".jpg"))
        whole = path.with_suffix(".jpg").read_bytes()
        path.with_suffix(".jpg").write_bytes(whole[: len(whole) // 2])
    elif kind == "bad header":  # Pillow answers this one with a ValueError
        path.with_suffix(".ppm").write_bytes(b"P6 4x 4 255\n" + bytes(48))
    elif kind == "huge":  # and this one with an error of its own
        Image.new("1", (20_000, 20_000)).save(path.with_suffix(".png"))


@pytest.mark.parametrize("kind", ["no image", "empty", "truncated", "bad header", "huge"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, kind):
    (tmp_path / "class").mkdir()
    damaged(tmp_path / "class" / "damaged", kind)
    dataset = open_dataset(str(tmp_path), 16)
    with pytest.raises(OSError, match="cannot read the image") as error:
        dataset.load(0)
    assert str(tmp_path / "class" / "damaged") in str(error.value)


def test_a_worker_process_names_the_image_too(tmp_path):
    (tmp_path / "class").mkdir()
    damaged(tmp_path / "class" / "damaged", "truncated")
    loader = training_loader(open_dataset(str(tmp_path), 16), 0, StepSampler(0, 1, 1), num_workers=1, pin_memory=False)
    with pytest.raises(OSError, match=r"(?s)worker process 0.*cannot read the image .*damaged\.jpg"):
        list(loader)
