"""The page without a browser: its settings as link, command and program; its server; drawings and their errors."""

from __future__ import annotations

import base64
import http.client
import io
import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_autoencoders import FACTOR, save_kl
from test_any_size import SIZE, random_weights, save_run

import app
import sample
import train_utils as cli
from experts import ExpertPatchDiT, create_expert
from models import create_model
from page.server import PageServer
from page.settings import MAX_IMAGES, MAX_STEPS, Settings
from pipeline import Pipeline
from runtime.logs import to_uint8
from runtime.rng import Stream, sample_generators
from transport import ODE, Guidance
from weights.pretrained import default_transport

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULT = Settings()
MANY = [
    DEFAULT,
    Settings((3, 1, 4), 7, None, "ODE", "heun2", (4, 6), (1.5, 2.0), (0.4,)),
    Settings((9,), 2**53 - 1, (16, 48), "SDE", "Heun", (30,), (4.0,), (0.1 + 0.2,), "finest"),
    Settings((0, 0), 1, None, "ODE", "dopri5", scales=(1.25,), edges=(0.25, 0.75)),
    Settings((5,), 1, None, "ODE", "ab2", (20,), (-1e-7,), None, "budgets", (1.0, 0.55)),
]


# -- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", MANY)
def test_a_link_tells_the_whole_setting(settings: Settings) -> None:
    assert Settings.from_query(settings.query(), settings) == settings
    other = replace(DEFAULT, classes=(7,), seed=99, scales=(9.0,), steps=(9,), budgets=(0.9,))
    assert Settings.from_query(settings.query(), other) == settings


def test_what_a_link_leaves_out_is_the_default() -> None:
    assert Settings.from_query("", MANY[1]) == MANY[1]
    assert Settings.from_query("seed=3&size=&classes=1%202", MANY[1]) == replace(MANY[1], seed=3, classes=(1, 2))


@pytest.mark.parametrize("settings", MANY)
def test_the_command_asks_sample_py_for_the_same(settings: Settings) -> None:
    python, script, *argv = shlex.split(settings.command(["--ckpt", "a run"]))
    args = cli.parse_mode_first(sample.build_parser(), argv)
    sample.check_flags(sample.build_parser(), args)
    assert (python, script, args.ckpt) == ("python", "sample.py", ["a run"])
    steps = {} if settings.solver.adaptive else {"num_steps": settings.solver.num_steps}
    assert cli.solver_from(args) == replace(settings.solver, **steps)
    assert cli.guidance_from(args) == settings.guidance
    assert (tuple(args.class_labels), args.seed) == (settings.classes, settings.seed)
    assert settings.size == (args.image_size and tuple(args.image_size))
    budgets = settings.show == "budgets"
    assert args.budget == (list(settings.budgets) if budgets else None)
    assert args.level_edges == (list(settings.edges) if settings.edges and not budgets else None)
    assert args.compare_finest == (settings.show == "finest")


BAD = {  # a query, and what the sentence has
    "classes=": f"1 to {MAX_IMAGES} classes",
    "classes=1,x": "'x' is not a whole number",
    "classes=-1": "classes are numbers from 0 on",
    "classes=1.5": "'1.5' is not a whole number",
    "classes=" + "1," * 65: f"1 to {MAX_IMAGES} classes, not 65",
    "classes=10": "the network knows 0 to 9",
    "classes=99999999999999999999": "classes are numbers from 0 on",
    "seed=-1": "the seed is a whole number",
    "seed=": "seed: '' is not a whole number",
    "seed=1&seed=2": "given twice",
    "sed=1": "unknown setting 'sed'",
    "steps=0": "at least one step",
    "steps=": "at least one step",
    "steps=1000000000": f"{MAX_STEPS} or less",
    "steps=1": "1 step(s) cannot cover 2 interval(s)",
    "steps=1,2,3": "3 numbers of steps for 2 level(s)",
    "scales=1,2,3": "3 guidance scale(s) for 2 level(s)",
    "scales=nan": "'nan' is not a number",
    "scales=1e999": "'1e999' is not a number",
    "scales=": "no guidance scale",
    "edges=0.9,0.1": "must ascend",
    "edges=2": "must ascend",
    "edges=0.2,0.4": "give 1 level edge(s)",
    "edges=half": "'half' is not a number",
    "mode=PDE": "mode is one of ODE, SDE",
    "method=Euler": "unknown ODE method 'Euler'",
    "mode=SDE": "unknown SDE method 'ab2'",
    "show=all": "show is one of",
    "size=8": "a height and a width",
    "size=16x16": "knows 8x8 alone",
    "size=9999x9999": "pixels or less",
    "budgets=": "1 to 10 budgets",
}


