"""Which parameters of the denoiser patients may move: all, biases and norms, or low-rank adapters.

Under differential privacy the noise grows with the number of trainable parameters, so a network that was pre-trained
on public phantoms is frozen but for a few thousand of them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from medsynth.errors import ConfigError


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable product of two thin ones (Hu et al. 2022, eq. 3).

    The second factor starts at zero, so that the adapted layer starts as the frozen one.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, values: Tensor) -> Tensor:
        """Return the adapted layer's output."""
        output: Tensor = self.layer(values) + self.up(self.down(values))
        return output


class LoraConv(nn.Module):
    """A frozen convolution plus a thin one followed by a pointwise one (Hu et al. 2022, for convolutions)."""

    def __init__(self, layer: nn.Conv2d | nn.Conv3d, rank: int) -> None:
        super().__init__()
        kind = type(layer)
        self.layer = layer
        self.down = kind(
            layer.in_channels,
            rank,
            layer.kernel_size,  # type: ignore[arg-type]  # tuple[int, ...] of the layer's own rank
            stride=layer.stride,  # type: ignore[arg-type]  # likewise
            padding=layer.padding,  # type: ignore[arg-type]  # likewise
            dilation=layer.dilation,  # type: ignore[arg-type]  # likewise
            bias=False,
        )
        self.up = kind(rank, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, values: Tensor) -> Tensor:
        """Return the adapted layer's output."""
        output: Tensor = self.layer(values) + self.up(self.down(values))
        return output


def add_adapters(model: nn.Module, rank: int) -> None:
    """Put low-rank adapters of ``rank`` on every linear layer and every ungrouped convolution, in place."""
    for module in list(model.modules()):
        if isinstance(module, LoraLinear | LoraConv):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoraLinear(child, rank))
            elif isinstance(child, nn.Conv2d | nn.Conv3d) and child.groups == 1:
                setattr(module, name, LoraConv(child, rank))


def select_trainable(model: nn.Module, choice: Literal["all", "bias_norm", "lora"]) -> int:
    """Freeze all parameters but the chosen ones, in place, and return how many stay trainable.

    Args:
        model: the denoiser; with ``lora`` it has adapters already (:func:`add_adapters`).
        choice: ``all``; ``bias_norm``: biases and the affine parameters of norms; ``lora``: the adapters.

    Raises:
        ConfigError: the choice leaves nothing to train.
    """
    adapters = {
        f"{name}.{part}.weight"
        for name, m in model.named_modules()
        if isinstance(m, LoraLinear | LoraConv)
        for part in ("up", "down")
    }
    for name, parameter in model.named_parameters():
        if choice == "all":
            keep = True
        elif choice == "bias_norm":
            keep = parameter.ndim <= 1
        else:
            keep = name in adapters
        parameter.requires_grad_(keep)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if count == 0:
        raise ConfigError(f"train.trainable '{choice}' leaves no parameter to train")
    return count
