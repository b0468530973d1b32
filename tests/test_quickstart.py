"""quickstart.ipynb: its cells are code, without outputs in git, and run from top to bottom in a fresh checkout."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from conftest import ENVIRONMENT, ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from models import create_model

NOTEBOOK = ROOT / "quickstart.ipynb"
TRAINING = "--max-steps 1000"
PICTURES = {"loss", "samples", "walk", "errors", "budgets", "recognise"}  # cells that end with one


def read() -> nbformat.NotebookNode:
    """The notebook, which is one of version 4."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_cells_are_code_without_outputs() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    for cell in cells:
        ast.parse(TransformerManager().transform_cell(cell.source))
        assert (cell.outputs, cell.execution_count, dict(cell.metadata)) == ([], None, {})
    assert sum(TRAINING in cell.source for cell in cells) == 1


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that has the repository's files and no results; training is shorter."""
    for path in ROOT.iterdir():
        if path.name not in ("results", ".git"):
            (tmp_path / path.name).symlink_to(path)
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = read()
    for cell in notebook.cells:
        cell.source = cell.source.replace(TRAINING, "--max-steps 40")
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    said = {name: "".join(each.get("text", "") for each in outputs[name]) for name in outputs}
    model = create_model("PPF-T-2", input_size=8, in_channels=1, num_classes=10)
    assert "done: 40 steps" in said["train"]
    assert f"{model.num_parameters / 1e6:.1f} million parameters" in "".join(cell.source for cell in notebook.cells)
    for level in range(2):
        assert f"{model.num_tokens(level)} tokens, {model.macs(level) / 1e6:.1f} million" in said["levels"]
    assert "as above: True" in said["walk"]
    assert said["budgets"].count("budget ") == 5
    assert "bits per pixel; 4.09" in said["likelihood"]
    assert {name for name in outputs if any("image/png" in each.get("data", {}) for each in outputs[name])} == PICTURES