# -- A server -------------------------------------------------------------------------------------------------------


ERRORS = {"sums": [[part + 3 for part in range(10)], [3.5] * 10], "counts": [[10.0] * 10] * 2}  # equal at t = 0.1


def save_network(folder: Path, elastic: bool) -> Path:
    """A run's folder with a small pyramid of random weights."""
    model = random_weights(create_model("PPF-T-2", **SIZE))
    process = default_transport(model) | {"level_edges": [0.5]}
    more = {"transport": process | {"elastic": 0.5}, "level_errors": ERRORS} if elastic else {"transport": process}
    (folder / "checkpoints").mkdir(parents=True)
    save_run(model, folder / "checkpoints" / "0000007.pt", **more)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("runs") / "elastic", elastic=True)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[PageServer]:
    with app.serve(["--ckpt", str(run), "--port", "0"]) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: PageServer, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def plan(server: PageServer, query: str = "") -> dict[str, Any]:
    status, _, body = get(server, f"/plan?{query}")
    assert (status == 200) == ("error" not in json.loads(body))
    return json.loads(body)


def draw(server: PageServer, query: str) -> list[dict[str, Any]]:
    status, _, body = get(server, f"/draw?{query}")
    assert status == 200
    return [json.loads(line) for line in body.splitlines()]


def pixels(url: str) -> np.ndarray:
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def finished(events: list[dict[str, Any]]) -> np.ndarray:
    """The finished pictures of all ways, (ways, N, H, W)."""
    assert events[-1]["kind"] == "end"
    return np.array([[pixels(url) for url in event["pictures"]] for event in events if event["kind"] == "done"])


def test_the_page_and_its_parts_are_served(server: PageServer) -> None:
    status, headers, body = get(server, "/?seed=3")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    names = [piece.split(b'"')[0].decode() for piece in body.replace(b'src="', b'href="').split(b'href="')[1:]]
    parts = [name for name in names if not name.startswith("data:")]
    assert {Path(name).suffix for name in parts} == {".css", ".js"}
    for name in parts:
        assert get(server, f"/{name}")[0] == 200


@pytest.mark.parametrize("path", ["/page", "/../app.py", "/static/page.js", "/index.html"])
def test_nothing_else_is_served(server: PageServer, path: str) -> None:
    assert get(server, path)[0] == 404


