"""The door of diffusers: a trained network as a pipeline of that library, here or in a folder with its own code.

PPFlowPipeline does in diffusers' words what pipeline.Pipeline does in ours. It is no layer over that one, which knows
runs, checkpoints and precision: the folder's code would have to bring all of them. Both stand on the same network,
process and samplers, and so on the same bits.
"""

from weights.diffusers.pipeline import PPFlowPipeline
from weights.diffusers.pyramid_scheduler import PyramidScheduler
from weights.diffusers.pyramid_transformer import PyramidTransformer

__all__ = ["PPFlowPipeline", "PyramidScheduler", "PyramidTransformer"]
