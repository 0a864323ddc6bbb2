"""Opacus: per-sample gradients of nn.Conv2d are wrong when the layer's input is not NCHW-contiguous.

Needs torch and opacus only: python repro.py
"""

import warnings

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

warnings.simplefilter("ignore")
CLIP = 0.05
torch.manual_seed(0)
images = torch.randn(8, 16, 16, 3).cumsum(1).cumsum(2) / 16  # smooth, NHWC, as an image library gives them
inputs = {"contiguous": images.permute(0, 3, 1, 2).contiguous(), "permuted": images.permute(0, 3, 1, 2)}
labels = torch.randint(0, 4, (8,))
loss = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def autograd(x):
    """Return the right gradients, one sample at a time."""
    model, found = network(), []
    for i in range(len(x)):
        model.zero_grad()
        loss(model(x[i : i + 1]), labels[i : i + 1]).backward()
        found.append(flat(p.grad for p in model.parameters()))
    return torch.stack(found)


for name, x in inputs.items():
    right = autograd(x)

    hooks = GradSampleModule(network())
    loss(hooks(x), labels).backward()
    got = torch.stack([flat(p.grad_sample[i] for p in hooks.parameters()) for i in range(len(x))])
    print(f"{name}: hooks, gradients off by {(got - right).norm() / right.norm():.4f} of their norm")

    # Ghost clipping, one sample a batch, so that .grad is that sample's clipped gradient.
    worst = 0.0
    for i in range(len(x)):
        ghost = GradSampleModuleFastGradientClipping(network(), max_grad_norm=CLIP)
        sgd = torch.optim.SGD(ghost.parameters(), lr=0.1)
        settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": 1}
        optimizer = DPOptimizerFastGradientClipping(sgd, **settings)
        DPLossFastGradientClipping(ghost, optimizer, loss)(ghost(x[i : i + 1]), labels[i : i + 1]).backward()
        worst = max(worst, float(flat(p.grad for p in ghost.parameters()).norm()) / CLIP)
    print(f"{name}: ghost, longest clipped gradient {worst:.4f} x max_grad_norm (must be <= 1)")
