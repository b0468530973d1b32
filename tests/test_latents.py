"""Latent files: reading returns what we or LightningDiT wrote; posteriors; and bad folders."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from small_autoencoders import change_config, open_kl, save_kl
from torch.utils.data import DataLoader

import data.latents as room
from data.autoencoder import LatentSpace, PixelSpace, load_autoencoder
from data.datasets import open_dataset
from data.latent_files import STORAGE, shard_metadata, shard_name, write_shard
from data.latents import STATISTICS, LatentShards
from data.order import StepSampler, TrainingStream, identity_collate, training_loader
from data.sizes import draw_version
from runtime.rng import sample_generators

SHAPE = (4, 3, 5)
SCALE, SHIFT = 0.5, (0.25, -1.0, 0.0, 2.0)
IMAGE_SIZE = 10


def random_tensors(
    rows: int, seed: int, dtype: torch.dtype = torch.float32, std: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors of a latent file; every latent lies near the number of its sample, 10 seed + row."""
    generator = torch.Generator().manual_seed(seed)
    number = 10 * seed + torch.arange(rows).view(-1, 1, 1, 1)
    tensors = {name: torch.rand(rows, *SHAPE, generator=generator) + number for name in ("latents", "latents_flip")}
    if std:
        for name in ("latents_std", "latents_flip_std"):
            tensors[name] = torch.rand(rows, *SHAPE, generator=generator) + 0.1
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors | {"labels": torch.randint(7, (rows,), generator=generator)}


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> LatentSpace:
    """An autoencoder with one scale and a shift for each channel."""
    folder = save_kl(tmp_path_factory.mktemp("kl"), scaling_factor=SCALE)
    change_config(folder, latents_mean=list(SHIFT), latents_std=[1.0] * 4)
    return load_autoencoder(str(folder))


def write_set(
    folder: Path, space: LatentSpace, rows: tuple[int, ...] = (4, 3, 0, 5), dtype: torch.dtype = torch.float32
) -> Path:
    """Latent files of ours with these numbers of rows."""
    metadata = shard_metadata(space, IMAGE_SIZE, 7, len(rows))
    for number, count in enumerate(rows):
        write_shard(folder / shard_name(number), random_tensors(count, number, dtype), {**metadata, "skipped": "[]"})
    return folder


def write_foreign(folder: Path, rows: tuple[int, ...] = (4, 3), dtype: torch.dtype = torch.float32) -> Path:
    """Latent files in the format of LightningDiT's extract_features.py: its names and its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(rows):
        metadata = {"total_size": str(count), "dtype": str(dtype), "device": "cpu"}
        tensors = random_tensors(count, number, dtype, std=False)
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors", metadata=metadata)
    return folder


def write_statistics(folder: Path, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """latents_stats.pt as LightningDiT's dataset writes it."""
    mean, std = torch.randn(1, channels, 1, 1), torch.rand(1, channels, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, folder / STATISTICS)
    return mean[0], std[0]