def test_strangers_are_refused(server: PageServer) -> None:
    assert get(server, "/plan", Host="evil.example")[0] == 403  # a name that was made to lead here
    assert get(server, "/plan", Host="localhost:9999")[0] == 200  # a forwarded port
    assert get(server, "/draw", **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert server.server_address[0] == "127.0.0.1"


def test_the_plan_counts_what_the_levels_cost(server: PageServer, run: Path) -> None:
    """50 steps of ab2, guided where the scale is not 1; multiply-accumulates are those of the network."""
    model = Pipeline.load(run).model
    coarse, fine = model.macs(0) / 1e9, model.macs(1) / 1e9
    planned = plan(server, "edges=0.4&scales=1,2")
    assert planned["pyramid"]["evaluations"] == [20, 60]
    assert planned["pyramid"]["gmacs"] == pytest.approx(20 * coarse + 60 * fine)
    assert planned["finest"]["evaluations"] == [0, 100]
    assert planned["finest"]["gmacs"] == pytest.approx(100 * fine)
    assert planned["settings"]["edges"] == planned["edges"] == [0.4]
    assert planned["not_trained"] == []
    assert plan(server, "method=dopri5")["pyramid"] is None


@pytest.mark.parametrize("query", BAD)
def test_bad_input_is_a_sentence(server: PageServer, query: str) -> None:
    assert BAD[query] in plan(server, query)["error"]
    events = draw(server, query)
    assert [event["kind"] for event in events] == ["error"]
    assert BAD[query] in events[0]["error"]


@pytest.mark.slow
def test_budgets_that_cannot_be_are_refused_before_anything_is_drawn(server: PageServer) -> None:
    for query, sentence in {
        "budgets=1,0.01": "a budget is a share",
        "budgets=2,0.5": "a budget is a share",
        "steps=4,4": "one number",
        "method=dopri5": "a method of fixed steps",
    }.items():
        (event,) = draw(server, f"show=budgets&{query}")
        assert sentence in event["error"]


def test_a_diverging_drawing_is_a_sentence(server: PageServer) -> None:
    events = draw(server, "scales=1e38&steps=4&classes=1")
    assert "not finite" in events[-1]["error"]


def test_a_failure_inside_is_told_too(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(server.studio, "timed", fail)
    assert "RuntimeError" in draw(server, "steps=4")[-1]["error"]
    assert "inside" in capsys.readouterr().err


# -- Drawings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "classes=3,1&steps=6&scales=1.5,2&edges=0.3&seed=5",
        "classes=4&steps=3,4&scales=1.5,2&show=finest",
        pytest.param("classes=4,2&steps=8&show=budgets&budgets=1,0.6,0.3", marks=pytest.mark.slow),
        pytest.param("classes=1&mode=SDE&method=Euler&steps=9&scales=2", marks=pytest.mark.slow),
        pytest.param("classes=1&method=bosh3&scales=1", marks=pytest.mark.slow),
    ],
)
def test_command_and_program_draw_the_pages_pictures(
    server: PageServer, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, planned = finished(draw(server, query)), plan(server, query)
    saved = []
    monkeypatch.setattr(sample, "save_grid", lambda images, *_: saved.append(to_uint8(images).numpy()[:, 0]))
    monkeypatch.chdir(tmp_path)
    sample.main(shlex.split(planned["command"])[2:])
    ways = 1 if "finest" in query else len(drawn)  # sample.py does not save the finest level's pictures
    np.testing.assert_array_equal(saved[0], np.concatenate(drawn[:ways]))
    names: dict[str, Any] = {}
    exec(planned["python"], names)
    programs = names["images"] if isinstance(names["images"], list) else [names["images"]]
    programs += [names["finest"]] if "finest" in query else []
    np.testing.assert_array_equal([to_uint8(images).numpy()[:, 0] for images in programs], drawn)


def test_costs_are_those_of_sample_py(server: PageServer, run: Path) -> None:
    (done,) = [event for event in draw(server, "classes=1,2&edges=0.3&steps=10&scales=2") if event["kind"] == "done"]
    counted = Pipeline.load(run, level_edges=[0.3]).counted()
    settings = Settings((1, 2), steps=(10,), scales=(2.0,))
    counted.latents(settings.classes, settings.solver, settings.guidance)
    assert done["cost"]["nfe"] == counted.model.nfe(2) == 20
    assert done["cost"]["gmacs"] == pytest.approx(counted.model.gmacs(2))
    assert done["cost"]["evaluations"] == [6, 14]
    assert done["cost"]["seconds"] > 0


@torch.no_grad()
def test_the_first_picture_is_the_guess_from_noise(server: PageServer, run: Path) -> None:
    """At t = 0 on the Linear path x_1 = x_0 + v, guided: v = null + s (conditional - null)."""
    first = next(event for event in draw(server, "classes=3,1&scales=2&steps=10&seed=4") if "pictures" in event)
    pipe = Pipeline.load(run)
    pipe.model.eval()
    generators = sample_generators(4, range(2), Stream.SAMPLES)
    x0 = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators])
    conditional, null = (pipe.model(x0, torch.zeros(2), torch.tensor(y), 0) for y in ([3, 1], [10, 10]))
    guess = to_uint8(x0 + null + 2 * (conditional - null)).numpy()[:, 0].astype(int)
    assert (first["t"], first["level"]) == (0, 0)
    assert np.abs(np.array([pixels(url) for url in first["pictures"]]) - guess).max() <= 1


