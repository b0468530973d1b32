"""The registry of models: names, and the arguments of PyramidalPatchDiT that they stand for."""

from __future__ import annotations

import re
from typing import Any

SIZES = {
    "T": {"depth": 6, "hidden_size": 128, "num_heads": 4},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}

# The pyramids of the paper, and SiT's single levels.
PATCH_SIZES = {
    "PPF-{}-2": ((4, 4), (2, 2)),
    "PPF-{}-3": ((4, 4), (2, 4), (2, 2)),
    "SiT-{}/2": ((2, 2),),
    "SiT-{}/4": ((4, 4),),
    "SiT-{}/8": ((8, 8),),
}

# The same for pixels, named after the finest patch: 16 for 256x256 images and 32 for 512x512, 256 tokens in both.
PIXEL_PATCH_SIZES = {
    "PPF-{}-2/16": ((32, 32), (16, 16)),
    "PPF-{}-3/16": ((32, 32), (16, 32), (16, 16)),
    "PPF-{}-2/32": ((64, 64), (32, 32)),
    "PPF-{}-3/32": ((64, 64), (32, 64), (32, 32)),
    "SiT-{}/16": ((16, 16),),
    "SiT-{}/32": ((32, 32),),
}

MODELS: dict[str, dict[str, Any]] = {
    name.format(size): {"patch_sizes": patch_sizes, **fields}
    for size, fields in SIZES.items()
    for name, patch_sizes in PATCH_SIZES.items()
    if size != "T" or patch_sizes[-1] == (2, 2)  # the tiny size is for images of few tokens
}
MODELS |= {
    name.format(size): {
        "patch_sizes": patch_sizes,
        **SIZES[size],
        "input_size": 16 * patch_sizes[-1][0],
        "in_channels": 3,
        "learn_sigma": False,
    }
    for size in ("B", "L")
    for name, patch_sizes in PIXEL_PATCH_SIZES.items()
}

# Any size and aspect ratio: FiT (arXiv:2402.12376), FiTv2 (arXiv:2410.13925), and pyramids of FiTv2's block.
FIT = {"position": "rope", "mlp": "swiglu", "patch_sizes": ((2, 2),), "time_input": "ddpm"}
MODELS |= {f"FiT-{size}/2": {**FIT, **SIZES[size]} for size in ("B", "L", "XL")}
FIT_V2 = {**FIT, "mlp_ratio": 8 / 3, "qk_norm": True, "learn_sigma": False, "time_input": "t"}
V2_SIZES = {
    "T": {"depth": 6, "hidden_size": 128, "num_heads": 4, "adaln_rank": 32},
    "S": {"depth": 15, "hidden_size": 384, "num_heads": 6, "adaln_rank": 96},
    "B": {"depth": 15, "hidden_size": 768, "num_heads": 12, "adaln_rank": 192},
    "XL": {"depth": 36, "hidden_size": 1152, "num_heads": 16, "adaln_rank": 288},
    "3B": {"depth": 40, "hidden_size": 2304, "num_heads": 24, "adaln_rank": 576},
}
MODELS |= {f"FiTv2-{size}/2": {**FIT_V2, **V2_SIZES[size]} for size in ("B", "XL", "3B")}
MODELS |= {
    f"PPFiT-{size}-{levels}": {**FIT_V2, **V2_SIZES[size], "patch_sizes": PATCH_SIZES[f"PPF-{{}}-{levels}"]}
    for size in ("T", "S", "B", "XL")
    for levels in (2, 3)
}


def plain_spelling(name: str) -> str:
    """A model's name as all its spellings become: lower case, without separators, "ppf" for "PPFlow"."""
    return re.sub("[-_/]", "", name.lower()).replace("ppflow", "ppf").replace("fitv1", "fit")


def canonical_name(name: str) -> str:
    """The registry's spelling of a model name: "PPFlow_XL_2" -> "PPF-XL-2".

    Raises:
        ValueError: if no such model exists; the message lists those that do.
    """
    for known in MODELS:
        if plain_spelling(known) == plain_spelling(name):
            return known
    raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")