def scaled(z: torch.Tensor) -> torch.Tensor:
    """The definition, for tensors (..., C, h, w)."""
    return (z.float() - torch.tensor(SHIFT).view(-1, 1, 1)) * SCALE


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all latent files, read by safetensors."""
    shards = [load_file(file) for file in sorted(folder.glob("latents*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


# -- Reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE.values())
def test_samples_are_those_that_safetensors_reads(tmp_path, space, dtype):
    dataset = LatentShards(write_set(tmp_path, space, dtype=dtype))
    stored = whole(tmp_path)
    assert len(dataset) == len(stored["labels"]) == 12
    assert (dataset.image_shape, dataset.num_classes, dataset.image_size) == (SHAPE, 7, IMAGE_SIZE)
    assert (dataset.kind, dataset.value_step, dataset.vae) == ("latents", None, space.name)
    for index in range(12):
        latents, label = dataset.load(index)
        assert latents.dtype == torch.float32
        assert type(label) is int
        torch.testing.assert_close(latents, scaled(stored["latents"][index]))
        assert label == stored["labels"][index]


def test_many_at_once_are_each_as_by_itself(tmp_path, space):
    dataset = LatentShards(write_set(tmp_path, space))
    indices = [11, 0, 4, 4, 6, 3, 7, 11]
    for generators in (None, lambda: sample_generators(0, range(8))):
        latents, labels = dataset.load_many(indices, generators and generators())
        single = [dataset.load(index, generators and generators()[i]) for i, index in enumerate(indices)]
        assert torch.equal(latents, torch.stack([latent for latent, _ in single]))
        assert labels.tolist() == [label for _, label in single]
        assert (latents.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_a_few_open_files_are_enough(tmp_path, space, monkeypatch):
    monkeypatch.setattr(room, "OPEN_FILES", 2)
    dataset = LatentShards(write_set(tmp_path, space, (2, 2, 2, 2, 2)))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    for _ in range(3):
        torch.testing.assert_close(dataset.load_many(order)[0], scaled(whole(tmp_path)["latents"][order]))
        assert len(dataset._files) <= 2


# -- Flips and posteriors ------------------------------------------------------------------------------------------


def test_a_generator_decides_the_flip_then_draws_from_the_posterior(tmp_path, space):
    dataset = LatentShards(write_set(tmp_path, space))
    stored = whole(tmp_path)
    flips = []
    for position in range(300):
        index = position % 12
        (generator,) = sample_generators(0, [position])
        latents, _ = dataset.load(index, generator)
        (generator,) = sample_generators(0, [position])
        flips.append(draw_version(generator)[0])
        name = "latents_flip" if flips[-1] else "latents"
        noise = torch.randn(SHAPE, generator=generator)
        torch.testing.assert_close(latents, scaled(stored[name][index] + stored[f"{name}_std"][index] * noise))
    assert abs(sum(flips) - 150) < 4.5 * 300**0.5 / 2


def test_positions_see_fresh_draws_with_the_stored_moments(tmp_path, space):
    dataset = LatentShards(write_set(tmp_path, space, (1,)))
    stored = {name: tensor[0] for name, tensor in whole(tmp_path).items()}
    stream = TrainingStream(dataset, seed=0)
    latents, _ = stream.__getitems__(range(1200))
    latents = latents / SCALE + torch.tensor(SHIFT).view(-1, 1, 1)
    flips = torch.tensor([draw_version(g)[0] for g in sample_generators(0, range(1200), 2)])
    assert abs(flips.sum() - 600) < 4.5 * 1200**0.5 / 2
    for name, chosen in (("latents", latents[~flips]), ("latents_flip", latents[flips])):
        normal = (chosen - stored[name]) / stored[f"{name}_std"]
        count = len(normal)
        assert normal.mean(0).abs().max() < 4.5 / count**0.5
        assert (normal.std(0) - 1).abs().max() < 4.5 / (2 * count) ** 0.5
        assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
        assert (normal[1:] * normal[:-1]).mean().abs() < 4.5 / normal.numel() ** 0.5


def test_the_stream_does_not_depend_on_batches(tmp_path, space):
    stream = TrainingStream(LatentShards(write_set(tmp_path, space)), seed=3)
    together, labels = stream.__getitems__(range(5, 30))  # over two ends of an epoch
    for i, position in enumerate(range(5, 30)):
        latents, label = stream[position]
        assert torch.equal(latents, together[i])
        assert label == labels[i]


# -- Workers -------------------------------------------------------------------------------------------------------


def test_workers_give_the_same_batches(tmp_path, space):
    dataset = LatentShards(write_set(tmp_path, space))
    dataset.load(0)  # files that are open already do not hurt
    alone, shared = (
        list(training_loader(dataset, 0, StepSampler(2, 9, 4), workers, pin_memory=False)) for workers in (0, 2)
    )
    assert len(alone) == 7
    for (a, x), (b, y) in zip(alone, shared, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


@pytest.mark.slow
def test_spawned_workers_are_sent_no_data(tmp_path, space):
    sizes = {}
    for rows in (1, 200):
        dataset = LatentShards(write_set(tmp_path / str(rows), space, (rows, rows)))
        dataset.load(0)
        sizes[rows] = len(pickle.dumps(dataset))
    assert abs(sizes[200] - sizes[1]) < 50  # a few digits
    assert sizes[200] < 2000 < 200 * 4 * 3 * 5 * 4
    batches = {}
    for method in ("fork", "spawn"):
        loader = DataLoader(
            TrainingStream(dataset, 0),
            batch_sampler=[range(6), range(300, 306)],
            num_workers=1,
            collate_fn=identity_collate,
            multiprocessing_context=method,
        )
        batches[method] = torch.cat([latents for latents, _ in loader])
    assert torch.equal(batches["fork"], batches["spawn"])


def resident_bytes() -> int:
    """Memory of this process, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def growth(folder: Path, batches: int) -> int:
    """Bytes by which this process's memory grows, at its peak, while it opens shards and reads batches of 64."""
    before = peak = resident_bytes()
    stream = TrainingStream(LatentShards(folder), seed=0)
    for first in range(0, 64 * batches, 64):
        stream.__getitems__(range(first, first + 64))
        peak = max(peak, resident_bytes())
    return peak - before


