"""from_pretrained, save_pretrained and push_to_hub."""

import argparse
import copy
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import hub_mixin
from published import inputs, same_weights, tiny
from safetensors.torch import load_file, save_file

from models import PyramidalPatchDiT
from weights.pretrained import default_transport, load_pretrained

ODD = {"input_size": (8, 12), "patch_sizes": ((4, 3), (2, 3)), "mlp_ratio": 2.5, "in_channels": 3, "learn_sigma": False}


@torch.no_grad()
def test_a_saved_folder_restores_the_model(tmp_path):
    model = tiny(2, **ODD)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == model.config
    for again in (PyramidalPatchDiT.from_pretrained(tmp_path), load_pretrained(tmp_path).model):
        assert again.config == model.config
        assert not again.training
        x_t_y = inputs(channels=3, size=(8, 12))
        for level in range(2):
            assert torch.equal(again(*x_t_y, level=level), model(*x_t_y, level=level))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["blocks.1.mlp.fc1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        PyramidalPatchDiT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.bias is missing"):
        load_pretrained(tmp_path)


def test_a_saved_folder_can_tell_its_process(tmp_path):
    model = tiny(2)
    transport = {**default_transport(model), "prediction": "noise", "level_edges": [0.4]}
    model.save_pretrained(tmp_path, config={**model.config, "transport": transport, "vae": "some/vae"})
    found = load_pretrained(tmp_path)
    assert (found.transport, found.vae) == (transport, "some/vae")
    assert PyramidalPatchDiT.from_pretrained(tmp_path).config == model.config


@torch.no_grad()
def test_the_model_card(tmp_path):
    model = tiny(2)
    model.save_pretrained(tmp_path / "a", model_card_kwargs={"repo_id": "someone/model"})
    card = (tmp_path / "a" / "README.md").read_text()
    for text in (
        "license: mit",
        "library_name: ppflow",
        "- arxiv:2506.23543",
        "- arxiv:2401.08740",
        "# someone/model",
        "arxiv.org/abs/2506.23543",
        "Patches 4x4, 2x2 (coarsest first) on 4x16x16 inputs",
    ):
        assert text in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {}
    exec(snippet.replace("someone/model", str(tmp_path / "a")).replace("num_steps=50", "num_steps=2"), names)
    assert names["x1"].shape == (1, 4, 16, 16)


def test_push_to_hub_sends_the_folder(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None) -> None: ...

        def create_repo(self, repo_id, **kwargs):
            return argparse.Namespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **kwargs):
            sent[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    tiny(2).push_to_hub("someone/model")
    assert sent == {"someone/model": ["README.md", "config.json", "model.safetensors"]}


def test_the_saved_config_is_plain_whatever_was_passed(tmp_path):
    model = PyramidalPatchDiT((np.int64(8), 8), (4, (2, np.int32(2))), 3, 32, 1, 2, num_classes=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == model.config
    assert (config["input_size"], config["patch_sizes"], config["num_classes"]) == ([8, 8], [[4, 4], [2, 2]], 3)
    assert PyramidalPatchDiT.from_pretrained(tmp_path).config == config


def test_models_are_copied_and_pickled():
    model = tiny(2, **ODD)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), PyramidalPatchDiT(**model.config)):
        assert again.config == model.config == again._hub_mixin_config
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert same_weights(torch.load(buffer, weights_only=False).state_dict(), model.state_dict())
