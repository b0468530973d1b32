"""Shapes of a file's tensors, from which the arguments of a network are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from models import MODELS


class Shapes:
    """Shapes of a file's tensors by name.

    Where several tensors give a number, the majority decides, so that loading later names the wrong one.

    Args:
        weights: tensors by name; only their shapes matter
        source:  the file's name, for messages
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], source: str) -> None:
        self.of = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        self.source = source

    def sizes(self, names: str, axis: int = 0) -> list[int]:
        """The lengths of an axis, of all tensors whose name matches."""
        return [shape[axis] for name, shape in self.of.items() if re.fullmatch(names, name) and axis < len(shape)]

    def most(self, values: Iterable[Any], what: str) -> Any:
        """The value that most tensors agree on (ValueError if there is none)."""
        counts = Counter(values).most_common(1)
        if not counts:
            raise ValueError(f"{self.source} is incomplete: no tensor tells {what}")
        return counts[0][0]

    def hidden_size(self) -> int:
        """The width."""
        return self.most(self.sizes(r"blocks\.\d+\.(attn\.proj|mlp\.fc2)\.bias|t_embedder\.mlp\.\d\.bias"), "the width")

    def depth(self) -> int:
        """The number of blocks."""
        return 1 + max(int(name.split(".")[1]) for name in self.of if re.match(r"blocks\.\d+\.", name))

    def num_classes(self) -> int:
        """The number of classes, without the null label."""
        table = "y_embedder.embedding_table.weight"
        return self.most(self.sizes(re.escape(table)), f"the number of classes ({table})") - 1

    def num_heads(self) -> int:
        """The number of heads of the registry's model of this width, else the width over 64.

        Raises:
            ValueError: if no model has the width, and 64 does not divide it: no tensor's shape tells.
        """
        hidden = self.hidden_size()
        known = {fields["hidden_size"]: fields["num_heads"] for fields in MODELS.values()}
        if hidden not in known and hidden % 64:
            raise ValueError(f"{self.source} is {hidden} wide, which does not tell the number of heads: give num_heads")
        return known.get(hidden, hidden // 64)
