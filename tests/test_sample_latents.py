"""sample_ddp.py --latents: what an autoencoder decodes to the images, whether or not it is here."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import start_script
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from small_autoencoders import change_config, save_kl, save_tiny

import sample
import train
from runtime.rng import label_of, sample_generators
from runtime.sample_store import ShardStore
from sample_ddp import main
from transport import ClassifierFreeGuidance, Sampler, create_transport
from weights.pretrained import convert, load_pretrained

MEAN, DEVIATION = 3.0, 5.0
WIDE = 32  # channels, as VA-VAE's
SHORT = ["--max-steps", "2", "--global-batch-size", "4", "--num-workers", "0"]


def flags_of(ckpt: Path, folder: Path, *more: object, samples: int = 5) -> list[str]:
    """sample_ddp.py's flags: few samples in few steps."""
    flags = ["ODE", "--ckpt", ckpt, "--num-fid-samples", samples, "--num-sampling-steps", 3, "--sample-dir", folder]
    return [str(flag) for flag in (*flags, "--cfg-scales", 1.5, "--per-proc-batch-size", 2, *more)]


def arrays(folder: Path, ending: str) -> dict[str, np.ndarray]:
    (file,) = folder.glob(f"*{ending}.npz")
    with np.load(file) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """An autoencoder with a scale and a shift for each of its four channels."""
    folder = save_kl(tmp_path_factory.mktemp("vae"), scaling_factor=0.5)
    return change_config(folder, latents_mean=[0.25, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 0.5, 1.5])


@pytest.fixture(scope="module")
def encoded_run(vae: Path, tmp_path_factory) -> Path:
    """A run on images, whose config names its autoencoder but no scaling of its own."""
    images, run_dir = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("runs") / "encoded"
    (images / "a").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / "a" / f"{number}.png")
    flags = [
        "--model",
        "PPF-T-2",
        "--image-size",
        "16",
        "--max-steps",
        "2",
        "--global-batch-size",
        "4",
        "--num-workers",
        "0",
    ]
    train.train(["--data-path", str(images), "--vae", str(vae), "--run-dir", str(run_dir), *flags])
    return run_dir


