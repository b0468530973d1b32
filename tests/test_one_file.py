"""weights/diffusers/one_file.py: modules put together keep their meaning, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from weights.diffusers.one_file import one_file


def write(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_modules_become_one_file(tmp_path: Path) -> None:
    write(
        tmp_path,
        base='"""Base."""\n\nfrom __future__ import annotations\n\nimport math\n\nTWO = math.sqrt(4)  # a comment\n',
        middle="import math\n\nfrom base import TWO\n\nFOUR = TWO * math.sqrt(4)\n",
        top="import math\nfrom base import (\n    TWO,\n)\nfrom middle import FOUR\n\n\nEIGHT = TWO * FOUR\n",
    )
    text = one_file("top", tmp_path)
    values: dict = {}
    exec(compile(text, "text", "exec"), values)
    assert values["EIGHT"] == 8
    assert text.index("a comment") < text.index("FOUR =") < text.index("EIGHT =")
    assert text.count("TWO = ") == 1
    write(tmp_path, alone=text)
    assert one_file("alone", tmp_path) == text


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ("from base import TWO\nimport json as math\n", "math means one thing in base and another in top"),
        ("from base import TWO\n\n\ndef helper():\n    pass\n", "helper means one thing in base and another in top"),
        ("from base import TWO\n\nsum = TWO\n", "sum means one thing in Python and another in top"),
        ("from base import TWO as DEUX\n", "line 1 of top is no plain `from base import names` at the top level"),
        ("import base\n", "line 1 of top is no plain"),
        ("def f():\n    from base import TWO\n    return TWO\n", "line 2 of top is no plain"),
    ],
)
def test_modules_that_would_change_their_meaning_are_refused(top: str, words: str, tmp_path: Path) -> None:
    write(tmp_path, base="import math\n\nTWO = math.sqrt(4)\n\n\ndef helper():\n    pass\n", top=top)
    with pytest.raises(ValueError, match=words):
        one_file("top", tmp_path)
