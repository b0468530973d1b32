"""README.md and docs/ are true: scripts take their commands, the runnable ones run, links lead somewhere."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, TINY
from docs_commands import PAGES, ROOT, Command, all_commands

import train
import train_utils

COMMANDS = all_commands()
TOY = {  # flags after those of the page, which make a command small
    "train.py": ["--max-steps", "4", "--log-every", "2", "--num-workers", "0"],
    "sample.py": ["--num-sampling-steps", "4"],
    "sample_ddp.py": ["--num-fid-samples", "20", "--num-sampling-steps", "4"],
    "evaluate.py": ["--num-samples", "200"],
    "sweep.py": ["--num-samples", "20", "--full-num-samples", "30", "--steps", "4"],
}


class ParsedError(Exception):
    """The arguments were accepted."""


def main_of(target: str):
    module = importlib.import_module(target.removesuffix(".py"))
    return getattr(module, {"train.py": "train", "extract_latents.py": "extract"}.get(target, "main"))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_scripts_take_the_flags_of_the_pages(command, monkeypatch):
    parse = train_utils.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(train_utils.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(ParsedError):
        main_of(command.target)(list(command.argv))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if heading:
            titles = [line.lstrip("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
            assert heading in [anchor_of(title) for title in titles], target


def anchor_of(title: str) -> str:
    """GitHub's name of a heading: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_page_is_read():
    assert {command.page for command in COMMANDS} == {page.name for page in PAGES}


@pytest.mark.slow
def test_runnable_commands_run(tmp_path):
    """The blocks marked runnable, page by page in order, in a folder that has the demo's run."""
    train.train([*TINY, "--run-dir", str(tmp_path / "results" / "demo"), "--max-steps", "4"])
    runnable = [command for command in COMMANDS if command.runnable]
    assert runnable
    for command in runnable:
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def run(command: Command, folder) -> subprocess.CompletedProcess[str]:
    """Run a command at toy size, as a user would in a checkout whose results are in `folder`."""
    toy = list(TOY.get(command.target, []))
    if "--eval-every" in command.argv:
        toy += ["--eval-num", "20"]
    start = [str(ROOT / command.target)] if command.target.endswith(".py") else ["-m", command.target]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PPFLOW_CACHE"] = str(folder / "cache")
    argv = [sys.executable, *start, *command.argv, *toy]
    print(shlex.join(argv))
    return subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
