"""The door of diffusers: a trained network as a pipeline of that library, here or in a folder with its own code."""

from weights.diffusers.pipeline import PPFlowPipeline
from weights.diffusers.pyramid_scheduler import PyramidScheduler
from weights.diffusers.pyramid_transformer import PyramidTransformer

__all__ = ["PPFlowPipeline", "PyramidScheduler", "PyramidTransformer"]
