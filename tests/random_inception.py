"""A file of random weights in the layout of torch-fidelity's public one, for tests without that file."""

from __future__ import annotations

from pathlib import Path

import torch

from metrics.inception import InceptionNetwork


def write_random_inception(path: Path, seed: int = 0) -> Path:
    """Write weights whose features differ from image to image: torch's own initialisation would make them equal."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor for name, tensor in InceptionNetwork().state_dict().items() if "num_batches" not in name}
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.8, 1.25, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        else:
            tensor.normal_(0, 2048**-0.5, generator=generator)
    torch.save(state, path)
    return path
