"""What the memory server imports once, before it forks: everything that the engines need, and nothing is computed."""

import gc
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import monai.networks.nets.diffusion_model_unet
    import opacus
    import torch._dynamo  # what the first optimizer imports

    import medsynth.privacy.engine.bookkeeping
    import pipelines.bench.measuring

# A collection in a child would copy every page of what was imported.
gc.freeze()

__all__ = ["medsynth", "monai", "opacus", "pipelines", "torch"]
