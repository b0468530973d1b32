"""evaluate.py: its numbers are another library's, whatever holds the images and however many processes run."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import start_script
from PIL import Image
from random_inception import write_random_inception

import evaluate as command
from evaluate import main
from metrics.features import Pixels
from runtime.errors import run_script

SIZE = 4

OWN = """
import torch
from metrics.features import Features

MATRICES = [torch.randn(48, size, generator=torch.Generator().manual_seed(size)) for size in (6, 4, 3)]

def project(images):
    pool, spatial, logits = (images.flatten(1).float() / 255 @ matrix for matrix in MATRICES)
    return Features(pool, spatial, logits.softmax(1))
"""


def draw(count: int, seed: int = 0) -> np.ndarray:
    """Images (count, 4, 4, 3) uint8."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(120 + 10 * seed, 40, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with reference.npz, samples.npz and a module of one's own features; the cache is there as well."""
    monkeypatch.setenv("PPFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_features.py").write_text(OWN)
    np.savez(tmp_path / "reference.npz", draw(60))
    np.savez(tmp_path / "samples.npz", arr_0=draw(50, seed=1), arr_1=np.arange(50) % 3)
    return tmp_path


def run(folder: Path, *flags: object, features: str = "own_features:project", samples: str = "samples.npz") -> dict:
    """The JSON of an evaluation of samples in the folder."""
    out = folder / "numbers.json"
    given = [folder / "reference.npz", folder / samples, "--features", features, "--json", out, *flags]
    main([str(flag) for flag in given])
    return json.loads(out.read_text())


def values_of(numbers: dict) -> dict[str, float]:
    return {f"{name} {key}": value for name, held in numbers["metrics"].items() for key, value in held.items()}


# -- Another library ---------------------------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    """Images (N, H, W, 3), as torch-fidelity takes them."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def by_torch_fidelity(reference: np.ndarray, samples: np.ndarray, **flags: object) -> dict[str, float]:
    import torch_fidelity

    return torch_fidelity.calculate_metrics(
        input1=Pictures(samples),
        input2=Pictures(reference),
        cuda=False,
        isc=True,
        fid=True,
        prc=True,
        isc_splits=1,
        samples_shuffle=False,
        prc_neighborhood=3,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
        **flags,
    )


def agrees(numbers: dict, found: dict[str, float], distance: str) -> None:
    expected = {
        f"{distance} value": found["frechet_inception_distance"],
        "is value": found["inception_score_mean"],
        "precision value": found["precision"],
        "recall value": found["recall"],
    }
    values = values_of(numbers)
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < expected["recall value"] < 1


def test_numbers_are_those_of_torch_fidelity(folder):
    import own_features
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import register_feature_extractor

    class Projection(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return "pool", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "pool"

        @staticmethod
        def can_be_compiled():
            return False

        @staticmethod
        def get_dummy_input_for_compile():
            return torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)

        def forward(self, images):
            found = own_features.project(images)
            given = {"pool": found.pool, "logits": found.probabilities.log()}
            return tuple(given[name] for name in self.features_list)

    register_feature_extractor("projection", Projection)
    found = by_torch_fidelity(draw(60), draw(50, seed=1), feature_extractor="projection")
    agrees(run(folder), found, "fd")


@pytest.mark.slow
def test_numbers_of_inception_are_those_of_torch_fidelity(folder, monkeypatch):
    from metrics import inception

    rng = np.random.default_rng(0)
    sides = [
        np.stack([np.asarray(Image.fromarray(small).resize((32, 32))) for small in images])
        for images in (
            rng.integers(0, high, (number, SIZE, SIZE, 3), np.uint8) for high, number in ((256, 14), (225, 12))
        )
    ]
    for name, pixels in zip(("reference.npz", "samples.npz"), sides, strict=True):
        np.savez(folder / name, pixels)
    write_random_inception(folder / "inception.pth")
    monkeypatch.setattr(inception, "SHA256", "")
    numbers = run(folder, "--inception", folder / "inception.pth", "--batch-size", 7, features="inception")
    found = by_torch_fidelity(
        *sides,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(folder / "inception.pth"),
        batch_size=8,
    )
    agrees(numbers, found, "fid")
    assert numbers["metrics"]["sfid"]["value"] > 0
    assert "12 samples and 14 reference images cannot tell the covariance of 2,048 features" in numbers["warnings"][0]


