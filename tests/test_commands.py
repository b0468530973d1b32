"""The commands in the READMEs of PPFlow and SiT, and the flags their scripts take, as their users write them.

Small means: another model name, a few pictures of 64x64, a small autoencoder in a local folder, few steps. Everything
else is as written there; flags are parsed by the scripts themselves.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, start_script
from PIL import Image

import sample
import sample_ddp
import train
from models import create_model
from weights.layouts import export_state_dict
from weights.pretrained import load_pretrained
from weights.published import PUBLISHED, Published

SMALL_TRAINING = ["--image-size", "64", "--global-batch-size", "4", "--max-steps", "2", "--num-workers", "0"]
UNSHOWN = [*SMALL_TRAINING, "--sample-every", "0"]  # without a grid of samples


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An AutoencoderKL with the proportions of Stable Diffusion's and few channels: eight pixels to a latent."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stand-in for /path/to/imagenet/train."""
    folder, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for wnid in ("n01440764", "n01622779"):
        (folder / wnid).mkdir()
        for number in range(3):
            pixels = rng.integers(0, 255, (70 + number, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / wnid / f"{wnid}_{number}.JPEG")
    return str(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights in the layouts of SiT and PPFlow, as bare state dicts."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for name, layout in (("SiT-T/2", "sit"), ("PPF-T-2", "ppflow"), ("PPF-T-3", "ppflow")):
        torch.manual_seed(1)
        model = create_model(name, input_size=8, num_classes=1000)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        files[name] = str(folder / f"{name.replace('/', '-')}.pt")
        torch.save(export_state_dict(model, layout), files[name])
    return files


@pytest.fixture(scope="module")
def latent_run(imagenet: str, vae: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.py --model PPF_XL_2 --data-path /path/to/imagenet/train`, small."""
    run_dir = tmp_path_factory.mktemp("runs") / "latents"
    train.train(
        ["--model", "PPF_T_2", "--data-path", imagenet, "--vae", vae, "--run-dir", str(run_dir), *SMALL_TRAINING]
    )
    return run_dir


# -- PPFlow's README ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PPF-T-2", "PPF-T-3"])
def test_sample_with_published_weights(name: str, published: dict[str, str], vae: str, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    sample.main(
        f"ODE --image-size 64 --seed 1 --ckpt {published[name]} --vae {vae} --out {out} --num-sampling-steps 4".split()
    )
    assert Image.open(out).size == (3 * 66 + 2, 3 * 66 + 2)  # DiT's eight classes


def test_sample_by_model_name_and_own_checkpoint(latent_run: Path, tmp_path: Path) -> None:
    ckpt = latent_run / "checkpoints" / "0000002.pt"
    out = tmp_path / "a.png"
    sample.main(f"ODE --model PPFlow_T_2 --image-size 64 --ckpt {ckpt} --num-sampling-steps 2 --out {out}".split())
    assert Image.open(out).mode == "RGB"


@pytest.mark.slow
def test_train_on_several_processes_with_wandb(imagenet: str, vae: str, tmp_path: Path) -> None:
    done = start_script(
        "train.py",
        *f"--model PPF_T_2 --data-path {imagenet} --wandb --vae {vae} --run-dir {tmp_path / 'run'}".split(),
        *SMALL_TRAINING,
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert (tmp_path / "run" / "samples" / "0000002.png").exists()


def test_train_from_a_pretrained_sit(imagenet: str, vae: str, published: dict[str, str], tmp_path: Path) -> None:
    train.train(
        [
            *(
                f"--model PPF_T_2 --data-path {imagenet} --initialize_from {published['SiT-T/2']} "
                f"--vae {vae} --num-classes 1000 --lr 1e-30 --run-dir {tmp_path}"
            ).split(),
            *SMALL_TRAINING,
        ]
    )
    trained = load_pretrained(tmp_path).model  # the learning rate has left it where it started
    sit = load_pretrained(published["SiT-T/2"]).model
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.6, 0.9]), torch.tensor([3, 1000])
    torch.testing.assert_close(trained(x, t, y, level=1), sit(x, t, y))


def test_weights_of_other_classes_lend_their_blocks(
    imagenet: str, vae: str, published: dict[str, str], tmp_path: Path
) -> None:
    train.train(
        [
            *(
                f"--model SiT-T/2 --data-path {imagenet} --initialize_from {published['SiT-T/2']} "
                f"--vae {vae} --lr 1e-30 --run-dir {tmp_path}"
            ).split(),
            *SMALL_TRAINING,
        ]
    )
    trained, sit = load_pretrained(tmp_path).model, load_pretrained(published["SiT-T/2"]).model
    classes = trained.num_classes
    assert classes < sit.num_classes
    assert f"of 1000 classes, and the model has {classes}: the label table is new" in (tmp_path / "log.txt").read_text()
    torch.manual_seed(0)  # --global-seed
    start = create_model("SiT-T/2", input_size=8, num_classes=classes).y_embedder.embedding_table.weight
    found = trained.y_embedder.embedding_table.weight
    torch.testing.assert_close(found[:-1], start[:-1], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[-1], sit.y_embedder.embedding_table.weight[-1])
    torch.testing.assert_close(trained.blocks.state_dict(), sit.blocks.state_dict())


def test_resuming_does_not_read_the_initial_weights_again(
    imagenet: str, vae: str, published: dict[str, str], tmp_path: Path
) -> None:
    first = shutil.copy(published["SiT-T/2"], tmp_path / "SiT-XL-2-256.pt")
    command = [
        *(
            f"--model PPF_T_2 --data-path {imagenet} --initialize_from {first} --vae {vae} "
            f"--num-classes 1000 --run-dir {tmp_path / 'run'}"
        ).split(),
        *SMALL_TRAINING,
    ]
    train.train(command)
    Path(first).unlink()
    train.train([*command, "--max-steps", "3"])
    assert load_pretrained(tmp_path / "run").step == 3


def test_resume_from_a_checkpoint(imagenet: str, latent_run: Path, tmp_path: Path) -> None:
    ckpt = latent_run / "checkpoints" / "0000002.pt"
    train.train(f"--model PPF_T_2 --data-path {imagenet} --ckpt {ckpt} --run-dir {tmp_path} --max-steps 3".split())
    assert (tmp_path / "checkpoints" / "0000003.pt").exists()


@pytest.mark.slow
def test_sample_ddp_by_model_name(published: dict[str, str], vae: str, tmp_path: Path) -> None:
    done = start_script(
        "sample_ddp.py",
        *(
            f"ODE --model PPF_T_2 --num-fid-samples 6 --ckpt {published['PPF-T-2']} --vae {vae} "
            f"--num-sampling-steps 2 --sample-dir {tmp_path}"
        ).split(),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.npz")
    assert np.load(file)["arr_0"].shape == (6, 64, 64, 3)


@pytest.mark.parametrize(("model", "levels"), [("PPF_T_2", 2), ("PPFlow_T_3", 3)])
def test_train_names_the_levels_as_well(model: str, levels: int, imagenet: str, vae: str, tmp_path: Path) -> None:
    """PPFlow's scripts need the number of levels besides the model; here the flag is checked against it."""
    command = ["--model", model, "--patch-level", str(levels), "--data-path", imagenet, "--vae", vae, *UNSHOWN]
    command += ["--run-dir", str(tmp_path)]
    train.train(command)
    assert load_pretrained(tmp_path).model.num_levels == levels
    train.train([*command, "--max-steps", "3"])
    assert load_pretrained(tmp_path).step == 3


def test_a_wrong_number_of_levels_is_one_line(
    imagenet: str, vae: str, latent_run: Path, tmp_path: Path, refuses
) -> None:
    command = ["--data-path", imagenet, "--vae", vae, "--patch-level", 3, *SMALL_TRAINING]
    line = refuses(train.train, "--model", "PPF_T_2", *command, "--run-dir", tmp_path / "new")
    assert "--patch-level 3, but PPF-T-2 has 2 level(s): leave it out, or choose another --model" in line
    assert not (tmp_path / "new").exists()
    line = refuses(train.train, *command[:-2], "--patch-level", 3, "--run-dir", latent_run, "--max-steps", 3)
    assert "--patch-level 3, but PPF-T-2 has 2 level(s)" in line


@pytest.mark.parametrize(
    "flags",
    [
        ["ODE", "--cfg-scales", "1.0", "3.0"],
        ["ODE", "--sampling-method", "heun2", "--num-sampling-steps", "4", "--cfg-scales", "3.0", "4.0"],
        ["ODE", "--sampling-method", "dopri5", "--num-sampling-steps", "250", "--atol", "1e-2", "--rtol", "1e-2"],
        ["ODE", "--path-type", "Linear", "--prediction", "velocity", "--loss-weight", "None", "--sample-eps", "0"],
        ["SDE", "--num-sampling-steps", "4", "--diffusion-form", "increasing-decreasing", "--last-step", "Tweedie"],
        ["SDE", "--num-sampling-steps", "4", "--sampling-method", "Heun", "--last-step", "None"],
    ],
)
def test_sampler_flags(flags: list[str], published: dict[str, str], vae: str, tmp_path: Path, capsys) -> None:
    common = ["--model", "PPFlow_T_2", "--num-classes", "1000", "--ckpt", published["PPF-T-2"], "--vae", vae]
    out = tmp_path / "a.png"
    sample.main([*flags, *common, "--image-size", "64", "--seed", "3412", "--out", str(out)])
    assert out.exists()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    ignored = "note: dopri5 chooses its own steps: --num-sampling-steps has no effect"
    assert notes == ([ignored] if "250" in flags else [])
    many = ["--num-fid-samples", "2", "--per-proc-batch-size", "4", "--global-seed", "0", "--no-tf32"]
    sample_ddp.main([*flags, *common, *many, "--sample-dir", str(tmp_path)])
    assert list(tmp_path.glob("*.npz"))


# -- SiT's README ------------------------------------------------------------------------------------------------


def test_sit_sample(published: dict[str, str], vae: str, tmp_path: Path) -> None:
    for flags in (
        ["ODE", "--sampling-method", "dopri5", "--atol", "1e-3", "--rtol", "1e-2"],
        ["SDE", "--num-sampling-steps", "4"],
    ):
        out = tmp_path / f"{flags[0]}.png"
        sample.main(
            [*flags, *f"--model SiT-T/2 --image-size 64 --ckpt {published['SiT-T/2']} --vae {vae} --out {out}".split()]
        )
        assert out.exists()


def test_sit_train_with_noise_prediction(imagenet: str, vae: str, tmp_path: Path) -> None:
    train.train(
        [
            *(
                f"--model SiT-T/2 --data-path {imagenet} --path-type Linear --prediction noise "
                f"--vae {vae} --run-dir {tmp_path}"
            ).split(),
            *SMALL_TRAINING,
        ]
    )
    assert load_pretrained(tmp_path).transport["prediction"] == "noise"


@pytest.mark.parametrize(
    "flags",
    [
        ["--path-type", "GVP", "--prediction", "score", "--loss-weight", "likelihood"],
        ["--path-type", "VP", "--prediction", "velocity", "--loss-weight", "None", "--cfg-scale", "4.0"],
        ["--train-eps", "1e-5", "--sample-eps", "1e-3", "--prediction", "noise", "--loss-weight", "velocity"],
    ],
)
def test_sit_process_is_named_in_training_and_in_sampling(
    flags: list[str], imagenet: str, vae: str, tmp_path: Path
) -> None:
    both = ["--model", "SiT-T/2", "--vae", vae, *flags]
    train.train(["--data-path", imagenet, "--run-dir", str(tmp_path), *both, *UNSHOWN])
    ckpt, out = tmp_path / "checkpoints" / "0000002.pt", tmp_path / "a.png"
    sample.main(
        ["ODE", "--image-size", "64", "--ckpt", str(ckpt), "--num-sampling-steps", "2", "--out", str(out), *both]
    )
    assert out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["ODE", "--atol", "1e-5", "--rtol", "1e-5"], "leave it out, or give --sampling-method dopri5 as well"),
        (["ODE", "--reverse"], "--likelihood and --reverse need --data-path"),
        (["ODE", "--likelihood"], "--likelihood and --reverse need --data-path"),
        (["ODE", "--image-size", "512"], "was trained with 64: leave --image-size out"),
        (["ODE", "--prediction", "noise", "--sample-eps", "0"], "leave it out, which means 0.001"),
    ],
)
def test_sit_commands_that_do_not_run_say_what_to_write(
    flags: list[str], words: str, published: dict[str, str], vae: str, tmp_path: Path, refuses
) -> None:
    out = tmp_path / "a.png"
    assert words in refuses(sample.main, *flags, "--ckpt", published["SiT-T/2"], "--vae", vae, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--prediction", "noise", "--sample-eps", "0"],
        ["--prediction", "score", "--sample-eps", "0"],
        ["--path-type", "VP", "--train-eps", "0"],
    ],
)
def test_an_interval_on_which_nothing_can_be_learned_or_drawn_is_one_line(
    flags: list[str], imagenet: str, vae: str, tmp_path: Path, refuses
) -> None:
    command = ["--model", "SiT-T/2", "--data-path", imagenet, "--vae", vae, *flags, *SMALL_TRAINING]
    line = refuses(train.train, *command, "--run-dir", tmp_path / "run")
    assert f"{flags[-2][2:].replace('-', '_')} 0 is too small for the" in line
    assert "leave it out, which means" in line
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_with_such_an_interval_goes_on(tmp_path: Path) -> None:
    command = ["--data-path", "digits", "--model", "SiT-T/2", "--prediction", "noise", "--sample-eps", "0.001"]
    command += ["--run-dir", str(tmp_path), *UNSHOWN[2:]]
    train.train(command)
    path = tmp_path / "checkpoints" / "0000002.pt"
    checkpoint = torch.load(path, weights_only=True)
    for part in ("transport", "args"):  # as an earlier version wrote it
        checkpoint["config"][part]["sample_eps"] = 0.0
    torch.save(checkpoint, path)
    path.with_name(f"{path.name}.sha256").unlink()
    command[command.index("0.001")] = "0"
    train.train([*command, "--max-steps", "3"])
    assert load_pretrained(tmp_path).transport["sample_eps"] == 0
    assert load_pretrained(tmp_path).step == 3


def test_sit_likelihood_of_samples(published: dict[str, str], vae: str, tmp_path: Path) -> None:
    sample_ddp.main(
        (
            f"ODE --model SiT-T/2 --likelihood --ckpt {published['SiT-T/2']} --vae {vae} "
            f"--num-fid-samples 3 --num-sampling-steps 2 --sample-dir {tmp_path}"
        ).split()
    )
    (file,) = tmp_path.glob("*-likelihood.npz")
    values = np.load(file)
    assert values["nats"].shape == (3,)
    np.testing.assert_allclose(values["bits_per_dim"], -values["nats"] / (256 * np.log(2)), rtol=1e-5)


# -- Without a network -------------------------------------------------------------------------------------------


def test_default_weights_that_cannot_be_fetched_are_one_line(tmp_path: Path, monkeypatch, refuses) -> None:
    monkeypatch.setenv("PPFLOW_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(PUBLISHED, "PPF-XL-2", Published("PPF-XL-2.pt", "http://127.0.0.1:9/PPF-XL-2.pt"))
    assert "PPF-XL-2" in refuses(sample.main, "ODE", "--image-size", 256, "--seed", 1)


@pytest.mark.slow
def test_autoencoder_that_cannot_be_fetched_is_one_line(imagenet: str, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    from conftest import ROOT

    command = [sys.executable, str(ROOT / "train.py"), "--model", "PPF_T_2", "--data-path", imagenet]
    environment = {**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "stabilityai/sd-vae-ft-ema" in line
    assert "local folder" in line


# -- Latents that were encoded before ----------------------------------------------------------------------------


def test_latents_of_another_program_train_and_sample(vae: str, tmp_path: Path, refuses) -> None:
    """The statistics of LightningDiT's files scale the latents in training and, from the checkpoint, in sampling."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    latents = 3 + 5 * torch.randn(6, 4, 8, 8, generator=generator)
    mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
    (tmp_path / "latents").mkdir()
    save_file(
        {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": torch.arange(6) % 2},
        tmp_path / "latents" / "latents_rank00_shard000.safetensors",
    )
    torch.save({"mean": mean, "std": std}, tmp_path / "latents" / "latents_stats.pt")
    command = [
        *f"--model PPF-T-2 --data-path {tmp_path / 'latents'} --run-dir {tmp_path / 'run'}".split(),
        *SMALL_TRAINING[2:],
    ]
    assert "--vae" in refuses(train.train, *command)
    train.train([*command, "--vae", vae])
    scaling = load_pretrained(tmp_path / "run").scaling
    np.testing.assert_allclose(scaling["shift"], mean.flatten(), rtol=1e-4)
    np.testing.assert_allclose(scaling["scale"], 1 / std.flatten(), rtol=1e-4)
    out = tmp_path / "a.png"
    sample.main(["ODE", "--ckpt", str(tmp_path / "run"), "--num-sampling-steps", "2", "--out", str(out)])
    assert Image.open(out).size == (2 * 66 + 2, 66 + 2)


def test_extracted_latents_train_and_are_decoded_by_their_autoencoder(imagenet: str, vae: str, tmp_path: Path) -> None:
    from extract_latents import extract

    extract(f"--data-path {imagenet} --vae {vae} --image-size 64 --out {tmp_path / 'latents'} --num-workers 0".split())
    train.train(
        [*f"--model SiT-T/2 --data-path {tmp_path / 'latents'} --run-dir {tmp_path / 'run'}".split(), *SMALL_TRAINING]
    )
    pretrained = load_pretrained(tmp_path / "run")
    assert pretrained.vae == vae
    assert pretrained.model.input_size == (8, 8)
    assert (tmp_path / "run" / "samples" / "0000002.png").exists()


def test_likelihood_and_reverse_of_encoded_images(imagenet: str, latent_run: Path, tmp_path: Path) -> None:
    for question in ("--likelihood", "--reverse"):
        out = str(tmp_path / "out.png")
        sample.main(
            (
                f"ODE --ckpt {latent_run} {question} --data-path {imagenet} --num-images 3 "
                f"--sampling-method euler --num-sampling-steps 4 --out {out}"
            ).split()
        )
        assert (tmp_path / "out.png").stat().st_size > 0