def test_memory_does_not_follow_the_data(tmp_path, space):
    names = ("latents", "latents_flip", "latents_std", "latents_flip_std")
    tensors = {name: torch.rand(1000, 4, 32, 32) for name in names} | {"labels": torch.arange(1000) % 7}
    for number in range(3):
        write_shard(tmp_path / shard_name(number), tensors, shard_metadata(space, 256, 7, 3))
    growth(tmp_path, batches=4)  # torch's own threads and buffers
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 180e6
    assert growth(tmp_path, batches=40) < 20e6  # reads 80 MB


# -- Shards of LightningDiT ----------------------------------------------------------------------------------------


def test_its_statistics_scale_its_latents(tmp_path):
    write_foreign(tmp_path)
    mean, std = write_statistics(tmp_path)
    dataset = open_dataset(str(tmp_path))
    stored = whole(tmp_path)
    for index in range(7):
        torch.testing.assert_close(dataset.load(index)[0], (stored["latents"][index] - mean) / std)
    assert dataset.num_classes == stored["labels"].max() + 1
    assert (dataset.vae, dataset.image_size) == (None, None)
    torch.testing.assert_close(dataset.scaling.invert(dataset.load_many(range(7))[0]), stored["latents"])


@pytest.mark.parametrize("dtype", STORAGE.values())
def test_without_statistics_the_named_autoencoder_scales_them(tmp_path, space, dtype):
    write_foreign(tmp_path, dtype=dtype)
    dataset = open_dataset(str(tmp_path), IMAGE_SIZE, space)
    torch.testing.assert_close(dataset.load_many(range(7))[0], scaled(whole(tmp_path)["latents"]))
    assert dataset.vae == space.name
    assert dataset.image_size == IMAGE_SIZE  # twice the latents' width


@pytest.mark.parametrize("named", [None, PixelSpace()])
def test_without_either_the_way_out_is_named(tmp_path, named):
    write_foreign(tmp_path)
    with pytest.raises(ValueError, match=r"do not say how they are scaled.*latents_stats\.pt.*give --vae"):
        open_dataset(str(tmp_path), None, named)


def test_its_latents_are_draws_already(tmp_path, space):
    dataset = open_dataset(str(write_foreign(tmp_path)), None, space)
    stored = whole(tmp_path)
    latents, _ = dataset.load_many([3] * 50, sample_generators(0, range(50)))
    flips = [draw_version(generator)[0] for generator in sample_generators(0, range(50))]
    assert 10 < sum(flips) < 40
    for latent, flip in zip(latents, flips, strict=True):
        torch.testing.assert_close(latent, scaled(stored["latents_flip" if flip else "latents"][3]))


def test_statistics_beside_our_shards_change_nothing(tmp_path, space):
    """LightningDiT's dataset writes them into any folder that it reads."""
    write_set(tmp_path, space)
    write_statistics(tmp_path)
    torch.testing.assert_close(LatentShards(tmp_path).load(0)[0], scaled(whole(tmp_path)["latents"][0]))


def test_lightningdit_reads_our_shards(tmp_path, space):
    """Read a folder as its dataset does: count labels, then take a slice of one row."""
    write_set(tmp_path, space)
    stored, found = whole(tmp_path), 0
    for file in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as shard:
            (rows,) = shard.get_slice("labels").get_shape()
            for row in range(rows):
                for name in ("latents", "latents_flip"):
                    latents = shard.get_slice(name)[row : row + 1]
                    assert torch.equal(latents.squeeze(0), stored[name][found])
                assert shard.get_slice("labels")[row : row + 1].squeeze(0) == stored["labels"][found]
                found += 1
    assert found == 12


# -- Bad folders ---------------------------------------------------------------------------------------------------


def refusal(folder: Path, *arguments: object) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        open_dataset(str(folder), *arguments)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_another_image_size_is_refused(tmp_path, space):
    write_set(tmp_path, space)
    assert open_dataset(str(tmp_path), IMAGE_SIZE).image_size == IMAGE_SIZE
    assert "leave --image-size 256 out" in refusal(tmp_path, 256)
    foreign = write_foreign(tmp_path / "foreign")
    assert "leave --image-size 256 out" in refusal(foreign, 256, space)


def test_another_autoencoder_is_refused(tmp_path, space):
    write_set(tmp_path / "set", space)
    other = open_kl(tmp_path / "other")
    assert "not of" in refusal(tmp_path / "set", None, other)
    assert "leave --vae out" in refusal(tmp_path / "set", None, PixelSpace())
    wide = open_kl(tmp_path / "wide", channels=8)
    assert "4 channels" in refusal(tmp_path / "set", None, wide)
    assert "8" in refusal(write_foreign(tmp_path / "foreign"), None, wide)
    coarse = open_kl(tmp_path / "coarse", blocks=3).with_scaling(space.scaling)
    assert "leave --vae out" in refusal(tmp_path / "set", None, coarse)