@pytest.fixture(scope="module")
def wide_latents(tmp_path_factory) -> Path:
    """Latents as LightningDiT writes them, of an autoencoder that diffusers does not know, and their statistics."""
    folder = tmp_path_factory.mktemp("latents")
    latents = MEAN + DEVIATION * torch.randn(6, WIDE, 4, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": torch.arange(6) % 2}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    shape = (1, WIDE, 1, 1)
    torch.save({"mean": torch.full(shape, MEAN), "std": torch.full(shape, DEVIATION)}, folder / "latents_stats.pt")
    return folder


@pytest.fixture(scope="module")
def wide_run(wide_latents: Path, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "wide"
    flags = [
        "--model",
        "SiT-T/2",
        "--max-steps",
        "2",
        "--global-batch-size",
        "4",
        "--num-workers",
        "0",
        "--sample-every",
        "0",
    ]
    train.train(["--data-path", str(wide_latents), "--run-dir", str(run_dir), *flags])
    return run_dir


def test_its_latents_decode_to_the_images(encoded_run: Path, vae: Path, tmp_path: Path, capsys) -> None:
    main(flags_of(encoded_run, tmp_path))
    main(flags_of(encoded_run, tmp_path, "--latents"))
    assert "(5, 4, 8, 8) float32" in capsys.readouterr().out
    latents = arrays(tmp_path, "-latents")["arr_0"]
    with torch.no_grad():
        decoded = AutoencoderKL.from_pretrained(vae).decode(torch.from_numpy(latents)).sample
    expected = ((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    (images,) = tmp_path.glob("*-seed-0.npz")
    assert abs(np.load(images)["arr_0"] - expected).max() <= 1


def test_an_autoencoders_config_is_enough(encoded_run: Path, vae: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(vae / "config.json", bare)
    main(flags_of(encoded_run, tmp_path / "with", "--latents"))
    main(flags_of(encoded_run, tmp_path / "without", "--latents", "--vae", bare))
    assert np.array_equal(*(arrays(tmp_path / name, "-latents")["arr_0"] for name in ("with", "without")))


def test_an_old_config_means_its_class_defaults(encoded_run: Path, tmp_path: Path) -> None:
    """The configs of Stable Diffusion's first autoencoders lack their factor, 0.18215."""
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2"}')
    save_tiny(tmp_path / "one", scaling_factor=1.0)
    main(flags_of(encoded_run, tmp_path / "a", "--latents", "--vae", tmp_path))
    main(flags_of(encoded_run, tmp_path / "b", "--latents", "--vae", tmp_path / "one"))
    found, unscaled = (arrays(tmp_path / name, "-latents")["arr_0"] for name in "ab")
    np.testing.assert_allclose(found, unscaled / 0.18215, rtol=1e-5)


def test_latents_of_an_unknown_autoencoder_are_scaled_by_their_statistics(wide_run: Path, tmp_path: Path) -> None:
    main(flags_of(wide_run, tmp_path, "--latents"))
    pretrained = load_pretrained(wide_run)
    x0 = torch.stack([torch.randn(WIDE, 4, 4, generator=g) for g in sample_generators(0, range(5), 7)])
    y = torch.tensor([label_of(index, 2, 0, "random") for index in range(5)])
    sampler = Sampler(create_transport(**pretrained.transport))
    x1 = sampler.sample_ode(
        ClassifierFreeGuidance(pretrained.model, 1.5, pretrained.model.num_classes), x0, num_steps=3, y=y
    )
    np.testing.assert_allclose(arrays(tmp_path, "-latents")["arr_0"], MEAN + DEVIATION * x1, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_processes_batches_and_interruptions_leave_no_trace(wide_run: Path, tmp_path: Path, capsys) -> None:
    alone, more = (
        ["SDE", *flags_of(wide_run, tmp_path / name, "--latents", samples=7)[1:]] for name in ("alone", "more")
    )
    main(alone)
    whole = arrays(tmp_path / "alone", "-latents")["arr_0"]
    first, second, *_ = sorted((tmp_path / "alone").rglob("shards/*.npz"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    capsys.readouterr()
    main(alone)
    assert "4 of 7 samples to make" in capsys.readouterr().out
    assert np.array_equal(arrays(tmp_path / "alone", "-latents")["arr_0"], whole)
    done = start_script("sample_ddp.py", *more, "--per-proc-batch-size", 3, processes=2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(arrays(tmp_path / "more", "-latents")["arr_0"], whole, rtol=1e-4, atol=1e-4)


def test_likelihood_of_latents_is_that_of_their_images(encoded_run: Path, tmp_path: Path) -> None:
    for more in ([], ["--latents"]):
        main(flags_of(encoded_run, tmp_path, "--likelihood", *more, samples=3))
    (of_images,) = tmp_path.glob("*-seed-0-likelihood.npz")
    found = arrays(tmp_path, "-latents-likelihood")
    np.testing.assert_allclose(found["nats"], np.load(of_images)["nats"], rtol=1e-5)


def test_likelihood_of_given_latents_needs_no_picture(wide_run: Path, wide_latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    flags = ["--likelihood", "--num-images", "2", "--sampling-method", "euler", "--num-sampling-steps", "2"]
    sample.main(["ODE", "--ckpt", str(wide_run), "--data-path", str(wide_latents), "--out", str(out), *flags])
    assert out.stat().st_size > 0


def test_an_npz_of_latents_appears_when_it_is_complete(wide_run: Path, tmp_path: Path, refuses, monkeypatch) -> None:
    def full(self: ShardStore, index: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardStore, "read", full)
    line = refuses(main, *flags_of(wide_run, tmp_path, "--latents"))
    assert "latents.npz cannot be written: [Errno 28] No space left on device" in line
    assert not list(tmp_path.glob("*.npz"))
    monkeypatch.undo()
    main(flags_of(wide_run, tmp_path, "--latents"))
    assert len(arrays(tmp_path, "-latents")["arr_0"]) == 5


def test_what_no_picture_holds_is_told_where_to_go(wide_run: Path, tmp_path: Path, refuses) -> None:
    line = refuses(main, *flags_of(wide_run, tmp_path))
    assert "makes 32 channels, which no picture holds: give --vae, or take the latents" in line
    assert "sample_ddp.py --latents" in line
    assert "sample_ddp.py --latents" in refuses(sample.main, "ODE", "--ckpt", wide_run, "--out", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--png"], "--png and --no-png are about images"),
        (["--image-size", "16"], "--image-size is the side of images"),
        (["--vae", "none"], "makes images, or does not tell how its latents are scaled"),
        (["--vae", "nowhere/vae"], "cannot load the autoencoder nowhere/vae"),
    ],
)
def test_bad_flags_are_named(flags: list[str], words: str, encoded_run: Path, tmp_path: Path, refuses) -> None:
    assert words in refuses(main, *flags_of(encoded_run, tmp_path / "none", "--latents", *flags))
    assert not (tmp_path / "none").exists()


def test_an_autoencoder_of_other_channels_is_named(encoded_run: Path, tmp_path: Path, refuses) -> None:
    other = save_kl(tmp_path / "other", channels=8)
    line = refuses(main, *flags_of(encoded_run, tmp_path / "none", "--latents", "--vae", other))
    assert f"{other} has 8 channels, {encoded_run} 4" in line


def test_pixels_are_no_latents(tiny_run: Path, wide_run: Path, tmp_path: Path, refuses) -> None:
    assert "makes images" in refuses(main, *flags_of(tiny_run, tmp_path, "--latents"))
    line = refuses(main, *flags_of(wide_run, tmp_path, "--latents", "--vae", "ema"))
    assert "tells how its latents are scaled: leave --vae out" in line


def test_bare_weights_that_say_nothing_of_their_latents_are_named(wide_run: Path, tmp_path: Path, refuses) -> None:
    convert(wide_run, tmp_path / "sit.pt", "sit")
    assert "does not tell how its latents are scaled" in refuses(
        main, *flags_of(tmp_path / "sit.pt", tmp_path, "--latents")
    )
