"""PPFlowPipeline: class labels in, images out, as diffusers' own pipelines do it.

pipe = DiffusionPipeline.from_pretrained("path/to/folder", trust_remote_code=True).to("cuda")
image = pipe(207, guidance_scale=[3.0, 4.0], num_inference_steps=50).images[0]

It imports neither the network nor the process: in an exported folder each of the three is a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor

from data.scaling import Scaling
from weights.diffusers.one_file import code_of

OWN_COMPONENTS = ("transformer", "scheduler")  # whose code is in the folder; the vae's is in diffusers
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Labels = int | str | Sequence[int | str] | torch.Tensor


def _ids_of(id2label: dict[int, str]) -> dict[str, int]:
    """Classes by name, "tench, Tinca tinca" by the whole and by each part; without names that two classes share."""
    found: dict[str, set[int]] = {}
    for number, name in id2label.items():
        for part in (name, *name.split(",")):
            found.setdefault(part.strip(), set()).add(number)
    return {name: min(numbers) for name, numbers in found.items() if len(numbers) == 1}


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, Sequence) else [value]


class InterruptedWalk(Exception):
    """A callback has set `pipe._interrupt`; `state` is where the samples are."""

    def __init__(self, state: torch.Tensor) -> None:
        super().__init__("interrupted")
        self.state = state


class PPFlowPipeline(DiffusionPipeline):
    """Draws images of classes with a pyramid of patch sizes (PPFlow, arXiv:2506.23543).

    Args:
        transformer: a PyramidTransformer
        scheduler:   a PyramidScheduler
        vae:         the autoencoder of the latents; None for a network that makes pixels
        id2label:    names of the classes, by their ids as numbers or text
        scaling:     "shift" and "scale", numbers or one per channel, of x = (z - shift) * scale between latents z of
                     the vae and the network's x; None for those of the vae's config
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (diffusers' own way)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: dict | None = None,
        scaling: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, scaling=scaling)
        self.id2label = {int(number): name for number, name in (id2label or {}).items()}
        self.labels = _ids_of(self.id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt = False
        self._num_timesteps = 0

    @property
    def vae_scale_factor(self) -> int:
        """Side of an image over that of its latents."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `_interrupt`, which ends the walk behind its step."""
        return self._interrupt

    # -- Samples ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        guidance_scale: float | Sequence[float] = 4.0,
        num_inference_steps: int | Sequence[int] = 50,
        level_edges: Sequence[float] | None = None,
        budget: float | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_interval: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels:        class ids or names, one or several; the id num_classes is the null label
            guidance_scale:      of classifier-free guidance, one or one per level, coarsest first; at 1 it is off, and
                                 costs one evaluation a step instead of two
            num_inference_steps: over all levels, shared out by their lengths; or one number per level
            level_edges:         other times at which the patch size changes, in (0, 1), where 0 is noise and 1 data
            budget:              share of the finest level's arithmetic, which chooses the edges; for networks that were
                                 trained with elastic levels
            height, width:       of the images in pixels, for networks with rotary positions; None for the network's own
            guidance_interval:   guide for times between these two alone (arXiv:2404.07724)
            generator:           one for all samples, or one for each: then sample i depends on its own alone
            latents:             (N, C, h, w) noise to start from, instead of the generator's
            output_type:         "pil", "np" (N, H, W, C) and "pt" (N, C, H, W) in [0, 1], or "latent" as the network
                                 sees them
            return_dict:         False for a tuple
            callback_on_step_end: called as (pipe, step, t, {"latents": x}) after each step; what it returns under
                                 "latents" goes on. It may set pipe._interrupt to stop
            callback_on_step_end_tensor_inputs: "latents", or nothing

        Returns:
            ImagePipelineOutput, or a tuple, of the images.

        Raises:
            ValueError: before anything is computed, if the arguments do not fit each other or the network.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)
        for given in (guidance_scale, guidance_interval or ()):
            if not all(isinstance(each, Real) for each in _as_list(given)):
                raise ValueError(f"guidance is by numbers, one or several, got {given!r}")
        if budget is not None and not isinstance(budget, Real):
            raise ValueError(f"a budget is a number, got {budget!r}")
        labels = self.label_ids(class_labels)
        shape = (len(labels), self.transformer.in_channels, *self._input_size(height, width))
        guidance = guidance_scale, guidance_interval
        walk = self.scheduler.walk(self.transformer, num_inference_steps, *guidance, level_edges, budget)
        device = self._execution_device
        x0 = self._noise(shape, generator, latents, device)
        y = torch.tensor(labels, dtype=torch.long, device=device)

        self._interrupt, self._num_timesteps, step = False, walk.num_steps, 0
        with self.progress_bar(total=walk.num_steps) as bar:

            def on_step(t: float, x: torch.Tensor) -> torch.Tensor:
                nonlocal step
                if callback_on_step_end is not None:
                    tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                    x = (callback_on_step_end(self, step, t, tensors) or {}).get("latents", x)
                step += 1
                bar.update()
                if self._interrupt:
                    raise InterruptedWalk(x)
                return x

            try:
                x1 = walk(x0, y, on_step)
            except InterruptedWalk as stopped:
                x1 = stopped.state
        images = x1 if output_type == "latent" else self.image_processor.postprocess(self.decode(x1), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) in about [-1, 1] of latents (N, C, h, w) as the network sees them."""
        if self.vae is None:
            return latents
        given = self.config.scaling
        scaling = Scaling.from_config(self.vae.config) if given is None else Scaling.from_dict(given)
        return self.vae.decode(scaling.invert(latents.float()).to(self.vae.dtype)).sample.float()

    # -- Arguments -------------------------------------------------------------------------------------------------

    def label_ids(self, class_labels: Labels) -> list[int]:
        """The ids of classes that are given by their ids or names, one or several (ValueError for unknown ones)."""
        if hasattr(class_labels, "tolist"):  # of torch or numpy
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
            class_labels = [class_labels]
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: int | str) -> int:
        count = self.transformer.num_classes
        if isinstance(label, str):
            if label not in self.labels:
                some = ", ".join(list(self.labels)[:3])
                known = f"pipe.labels has the names, as {some}" if some else "this pipeline knows ids alone"
                raise ValueError(f"{label!r} is the name of no class, or of more than one: {known}")
            return self.labels[label]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= count:
            raise ValueError(f"class labels must be names, or whole numbers between 0 and {count - 1}, got {label!r}")
        return label

    def _check_outputs(self, output_type: str, tensor_inputs: Sequence[str]) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        channels = self.transformer.in_channels
        if output_type == "pil" and self.vae is None and channels not in (1, 3):
            raise ValueError(f"{channels} channels and no vae make no picture: give output_type='latent', or a vae")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has to be in {self._callback_tensor_inputs}, but found {unknown}"
            )

    def _input_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        if (height is None) != (width is None):
            raise ValueError(f"give both height and width, or none of them: got {height} and {width}")
        if height is None:
            return self.transformer.input_size
        return self.transformer.input_size_of((height, width), self.vae_scale_factor)

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """x_0 (N, C, h, w) in fp32, which solvers compute in."""
        if latents is None:
            return self.scheduler.noise(shape, generator, device)
        if generator is not None:
            raise ValueError("latents are the noise: leave the generator out")
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, {shape} is needed")
        return latents.to(device, torch.float32)

    # -- Folders ---------------------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json and the code that it names; save_pretrained and push_to_hub come here last."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        file = Path(save_directory) / self.config_name
        index = json.loads(file.read_text(encoding="utf-8"))
        for name in ("_class_name", *OWN_COMPONENTS):
            part = self if name == "_class_name" else getattr(self, name)
            kind = type(getattr(part, "_orig_mod", part))  # what torch.compile wraps
            module = kind.__module__.rpartition(".")[2]
            folder = file.parent if name == "_class_name" else file.parent / name
            code = code_of(kind)  # before the file, which may be where it comes from, is opened
            (folder / f"{module}.py").write_text(code, encoding="utf-8")
            index[name] = [module, kind.__name__]
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """A model_index.json whose class is this one: PPFlowPipeline.from_pretrained runs no code of the folder."""
        index = super()._dict_from_json_file(json_file)
        return index | {"_class_name": cls.__name__}

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The same, with the components of this program instead of the folder's."""
        index = super().load_config(*args, **kwargs)
        package = cls.__module__.rpartition(".")[0]
        for name in OWN_COMPONENTS:
            module, kind = index[name]
            index[name] = [f"{package}.{module}", kind]
        return index