def test_a_moved_autoencoder_is_the_same(tmp_path, space):
    write_set(tmp_path, space)
    moved = LatentSpace("/elsewhere", space.model)
    assert open_dataset(str(tmp_path), None, moved).vae == "/elsewhere"


def test_an_unfinished_set_is_refused(tmp_path, space):
    write_set(tmp_path, space)
    (tmp_path / shard_name(1)).unlink()
    assert "3 of 4 shards: finish extract_latents.py" in refusal(tmp_path)


def test_files_that_are_not_complete_are_not_seen(tmp_path, space):
    write_set(tmp_path, space)
    (tmp_path / ".latents_000001.77.safetensors").write_bytes(b"torn")
    assert len(LatentShards(tmp_path)) == 12


def damaged(file: Path, how: str) -> None:
    data, tensors = file.read_bytes(), load_file(file)
    if how in ("no flip", "no labels", "half a std"):
        del tensors[{"no flip": "latents_flip", "no labels": "labels", "half a std": "latents_flip_std"}[how]]
    elif how == "double":
        tensors["latents"] = tensors["latents"].double()
    elif how == "flat":
        tensors = {name: tensor.flatten(1) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}
    elif how == "short labels":
        tensors["labels"] = tensors["labels"][1:].clone()
    elif how == "wrong labels":
        tensors["labels"] = tensors["labels"].float()
    elif how == "other tensors":
        tensors = {"weight": torch.zeros(3)}
    save_file(tensors, file)
    if how == "truncated":
        file.write_bytes(data[:-1])
    elif how == "header":
        file.write_bytes(data[:8] + b"?" + data[9:])
    elif how == "short":
        file.write_bytes(data[:5])
    elif how == "empty":
        file.write_bytes(b"")


DAMAGES = {
    "no flip": "looked for latents, latents_flip",
    "half a std": "latents_flip_std",
    "no labels": "int64 labels",
    "double": "type fp16, bf16 or fp32; found labels I64",
    "flat": "one shape",
    "short labels": "one for each of the latents",
    "wrong labels": "int64 labels",
    "other tensors": "is no shard of latents.*found weight F32",
    "truncated": "is damaged: it has",
    "header": "is damaged: its header cannot be read",
    "short": "is damaged",
    "empty": "is damaged",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_named(tmp_path, space, how):
    write_set(tmp_path, space)
    damaged(tmp_path / shard_name(1), how)
    with pytest.raises(ValueError, match=f"{shard_name(1)}.*{DAMAGES[how]}") as error:
        LatentShards(tmp_path)
    assert "\n" not in str(error.value)


def test_a_header_that_lies_about_its_length_is_damaged(tmp_path, space):
    write_set(tmp_path, space)
    file = tmp_path / shard_name(1)
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    assert "is damaged" in refusal(tmp_path)


def test_shards_that_do_not_belong_together_are_named(tmp_path, space):
    write_set(tmp_path / "types", space)
    write_shard(tmp_path / "types" / shard_name(1), random_tensors(3, 1, torch.float16), {})
    assert "different kinds" in refusal(tmp_path / "types")
    write_set(tmp_path / "settings", space)
    metadata = shard_metadata(space, 2 * IMAGE_SIZE, 7, 4)
    write_shard(tmp_path / "settings" / shard_name(1), random_tensors(3, 1), metadata)
    message = refusal(tmp_path / "settings")
    assert "different settings" in message
    assert shard_name(1) in message


def test_a_set_without_samples_is_refused(tmp_path, space):
    assert "are empty" in refusal(write_set(tmp_path, space, (0, 0)))


def test_negative_labels_are_refused(tmp_path, space):
    write_foreign(tmp_path)
    file = tmp_path / "latents_rank00_shard001.safetensors"
    tensors = load_file(file)
    tensors["labels"][1] = -3
    save_file(tensors, file)
    assert "has the label -3" in refusal(tmp_path, None, space)


def test_bad_statistics_are_named(tmp_path):
    write_foreign(tmp_path)
    write_statistics(tmp_path, channels=5)
    assert "has 5 channels, the shards have 4" in refusal(tmp_path)
    torch.save([1, 2], tmp_path / STATISTICS)
    assert f"{STATISTICS}: looked for tensors 'mean' and 'std'" in refusal(tmp_path)
    (tmp_path / STATISTICS).write_bytes(b"torn")
    assert "cannot read" in refusal(tmp_path)


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path, space):
    write_set(tmp_path, space)
    dataset = LatentShards(tmp_path)
    file = tmp_path / shard_name(3)
    with open(file, "r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(OSError, match=f"{shard_name(3)} has become shorter"):
        dataset.load_many(range(12), sample_generators(0, range(12)))