def test_pictures_come_every_tenth_of_t(server: PageServer) -> None:
    events = draw(server, "classes=1&steps=50&edges=0.31")
    steps = [event for event in events if event["kind"] == "step"]
    assert len(steps) == 50
    shown = [event["t"] for event in steps if "pictures" in event]
    assert len(shown) == 10
    assert all(part / 10 - 1e-6 <= t < part / 10 + 0.021 for part, t in enumerate(shown))
    assert all(event["level"] == (event["t"] > 0.309) for event in steps)


def test_two_at_once_get_their_own_pictures(server: PageServer) -> None:
    queries = [
        f"classes={label},{label}&seed={label}&steps=12&show={show}" for label, show in enumerate(["finest"] * 3)
    ]
    alone = [finished(draw(server, query)) for query in queries]
    with ThreadPoolExecutor(len(queries)) as people:
        together = [finished(events) for events in people.map(lambda query: draw(server, query), queries)]
    np.testing.assert_array_equal(together, alone)
    assert len({images.tobytes() for images in alone}) == len(queries)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_closing_the_connection_cancels_the_drawing(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made, timed = [], server.studio.timed

    def slow(*args: Any) -> Any:
        made.append(1)
        time.sleep(0.01)
        return timed(*args)

    monkeypatch.setattr(server.studio, "timed", slow)
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    connection.request("GET", "/draw?classes=1&steps=1000")
    answer = connection.getresponse()
    for _ in range(3):
        assert answer.readline()
    assert len(server.drawings) == 1
    connection.close()
    answer.close()
    assert eventually(lambda: not server.drawings)
    assert len(made) < 500
    assert finished(draw(server, "classes=1&steps=4")).shape == (1, 1, 8, 8)


@pytest.mark.slow
def test_closing_the_server_cancels_drawings(run: Path) -> None:
    with app.serve(["--ckpt", str(run), "--port", "0"]) as server, ThreadPoolExecutor(2) as threads:
        threads.submit(server.serve_forever)
        drawing = threads.submit(get, server, "/draw?steps=1000")
        assert eventually(lambda: len(server.drawings) == 1)
        server.shutdown()
        server.server_close()
        assert eventually(lambda: not server.drawings)
        assert len(drawing.result()[2].splitlines()) < 1000


# -- Other networks, and the command --------------------------------------------------------------------------------


def test_a_network_without_elastic_levels(tmp_path: Path) -> None:
    with app.serve(["--ckpt", str(save_network(tmp_path / "plain", elastic=False)), "--port", "0"]) as server:
        assert not server.about["elastic"]
        with pytest.raises(ValueError, match="--elastic"):
            server.plan("show=budgets")
        assert server.plan("edges=0.7")["not_trained"] == [(0, 0.5, 0.7)]
        assert server.plan("show=finest")["finest_from"] == 0.5


@pytest.mark.slow
def test_a_network_of_any_size(tmp_path: Path) -> None:
    model = random_weights(create_model("PPFiT-T-3", **{**SIZE, "input_size": 16}))
    ckpt = save_run(model, tmp_path / "a.pt")
    with app.serve(["--ckpt", str(ckpt), "--image-size", "16", "24", "--port", "0"]) as server:
        assert server.about["any_size"]
        assert server.about["edges"] == (0.5, 0.75)
        opened = server.plan("")
        assert opened["settings"]["size"] == (16, 24)
        assert opened["pyramid"]["evaluations"] == [50, 26, 24]
        assert shlex.split(opened["command"]).count("--image-size") == 1
        drawn = events_of(server, "classes=1,2&size=8x16&steps=6&seed=2")
        how = ODE(num_steps=6), Guidance(1.5)
        expected = Pipeline.load(ckpt).images([1, 2], *how, seed=2, size=(8, 16))
        np.testing.assert_array_equal(finished(drawn)[0], to_uint8(expected)[:, 0])
        assert drawn[-2]["cost"]["gmacs"] < opened["pyramid"]["gmacs"]
        with pytest.raises(ValueError, match="nearest size"):
            server.plan("size=9x9")


def events_of(server: PageServer, query: str) -> list[dict[str, Any]]:
    """A drawing without a connection."""
    events: list[dict[str, Any]] = []
    server.studio.draw(Settings.from_query(query, server.default), events.append)
    return [*events, {"kind": "end"}]


@pytest.mark.slow
def test_latents_are_decoded(tmp_path: Path) -> None:
    model = random_weights(create_model("PPF-T-2", **{**SIZE, "in_channels": 4}))
    vae = save_kl(tmp_path / "vae")
    ckpt = save_run(model, tmp_path / "a.pt", vae=str(vae))
    with app.serve(["--ckpt", str(ckpt), "--port", "0"]) as server:
        assert server.about["factor"] == FACTOR
        assert server.default.scales == (4.0, 4.0)
        images = finished(events_of(server, "classes=1&steps=4&scales=1"))
        expected = Pipeline.load(ckpt).images([1], ODE(num_steps=4))
        np.testing.assert_array_equal(images[0], to_uint8(expected).permute(0, 2, 3, 1))
        assert images.shape == (1, 1, 16, 16, 3)


@pytest.mark.slow
def test_experts_have_no_finest_level_for_all_times(tmp_path: Path) -> None:
    experts = ExpertPatchDiT([create_expert("PPF-T-2", range(level, level + 1), **SIZE) for level in range(2)], (0.5,))
    ckpt = save_run(random_weights(experts), tmp_path / "a.pt")
    with app.serve(["--ckpt", str(ckpt), "--port", "0"]) as server:
        assert server.about["fixed"] == [0]
        assert server.plan("")["finest"] is None
        assert finished(events_of(server, "classes=1&steps=4")).shape == (1, 1, 8, 8)
        for query, sentence in {"edges=0.4": "another expert takes over", "show=finest": "experts share them"}.items():
            with pytest.raises(ValueError, match=sentence):
                events_of(server, query)


@pytest.mark.slow
def test_flags_that_name_the_network_are_told(run: Path) -> None:
    flags = ["--ckpt", str(run), "--num-classes", "10", "--sample-eps", "0.01", "--precision", "bf16"]
    with app.serve([*flags, "--port", "0"]) as server:
        told = server.plan("steps=4&classes=1")
        args = cli.parse_mode_first(sample.build_parser(), shlex.split(told["command"])[2:])
        assert (args.ckpt, args.num_classes, args.sample_eps, args.precision) == ([str(run)], 10, 0.01, "bf16")
        drawn = finished(events_of(server, "steps=4&classes=1"))
    names: dict[str, Any] = {}
    exec(told["python"], names)
    assert names["pipe"].transport.sample_eps == 0.01
    np.testing.assert_array_equal(to_uint8(names["images"]).numpy(), drawn[0][None])


def test_trouble_at_the_start_is_one_line(
    run: Path, server: PageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run `make demo` first, or give --ckpt" in refuses(app.main)
    assert "nowhere" in refuses(app.main, "--ckpt", "nowhere")
    assert "already in use; give another --port" in refuses(app.main, "--ckpt", run, "--port", server.server_address[1])
    assert "--port" in refuses(app.main, "--port", "70000")


@pytest.mark.slow
def test_without_flags_it_opens_the_demos_network(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "demo").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PageServer, "serve_forever", lambda server: None)
    app.main(["--port", "0"])
    assert "open http://127.0.0.1:" in capsys.readouterr().out
