"""The commands of README.md and docs/: of their fenced blocks, and of the tables of docs/coming-from.md."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = "<!-- runnable -->"  # on the line before a block: docs-check runs it
BLOCK = re.compile(rf"^(?P<mark>{re.escape(RUNNABLE)}\n)?```bash\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command line of this repository.

    Args:
        page:     file that has it
        target:   script ("train.py") or module ("benchmarks.quality")
        argv:     its arguments
        runnable: whether its block is marked so
    """

    page: str
    target: str
    argv: tuple[str, ...]
    runnable: bool = False

    def __str__(self) -> str:
        return f"{self.page}: {self.target} {' '.join(self.argv)}"


def fenced_commands(page: Path) -> Iterator[Command]:
    """Commands of the page's bash blocks, in order; variables that a block sets are put in."""
    for block in BLOCK.finditer(page.read_text()):
        variables: dict[str, str] = {}
        for line in block["text"].replace("\\\n", " ").splitlines():
            if assignment := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
                variables[assignment[1]] = assignment[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            for part in line.split(";"):
                if command := parse_command(page, part, bool(block["mark"])):
                    yield command


def table_commands(page: Path) -> Iterator[Command]:
    """Commands between backticks in the last column of the page's tables."""
    for line in page.read_text().splitlines():
        if line.startswith("| "):
            for code in re.findall(r"`([^`]+)`", line.split(" | ")[-1]):
                if command := parse_command(page, code, runnable=False):
                    yield command


def parse_command(page: Path, text: str, runnable: bool) -> Command | None:
    """The command in a line of shell, None if it is none of this repository's.

    "..." stands for flags that the page has named before, and {a,b} for one of several values.
    """
    text = re.sub(r"\{(\w+)(,\w+)+\}", r"\1", text)
    words = [word for word in shlex.split(text, comments=True) if word != "..."]
    launcher = next((i for i, word in enumerate(words) if word in ("python", "torchrun")), None)
    if launcher is None:
        return None
    words = words[launcher + 1 :]
    start = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), None)
    if start is None or (words[start] == "-m" and not words[start + 1].startswith("benchmarks.")):
        return None
    start += words[start] == "-m"
    return Command(page.name, words[start], tuple(words[start + 1 :]), runnable)


def all_commands() -> list[Command]:
    """Every command of all pages."""
    tables = [page for page in PAGES if page.name == "coming-from.md"]
    fenced = [command for page in PAGES for command in fenced_commands(page)]
    return fenced + [command for page in tables for command in table_commands(page)]