# -- Inputs and processes ----------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_numbers(folder):
    expected, pixels = run(folder), draw(50, seed=1)
    (folder / "pictures").mkdir()
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(folder / "pictures" / f"{number:03d}.png")
            archive.write(folder / "pictures" / f"{number:03d}.png", f"{number:03d}.png")
    np.savez_compressed(folder / "compressed.npz", arr_0=pixels, arr_1=np.arange(50) % 3)
    for kind in ("pictures", "pictures.zip", "compressed.npz"):
        values = values_of(run(folder, samples=kind))
        kept = {name: value for name, value in values_of(expected).items() if name in values}
        assert values == pytest.approx(kept, rel=1e-12)
        assert len(values) == len(values_of(expected)) - (kind != "compressed.npz")  # classes are unknown


@pytest.mark.parametrize("batch_size", [1, 13])
def test_any_batch_size_gives_the_same_numbers(folder, batch_size):
    flags = ["--errors", "--fid-inf"]
    expected = values_of(run(folder, *flags))
    assert len(expected) == 13
    assert values_of(run(folder, *flags, "--batch-size", batch_size)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(folder):
    flags = ["--errors", "--fid-inf", "--batch-size", 4, "--cache", folder / "other"]
    expected = values_of(run(folder, *flags))
    given = [folder / "reference.npz", folder / "samples.npz", "--features", "own_features:project", *flags]
    (folder / "other").rename(folder / "kept")
    done = start_script("evaluate.py", *given, "--json", folder / "two.json", processes=2)
    assert done.returncode == 0, done.stderr
    assert values_of(json.loads((folder / "two.json").read_text())) == pytest.approx(expected, rel=1e-6)
    done = start_script("evaluate.py", *given, "--json", folder / "three.json", processes=3)  # from the cache
    assert done.returncode == 0, done.stderr
    assert values_of(json.loads((folder / "three.json").read_text())) == pytest.approx(expected, rel=1e-6)


def test_statistics_are_a_reference_that_others_read(folder):
    expected = run(folder)
    main(["stats", str(folder / "reference.npz"), str(folder / "stats.npz"), "--features", "own_features:project"])
    with np.load(folder / "stats.npz") as held:  # without pickle
        import own_features

        pool = own_features.project(torch.from_numpy(draw(60)).permute(0, 3, 1, 2)).pool.double().numpy()
        np.testing.assert_allclose(held["mu"], pool.mean(0), rtol=1e-6)
        np.testing.assert_allclose(held["sigma"], np.cov(pool, rowvar=False), rtol=1e-5, atol=1e-7)
        assert {name: held[name].shape for name in ("mu_s", "sigma_s")} == {"mu_s": (4,), "sigma_s": (4, 4)}
        np.testing.assert_array_equal(held["arr_0"], draw(60))
        assert held["num_images"] == 60
    (folder / "stats.npz").rename(folder / "reference.npz")
    assert values_of(run(folder)) == pytest.approx(values_of(expected), rel=1e-9)


def test_statistics_keep_a_random_part_of_many_images(folder, monkeypatch):
    monkeypatch.setattr(command, "REFERENCE_IMAGES", 20)
    main(["stats", str(folder / "reference.npz"), str(folder / "stats.npz"), "--features", "pixels"])
    with np.load(folder / "stats.npz") as held:
        rows = {image.tobytes(): number for number, image in enumerate(draw(60))}
        kept = [rows[image.tobytes()] for image in held["arr_0"]]
        assert held["num_images"] == 60
    assert kept == sorted(set(kept))
    assert len(kept) == 20
    assert max(kept) > 30


def test_second_evaluation_takes_the_reference_from_the_cache(folder, capsys, monkeypatch):
    expected = run(folder, features="pixels")
    capsys.readouterr()
    seen = []
    original = Pixels.__call__
    monkeypatch.setattr(Pixels, "__call__", lambda self, images: (seen.append(len(images)), original(self, images))[1])
    assert values_of(run(folder, features="pixels")) == values_of(expected)
    assert sum(seen) == 50
    assert "note: statistics of" in capsys.readouterr().out


def test_part_of_the_samples_is_random_and_repeatable(folder):
    whole, part = run(folder), run(folder, "--num-samples", 30)
    assert (whole["num_samples"], part["num_samples"]) == (50, 30)
    np.savez(folder / "first.npz", draw(50, seed=1)[:30])
    assert run(folder, samples="first.npz")["metrics"]["fd"] != part["metrics"]["fd"]
    assert run(folder, "--num-samples", 30) == part
    assert run(folder, "--num-samples", 50) == whole


# -- The report --------------------------------------------------------------------------------------------------


def test_numbers_come_with_all_that_they_depend_on(folder, capsys):
    settings = {"checkpoint": "PPF-T-2, step 7", "label_sampling": "balanced", "global_seed": 0, "num_classes": 3}
    settings |= {"gmacs_per_image": 1.5, "png": True}
    (folder / "samples").mkdir()
    (folder / "samples" / "settings.json").write_text(json.dumps(settings))
    numbers = run(folder, "--k", 5, "--adm-half", "--errors")
    assert numbers["settings"] == settings
    assert (numbers["k"], numbers["adm_half"]) == (5, True)
    assert (numbers["num_samples"], numbers["num_reference"]) == (50, 60)
    assert (numbers["extractor"], numbers["dimensions"]) == ("own_features:project", 6)
    assert len(numbers["extractor_digest"]) == 64
    assert (numbers["precision"], numbers["tf32"]) == ("fp32", False)
    assert numbers["versions"] == {"torch": torch.__version__, "numpy": np.__version__}
    shown = capsys.readouterr().out
    for name in ("FD", "sFID", "Inception Score", "Precision", "Recall", "Class accuracy"):
        assert f"\n{name}  " in shown
    assert f"{numbers['metrics']['fd']['value']:.4f}" in shown
    assert "warning: 50 samples against 60 reference images" in shown


def test_only_the_metrics_that_are_asked_for_are_computed(folder):
    assert set(run(folder, "--metrics", "fd", "accuracy")["metrics"]) == {"fd", "accuracy"}


def test_metric_that_the_reference_lacks_is_skipped_with_a_line(folder, capsys):
    main(["stats", str(folder / "reference.npz"), str(folder / "stats.npz"), "--features", "own_features:project"])
    with np.load(folder / "stats.npz") as held:
        kept = {name: held[name] for name in held if name not in ("arr_0", "mu_s", "sigma_s")}
    np.savez(folder / "reference.npz", **kept)
    assert set(run(folder)["metrics"]) == {"fd", "is", "accuracy"}
    shown = capsys.readouterr().out
    assert "note: no sfid:" in shown
    assert "note: no prc:" in shown
    assert run(folder)["num_reference"] == 60


def test_classifier_of_ones_own_images_gives_accuracy(folder):
    rng, labels = np.random.default_rng(0), np.arange(200) // 100  # sorted by class
    pixels = (rng.integers(0, 40, (200, 8, 8, 3)) + 150 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(folder / "reference.npz", arr_0=pixels, arr_1=labels)
    np.savez(folder / "samples.npz", arr_0=pixels[::3], arr_1=labels[::3])
    main(["classifier", str(folder / "reference.npz"), str(folder / "bright.pt"), "--epochs", "4"])
    numbers = run(folder, "--classifier", folder / "bright.pt", features="cifar")
    assert numbers["metrics"]["accuracy"]["value"] > 0.9


# -- Refusals ----------------------------------------------------------------------------------------------------


def refused(folder: Path, refuses, *flags: object, samples: str = "samples.npz") -> str:
    line = refuses(main, folder / "reference.npz", folder / samples, "--features", "pixels", *flags)
    assert not (folder / "numbers.json").exists()
    return line


def test_bad_input_is_refused_in_one_line(folder, refuses):
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    for number, size in enumerate((4, 4, 5)):
        Image.new("RGB", (size, 4)).save(folder / "mixed" / f"{number}.png")
    (folder / "stats.pkl").write_bytes(pickle.dumps({"fid": {}}))
    (folder / "torn.npz").write_bytes((folder / "samples.npz").read_bytes()[:500])
    np.savez(folder / "one.npz", draw(1))
    np.savez(folder / "objects.npz", np.array([{}], dtype=object))
    np.savez(folder / "large.npz", np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(folder / "moments.npz", mu=np.zeros(48), sigma=np.eye(48))
    np.savez(folder / "three.npz", draw(3))
    for name, words in {
        "nowhere": "does not exist",
        "empty": "no pictures",
        "mixed": "one size",
        "stats.pkl": "is a pickle",
        "torn.npz": "damaged",
        "one.npz": "1 image",
        "objects.npz": "objects",
        "large.npz": "images of 4x4 and",
        "moments.npz": "count as Inception's",
    }.items():
        assert words in refused(folder, refuses, samples=name), name
    assert "3 neighbours take 4 or more" in refused(folder, refuses, "--metrics", "PRC", samples="three.npz")


def test_a_refused_command_leaves_no_folder(folder, refuses):
    refused(folder, refuses, "--json", folder / "new" / "numbers.json", samples="nowhere")
    assert not (folder / "new").exists()


def test_statistics_of_statistics_are_refused(folder, refuses):
    main(["stats", str(folder / "samples.npz"), str(folder / "stats.npz"), "--features", "pixels"])
    line = refuses(main, "stats", folder / "stats.npz", folder / "again.npz", "--features", "pixels")
    assert "holds statistics already" in line


def test_flags_without_effect_are_refused(folder, refuses):
    for flags, words in (
        (["--inception", "x"], "--inception has no effect with --features pixels"),
        (["--metrics", "fid"], "the distance is called fd"),
        (["--num-samples", 51], "holds 50 images"),
        (["--num-samples", 10, "--errors"], "take 20 samples or more"),
        (["--json", folder], "is a folder"),
        (["--json", folder / "samples.npz" / "numbers.json"], "cannot be written"),
    ):
        assert words in refused(folder, refuses, *flags)


def test_errors_of_statistics_are_refused(folder, refuses):
    main(["stats", str(folder / "samples.npz"), str(folder / "stats.npz"), "--features", "pixels"])
    assert "--errors takes the samples themselves" in refused(folder, refuses, "--errors", samples="stats.npz")


def test_unknown_or_missing_features_are_refused(folder, refuses):
    sides = folder / "reference.npz", folder / "samples.npz"
    assert "--features nothing is unknown" in refuses(main, *sides, "--features", "nothing")
    line = refuses(main, *sides)
    assert "weights-inception-2015-12-05-6726825d.pth" in line
    assert "--inception" in line
    np.savez(folder / "stats.npz", mu=np.zeros(48), sigma=np.eye(48))
    line = refuses(main, folder / "stats.npz", folder / "stats.npz", "--features", "pixels")
    assert "both sides hold statistics alone" in line


def test_statistics_that_cannot_be_written_are_refused_before_the_work(folder, refuses, monkeypatch):
    monkeypatch.setattr(Pixels, "__call__", None)
    for out, words in (("out.npy", "does not end in .npz"), ("samples.npz/out.npz", "cannot be written")):
        assert words in refuses(main, "stats", folder / "reference.npz", folder / out, "--features", "pixels")
    np.savez(folder / "unlabelled.npz", draw(20))
    assert "classes of" in refuses(main, "classifier", folder / "unlabelled.npz", folder / "x.pt")


def test_image_that_is_damaged_leaves_nothing_half_written(folder, refuses):
    (folder / "pictures").mkdir()
    for number, image in enumerate(draw(5)):
        Image.fromarray(image).save(folder / "pictures" / f"{number}.png")
    torn = folder / "pictures" / "3.png"
    torn.write_bytes(torn.read_bytes()[:40])
    assert "3.png" in refused(folder, refuses, samples="pictures")
    assert "3.png" in refuses(main, "stats", folder / "pictures", folder / "stats.npz", "--features", "pixels")
    assert not list(folder.glob("*stats*"))


def test_evaluation_that_is_interrupted_leaves_nothing(folder, monkeypatch):
    """In the second of the two passes: the reference is kept whole, and there are no numbers."""
    original, seen = Pixels.__call__, []

    def interrupt(self, images):
        seen.append(len(images))
        if sum(seen) > 60:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(Pixels, "__call__", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: run(folder, features="pixels"))
    assert stopped.value.code == 130
    assert not list(folder.glob("*numbers*"))
    assert not list((folder / "cache").rglob(".*"))
    monkeypatch.setattr(Pixels, "__call__", original)
    expected = values_of(run(folder, "--cache", folder / "other", features="pixels"))
    assert values_of(run(folder, features="pixels")) == expected
