"""Files that are read and refused, downloads from a local server, the command line."""

import argparse
import hashlib
import http.server
import io
import itertools
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from published import HEADS, check_levels, published_weights, same_weights, saved
from safetensors.torch import save_file

import download
from models import PyramidalPatchDiT, create_model
from weights.layouts import export_state_dict
from weights.pretrained import convert, load_pretrained
from weights.published import PUBLISHED, Published

# -- Files that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, 0.99])
def test_a_truncated_file_is_refused(suffix, kept, tmp_path):
    path, weights = tmp_path / f"a{suffix}", published_weights(2)
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    size = int(kept * path.stat().st_size) if isinstance(kept, float) else kept
    with open(path, "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=rf"cannot read .*a{suffix} \({size:,} bytes\), is it truncated") as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"encoder.weight": torch.zeros(2)}, r"has no known layout .*begins with encoder\.weight"),
        ({}, "has no known layout .*begins with nothing"),
        ({"epoch": 3}, "epoch is a int, not a tensor"),
        ([torch.zeros(2)], "holds a list, not a dict"),
        ({"x_embedder.0.weight": torch.zeros(2, 2)}, "holds our weights without their config"),
    ],
    ids=["unknown", "empty", "no tensors", "no dict", "no config"],
)
def test_other_files_are_refused(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved(content, tmp_path / "a.pt"))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content", [Malicious(), {"args": Malicious()}, {"args": argparse.ArgumentParser}])
def test_code_is_never_unpickled(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a\.pt holds \S+, not only tensors and plain data: it is not opened$"):
        load_pretrained(saved(content, tmp_path / "a.pt"))
    assert not (tmp_path / "pwned").exists()
    path = tmp_path / "b.pt"
    path.write_bytes(pickle.dumps(content, protocol=2))  # nor outside an archive
    with pytest.raises(ValueError, match=r"b\.pt"):
        load_pretrained(path)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(pickle.UnpicklingError):  # a Namespace is allowed while a file is read, and not afterwards
        torch.load(saved(argparse.Namespace(), tmp_path / "c.pt"), weights_only=True)


@pytest.mark.parametrize("name", ["PPF-XL-9", "nowhere/model.pt", "PPF-B-2", "SiT-XL/4", ""])
def test_an_unknown_name_is_answered_with_the_names_there_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "neither a file nor the name of published weights (PPF-XL-2, PPF-XL-3, SiT-XL/2, FiT-XL/2, FiTv2-XL/2,"
    if name:
        with pytest.raises(FileNotFoundError, match=re.escape(f"{name} is {message}")):
            load_pretrained(name, cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        download.download(name, cache_dir=tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither checkpoints/"):
        load_pretrained(tmp_path)


# -- Our own files -----------------------------------------------------------------------------------------------


def test_a_run_stands_for_its_newest_checkpoint(tiny_run):
    checkpoint = torch.load(tiny_run / "checkpoints" / "0000020.pt", weights_only=True)
    pretrained = load_pretrained(tiny_run)
    assert same_weights(pretrained.model.state_dict(), checkpoint["ema"])
    assert same_weights(load_pretrained(tiny_run, weights="model").model.state_dict(), checkpoint["model"])
    assert not same_weights(checkpoint["ema"], checkpoint["model"])
    assert pretrained.model.config == checkpoint["config"]["model"]
    assert pretrained.transport == checkpoint["config"]["transport"]
    assert (pretrained.name, pretrained.step, pretrained.vae) == ("PPF-T-2", 20, "none")
    assert load_pretrained(tiny_run / "checkpoints" / "0000010.pt").step == 10


# -- Converting from the command line -----------------------------------------------------------------------------


def test_convert_from_the_command_line(tmp_path, capsys, refuses):
    given, out = saved(published_weights(2), tmp_path / "a.pt"), tmp_path / "b.safetensors"
    download.main(["convert", str(given), str(out), "--layout", "ours", "--num-heads", str(HEADS)])
    assert "4x4+2x2" in capsys.readouterr().out
    check_levels(load_pretrained(out).model, published_weights(2))
    model = load_pretrained(out).model
    config = {"model": model.config, "transport": {"path_type": "VP"}}
    vp = saved({"ema": model.state_dict(), "config": config}, tmp_path / "vp.pt")
    download.main(["convert", str(vp), str(tmp_path / "c.pt"), "--layout", "ppflow"])
    assert "note: that layout has no place for path_type VP: give it to" in capsys.readouterr().out
    assert "has no model with 4x4, 2x2" in refuses(
        download.main, "convert", given, tmp_path / "c.pt", "--layout", "sit"
    )
    assert "neither in .pt nor" in refuses(download.main, "convert", given, tmp_path / "c.bin", "--layout", "ppflow")
    assert "is neither a file" in refuses(download.main, "convert", "nowhere", tmp_path / "c.pt", "--layout", "sit")
    assert "--layout" in refuses(download.main, "convert", given, out)
    assert "unrecognized" in refuses(download.main, "convert", given, out, "--layout", "ours", "--head", 4)
    assert "is neither a file" in refuses(download.main, "PPF-XXL")


# -- Downloads ---------------------------------------------------------------------------------------------------


class Server:
    """Serves `content`; tests set the faults."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.ranges: list[str | None] = []  # of the requests so far
        self.cuts: list[int] = []  # bytes after which the next replies end
        self.understands_ranges = True
        self.answer: tuple[int, str] | None = None  # status and type of a page instead
        self.claims = 0  # bytes of the length that are not there
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                server.ranges.append(wanted)
                if server.answer:
                    self.send_response(server.answer[0])
                    self.send_header("Content-Type", server.answer[1])
                    self.send_header("Content-Length", "4")
                    self.end_headers()
                    self.wfile.write(b"page")
                    return
                start, total = 0, len(server.content) + server.claims
                if wanted and server.understands_ranges:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(server.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{total}")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                self.send_header("Content-Length", str(total - start))
                self.end_headers()
                body = server.content[start:]
                self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)
                self.close_connection = True

            def log_message(self, *args) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/PPF-T-2.pt"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(scope="module")
def published_model() -> PyramidalPatchDiT:
    torch.manual_seed(0)
    return create_model("PPF-T-2").eval()


@pytest.fixture(scope="module")
def published_file(published_model) -> bytes:
    buffer = io.BytesIO()
    torch.save(export_state_dict(published_model, "ppflow"), buffer)
    return buffer.getvalue()


@pytest.fixture
def server(published_file, tmp_path, monkeypatch):
    server = Server(published_file)
    monkeypatch.setitem(PUBLISHED, "PPF-T-2", Published("PPF-T-2.pt", server.url))
    monkeypatch.setenv("PPFLOW_CACHE", str(tmp_path / "cache"))
    yield server
    server.stop()


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("*") if path.suffix != ".lock")


COMPLETE = ["PPF-T-2.pt", "PPF-T-2.pt.sha256"]


def test_a_name_is_downloaded_once(server, published_model, tmp_path, capsys):
    for name in ("PPFlow_T_2", "PPF-T-2.pt", "PPF-T-2"):
        pretrained = load_pretrained(name)
        assert same_weights(pretrained.model.state_dict(), published_model.state_dict())
        assert pretrained.name == "PPF-T-2"
        assert pretrained.model.config == published_model.config
    assert server.ranges == [None]
    assert cached(tmp_path) == COMPLETE
    assert "PPF-T-2: 100%" in capsys.readouterr().err
    assert os.system(f"cd {tmp_path}/cache && sha256sum --quiet --check PPF-T-2.pt.sha256") == 0
    load_pretrained("PPF-T-2", cache_dir=tmp_path / "other")
    assert (tmp_path / "other" / "PPF-T-2.pt").is_file()
    assert len(server.ranges) == 2


def test_a_cut_download_goes_on_by_itself(server, published_file, tmp_path):
    server.cuts = [1000, 0xFFFFF, 3_000_000]
    path = download.download("PPF-T-2")
    assert path.read_bytes() == published_file
    starts = list(itertools.accumulate([1000, 0xFFFFF, 3_000_000]))
    assert server.ranges == [None, *(f"bytes={start}-" for start in starts)]
    assert cached(tmp_path) == COMPLETE


def test_a_download_goes_on_in_the_next_run(server, published_file, tmp_path):
    server.cuts = [5000, 0]
    with pytest.raises(ConnectionError) as error:
        download.download("PPF-T-2")
    assert f"cannot fetch PPF-T-2 from {server.url}: the connection ended after 5,000 of" in str(error.value)
    assert "5,000 bytes are kept and the next attempt goes on from there" in str(error.value)
    assert cached(tmp_path) == ["PPF-T-2.pt.part"]
    assert download.download("PPF-T-2").read_bytes() == published_file
    assert server.ranges == [None, "bytes=5000-", "bytes=5000-"]
    assert cached(tmp_path) == COMPLETE


def test_a_server_without_ranges_sends_the_file_again(server, published_file):
    server.understands_ranges, server.cuts = False, [5000]
    assert download.download("PPF-T-2").read_bytes() == published_file
    assert server.ranges == [None, "bytes=5000-"]


@pytest.mark.parametrize("extra", [0, 10])
def test_a_part_that_is_complete_or_too_long(server, published_file, extra, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "PPF-T-2.pt.part").write_bytes(published_file + b"x" * extra)
    assert download.download("PPF-T-2").read_bytes() == published_file
    assert len(server.ranges) == (2 if extra else 1)
    assert cached(tmp_path) == COMPLETE


def test_a_file_shorter_than_announced_is_not_kept_as_complete(server, tmp_path):
    server.claims = 100
    with pytest.raises(ConnectionError, match="does not continue the part of an earlier attempt, which is deleted"):
        download.download("PPF-T-2")
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "text/plain"), "HTTP 404 Not Found"),
        ((200, "text/html; charset=utf-8"), "the address answers with a web page, not with the file"),
        ((206, "text/plain"), "the server does not say which part of how long a file it sends"),
    ],
)
def test_other_answers_are_told(server, answer, message, tmp_path):
    server.answer = answer
    with pytest.raises(ConnectionError, match=f"cannot fetch PPF-T-2 from {server.url}: {message}"):
        load_pretrained("PPF-T-2")
    assert cached(tmp_path) == []


def test_without_network_one_line_says_what_to_do(server, refuses, tmp_path):
    server.stop()
    line = refuses(download.main, "PPF-T-2")
    assert f"cannot fetch PPF-T-2 from {server.url}: [Errno 111] Connection refused. Or download it elsewhere" in line
    assert "and give the file's path instead of the name" in line
    assert cached(tmp_path) == []


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def with_tensor(name: str, change) -> bytes:
    weights = export_state_dict(create_model("PPF-T-2"), "ppflow")
    weights[name] = change(weights[name]).clone()
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda file: file[:-1000], "is it truncated"),
        (damaged, "/data/.* is damaged"),
        (
            lambda _: with_tensor("blocks.3.mlp.fc1.bias", lambda x: x[:-1]),
            r"blocks\.3\.mlp\.fc1\.bias is \(511,\), not",
        ),
        (
            lambda _: with_tensor("y_embedder.embedding_table.weight", lambda x: x[:-1]),
            "y_embedder.embedding_table.weight",
        ),
        (lambda _: b"not found", "cannot read"),
    ],
    ids=["truncated", "damaged", "shape", "classes", "text"],
)
def test_a_file_that_is_not_the_model_never_gets_its_name(server, published_file, content, message, tmp_path):
    server.content = content(published_file)
    with pytest.raises(ValueError, match=rf"{server.url} did not give the weights of PPF-T-2: .*{message}"):
        load_pretrained("PPF-T-2")
    assert cached(tmp_path) == []
    server.content = published_file
    assert load_pretrained("PPF-T-2").name == "PPF-T-2"


def test_a_cached_file_that_changed_is_refused(server, published_file, tmp_path):
    path = download.download("PPF-T-2")
    path.write_bytes(damaged(published_file))
    download.download("PPF-T-2")  # the size is right
    with pytest.raises(ValueError, match=r"PPF-T-2\.pt is not what was downloaded: delete it"):
        download.download("PPF-T-2", verify=True)
    path.write_bytes(published_file[:-1])
    with pytest.raises(ValueError, match=r"PPF-T-2\.pt is not what was downloaded: delete it"):
        load_pretrained("PPF-T-2")
    path.unlink()
    assert download.download("PPF-T-2", verify=True).read_bytes() == published_file
    (tmp_path / "cache" / "PPF-T-2.pt.sha256").unlink()  # put there by hand
    assert download.download("PPF-T-2", verify=True) == path
    assert len(server.ranges) == 2


def test_a_digest_that_is_known_is_checked_before_the_file_gets_its_name(
    server, published_file, tmp_path, monkeypatch, capsys
):
    digest = hashlib.sha256(published_file).hexdigest()
    monkeypatch.setitem(PUBLISHED, "PPF-T-2", Published("PPF-T-2.pt", server.url, sha256="0" * 64))
    with pytest.raises(ValueError, match=f"did not give the weights of PPF-T-2: .* is {digest}, not 000"):
        download.download("PPF-T-2")
    assert cached(tmp_path) == []
    monkeypatch.setitem(PUBLISHED, "PPF-T-2", Published("PPF-T-2.pt", server.url, sha256=digest))
    capsys.readouterr()
    path = download.download("PPF-T-2")
    assert f"PPF-T-2: sha256 {digest}" in capsys.readouterr().err
    (tmp_path / "cache" / "PPF-T-2.pt.sha256").unlink()  # put there by hand
    path.write_bytes(damaged(published_file))
    with pytest.raises(ValueError, match=r"PPF-T-2\.pt is not what was downloaded: delete it"):
        download.download("PPF-T-2", verify=True)


def test_a_damaged_record_is_named(server, tmp_path, refuses):
    download.download("PPF-T-2")
    (tmp_path / "cache" / "PPF-T-2.pt.sha256").write_text("")
    assert "PPF-T-2.pt.sha256 is damaged: delete it" in refuses(download.main, "PPF-T-2")


@pytest.mark.parametrize("folder", ["/dev/null/cache", "/proc/cache", "~nobody-of-this-name/cache"])
def test_a_cache_that_cannot_be_written_is_one_line(folder, server, monkeypatch, refuses):
    monkeypatch.setenv("PPFLOW_CACHE", folder)
    assert "set PPFLOW_CACHE to a" in refuses(download.main, "PPF-T-2")
    assert server.ranges == []


def test_a_home_that_is_nobodys_is_one_line(tmp_path, refuses):
    assert "~nobody-of-this-name/a.pt" in refuses(
        download.main, "convert", "~nobody-of-this-name/a.pt", tmp_path / "b.pt", "--layout", "ours"
    )


def test_processes_that_ask_together_fetch_once(server, published_file):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(download.download("PPF-T-2"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.ranges == [None]
    assert [path.read_bytes() == published_file for path in paths] == [True] * 4


def test_download_from_the_command_line(server, capsys, tmp_path):
    download.main(["ppflow-t-2"])
    assert f"PPF-T-2: {tmp_path}/cache/PPF-T-2.pt (" in capsys.readouterr().out
    download.main(["PPF-T-2", "--verify"])
    assert server.ranges == [None]
    convert("PPF-T-2", tmp_path / "ours.safetensors", "ours")
    assert load_pretrained(tmp_path / "ours.safetensors").name == "PPF-T-2"


def test_without_names_everything_is_downloaded(server, monkeypatch, capsys):
    for name in [name for name in PUBLISHED if name != "PPF-T-2"]:
        monkeypatch.delitem(PUBLISHED, name)
    download.main([])
    assert capsys.readouterr().out.startswith("PPF-T-2: ")
