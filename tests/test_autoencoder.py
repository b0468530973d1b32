"""Latents against diffusers called by hand: scaling, posteriors, batches, and what cannot be loaded."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from scipy import stats
from small_autoencoders import FACTOR, change_config, open_kl, save_kl, save_tiny

import data.autoencoder as room
from data.autoencoder import LatentSpace, PixelSpace, Scaling, autoencoder_name, load_autoencoder
from runtime.rng import sample_generators
from runtime.speed import use_precision


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_kl(tmp_path_factory.mktemp("kl"))


@pytest.fixture(scope="module")
def kl(folder) -> LatentSpace:
    return load_autoencoder(str(folder))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


# -- Names ---------------------------------------------------------------------------------------------------------


def test_names_are_short_names_hub_ids_and_folders(folder, monkeypatch):
    assert autoencoder_name("ema") == "stabilityai/sd-vae-ft-ema"
    assert autoencoder_name("mse") == "stabilityai/sd-vae-ft-mse"
    assert autoencoder_name("someone/something") == "someone/something"
    assert autoencoder_name("none") == "none"
    monkeypatch.chdir(folder.parent)
    assert autoencoder_name(folder.name) == str(folder)  # another working directory finds it, too


# -- Scaling -------------------------------------------------------------------------------------------------------

MEAN, DEVIATION = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 4.0]
SCALINGS = {
    "Stable Diffusion's": ({}, 0.0, 0.18215),
    "shift_factor": ({"scaling_factor": 0.36, "shift_factor": 0.12}, 0.12, 0.36),
    "per channel": (
        {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": DEVIATION},
        column(MEAN),
        0.5 / column(DEVIATION),
    ),
}


@pytest.mark.parametrize("which", SCALINGS)
def test_scaling_and_shift_are_the_configs(tmp_path, images, which):
    config, shift, scale = SCALINGS[which]
    space = open_kl(tmp_path, **config)
    model = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        mean, deviation = space.raw_moments(images)
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close(deviation, posterior.std)
        torch.testing.assert_close(space.scaling.apply(mean), (posterior.mean - shift) * scale)
        x = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(space.decode(x), model.decode(x / scale + shift).sample)


@pytest.mark.parametrize("scaling", [Scaling(), Scaling(0.12, 0.36), Scaling(tuple(MEAN), tuple(DEVIATION))])
def test_a_scaling_has_an_inverse_and_survives_json(scaling):
    z = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(scaling.invert(scaling.apply(z)), z)
    scale = torch.tensor(scaling.scale, dtype=z.dtype).reshape(-1, 1, 1)
    torch.testing.assert_close(scaling.apply(z + 1) - scaling.apply(z), scale.expand_as(z))
    again = Scaling.from_dict(json.loads(json.dumps({"scale": scaling.scale, "shift": scaling.shift})))
    assert again == scaling


def test_an_autoencoder_can_be_scaled_otherwise(kl, images):
    other = kl.with_scaling(Scaling(1.0, 2.0))
    raw, _ = kl.raw_moments(images)
    torch.testing.assert_close(other.raw_moments(images)[0], raw)
    torch.testing.assert_close(other.scaling.apply(raw), (raw - 1) * 2)
    torch.testing.assert_close(kl.scaling.apply(raw), raw * 0.18215)
    torch.testing.assert_close(other.decode((raw - 1) * 2), kl.decode(raw * 0.18215))


# -- Shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "channels"), [(1, 4), (2, 4), (3, 16)])
def test_the_config_decides_latent_channels_and_size(tmp_path, blocks, channels):
    space = open_kl(tmp_path, blocks=blocks, channels=channels)
    images = torch.zeros(2, 3, 16, 8)
    shape = (channels, 16 // 2 ** (blocks - 1), 8 // 2 ** (blocks - 1))
    assert space.latent_shape((3, 16, 8)) == shape
    assert space.encode(images).shape == (2, *shape)
    assert space.decode(torch.zeros(2, *shape)).shape == images.shape
    assert (space.channels, space.factor) == (channels, 2 ** (blocks - 1))


def test_images_that_do_not_fit_are_refused(kl):
    with pytest.raises(ValueError, match="shrinks images by 2, which does not divide 15x16"):
        kl.latent_shape((3, 15, 16))
    with pytest.raises(ValueError, match="encodes 3 channels, the images have 1"):
        kl.latent_shape((1, 16, 16))


def test_nothing_encodes_and_decodes_to_nothing(kl):
    assert kl.encode(torch.zeros(0, 3, 16, 8)).shape == (0, 4, 8, 4)
    assert kl.decode(torch.zeros(0, 4, 8, 4)).shape == (0, 3, 16, 8)


def test_pixel_space_changes_nothing(images):
    space = load_autoencoder("none")
    assert isinstance(space, PixelSpace)
    assert space.encode(images) is space.decode(images) is images
    assert space.latent_shape((1, 8, 8)) == (1, 8, 8)


# -- Posteriors ----------------------------------------------------------------------------------------------------


def test_draws_are_normal_with_the_posteriors_moments(kl, images):
    raw, raw_deviation = kl.raw_moments(images[:1])
    mean, deviation = kl.scaling.apply(raw), raw_deviation * kl.scaling.scale
    draws = kl.encode(images[:1].expand(400, -1, -1, -1), torch.Generator().manual_seed(2))
    normal = ((draws - mean) / deviation).flatten()
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    assert (normal.view(400, -1)[1:] * normal.view(400, -1)[:-1]).mean().abs() < 4.5 / normal.numel() ** 0.5
    assert 0.02 < deviation.mean() < 0.1  # 0.3 times 0.18215: the noise is there, and smaller than one


def test_draws_belong_to_their_sample(kl, images):
    together = kl.encode(images, sample_generators(0, range(5)))
    alone = torch.cat([kl.encode(images[i : i + 1], sample_generators(0, [i])) for i in range(5)])
    torch.testing.assert_close(together, alone)
    assert (kl.encode(images, sample_generators(1, range(5))) - together).abs().min() > 0


def test_tiny_autoencoders_are_deterministic(tmp_path, images):
    space = load_autoencoder(str(save_tiny(tmp_path, scaling_factor=1.5, shift_factor=0.25)))
    assert space.factor == FACTOR
    with torch.no_grad():
        model = AutoencoderTiny.from_pretrained(tmp_path).eval()
        z = model.encode(images).latents
        torch.testing.assert_close(space.encode(images), (z - 0.25) * 1.5)
        torch.testing.assert_close(space.decode((z - 0.25) * 1.5), model.decode(z).sample)
    raw, none = space.raw_moments(images)
    torch.testing.assert_close(raw, z)
    assert none is None
    assert space.raw_moments(images[:0])[1] is None
    assert torch.equal(space.encode(images, torch.Generator().manual_seed(3)), space.encode(images))


# -- Batches, precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [1, 16 * 12, 2 * 16 * 12, 3 * 16 * 12 + 1])
def test_batches_that_fit_give_the_same(kl, images, monkeypatch, pixels):
    x = torch.randn(5, 4, 8, 6, generator=torch.Generator().manual_seed(4))
    decoded, mean = kl.decode(x), kl.raw_moments(images)[0]
    sizes: list[int] = []
    monkeypatch.setattr(room, "BATCH_PIXELS", pixels)
    parts = (kl.model.decoder, kl.model.encoder)
    hooks = [part.register_forward_hook(lambda _, args, __: sizes.append(len(args[0]))) for part in parts]
    torch.testing.assert_close(kl.decode(x), decoded)
    torch.testing.assert_close(kl.raw_moments(images)[0], mean)
    for hook in hooks:
        hook.remove()
    assert max(sizes) == max(1, pixels // (16 * 12))
    assert sum(sizes) == 10


def test_a_batch_too_large_for_the_memory_is_halved(kl):
    x = torch.randn(9, 4, 8, 6, generator=torch.Generator().manual_seed(5))
    decoded, sizes, limit = kl.decode(x), [], 2

    def memory(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(args[0]))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = kl.model.decoder.register_forward_pre_hook(memory)
    torch.testing.assert_close(kl.decode(x), decoded)
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    limit = 0  # not even one
    with pytest.raises(torch.OutOfMemoryError):
        kl.decode(x)
    hook.remove()


@pytest.mark.parametrize("save", [save_kl, save_tiny])
@pytest.mark.parametrize("network", ["fp32", "tf32", "bf16"])
def test_the_networks_precision_changes_no_latent_and_no_image(tmp_path, images, save, network):
    space = load_autoencoder(str(save(tmp_path)))
    with use_precision("fp32" if network == "fp32" else "tf32", torch.device("cpu")):
        mean, deviation = space.raw_moments(images)
        exact = space.scaling.apply(mean)
        drawn, decoded = space.encode(images, sample_generators(0, range(5))), space.decode(exact)
    with use_precision(network, torch.device("cpu")):
        linear = torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
        assert linear.dtype == (torch.bfloat16 if network == "bf16" else torch.float32)
        again, deviation_again = space.raw_moments(images)
        assert torch.equal(again, mean)
        assert torch.equal(deviation_again, deviation) if deviation is not None else deviation_again is None
        assert torch.equal(space.encode(images, sample_generators(0, range(5))), drawn)
        assert torch.equal(space.decode(exact), decoded)
        assert space.decode(exact.bfloat16()).dtype == torch.float32  # as a network in bf16 may give them


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_what_is_not_in_bf16_is_in_tf32_unless_all_is_in_fp32(precision, tf32):
    """On CUDA; PyTorch's own default is tf32 for convolutions, and fp32 for matrix products."""
    with use_precision(precision, torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")


def test_weights_are_frozen_and_fp32_whatever_is_stored(tmp_path, images):
    save_kl(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    space = load_autoencoder(str(tmp_path))
    assert {parameter.dtype for parameter in space.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in space.model.parameters())
    assert not space.encode(images).requires_grad


# -- What cannot be loaded -----------------------------------------------------------------------------------------


def error_of(vae: str) -> str:
    with pytest.raises(ValueError, match="autoencoder") as error:
        load_autoencoder(vae)
    message = str(error.value)
    assert "\n" not in message
    assert vae in message
    assert "give --vae a local folder" in message
    return message


def test_a_folder_that_diffusers_did_not_save_is_named(tmp_path):
    assert "config.json" in error_of(str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert "there is no such folder" in error_of(str(tmp_path / "nowhere"))


def damage(folder: Path, how: str) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "a tensor is missing":
        tensors = load_file(weights)
        del tensors["encoder.conv_in.weight"]
        save_file(tensors, weights)
    elif how == "another shape":
        save_file(load_file(weights) | {"encoder.conv_in.weight": torch.zeros(2, 2)}, weights)
    elif how == "config":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize("how", ["no weights", "truncated", "a tensor is missing", "another shape", "config"])
def test_a_damaged_folder_is_one_line(tmp_path, how):
    damage(save_kl(tmp_path), how)
    message = error_of(str(tmp_path))
    assert "encoder.conv_in.weight" in message or how in ("no weights", "truncated", "config")


def test_another_kind_of_model_is_named(tmp_path):
    change_config(save_kl(tmp_path), _class_name="UNet2DModel")
    assert "UNet2DModel" in error_of(str(tmp_path))


HUB = """
import sys, time
from data.autoencoder import load_autoencoder
print(load_autoencoder("someone/cached").latent_shape((3, 16, 16)))
try:
    load_autoencoder("ema")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_network_the_cache_serves_and_the_rest_is_one_line(tmp_path):
    """A cache in the hub's layout; for anything else one line says that it cannot be fetched."""
    revision = "0123456789" * 4
    snapshot = tmp_path / "hub" / "models--someone--cached" / "snapshots" / revision
    save_kl(snapshot)
    reference = tmp_path / "hub" / "models--someone--cached" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(revision)
    environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)
    assert done.stderr == ""
    shape, line = done.stdout.splitlines()
    assert shape == "(4, 8, 8)"
    assert "cannot load the autoencoder stabilityai/sd-vae-ft-ema" in line
    assert "could not be fetched from the hub (HF_HUB_OFFLINE is set)" in line
    assert "give --vae a local folder" in line


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    """The hub answers, and there is nowhere to keep what it says."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in {"ETag": '"a"', "X-Repo-Commit": "0" * 40, "Content-Length": "2"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args) -> None: ...

    (tmp_path / "file").touch()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(tmp_path / "file" / "home"), "HF_HUB_OFFLINE": "0"}
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-c", "from data.autoencoder import load_autoencoder\nload_autoencoder('ema')"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120)
        server.shutdown()
    assert "the hub's files cannot be kept" in done.stderr
    assert f"Not a directory: '{tmp_path}/file/home" in done.stderr
    assert "set HF_HOME to another folder" in done.stderr
