"""Which layers the engine treats, and the refusal, by name, of models that hold others."""

from __future__ import annotations

from torch import nn

from medsynth.errors import PrivacyError
from medsynth.privacy.engine.convolution import ConvolutionFamily
from medsynth.privacy.engine.embedding import EmbeddingFamily
from medsynth.privacy.engine.linear import LinearFamily
from medsynth.privacy.engine.normalisation import GroupNormFamily, InstanceNormFamily, LayerNormFamily
from medsynth.privacy.engine.part import Family, Layer

FAMILIES: dict[type[nn.Module], Family] = {
    nn.Linear: LinearFamily(),
    nn.Conv1d: ConvolutionFamily(),
    nn.Conv2d: ConvolutionFamily(),
    nn.Conv3d: ConvolutionFamily(),
    nn.ConvTranspose1d: ConvolutionFamily(),
    nn.ConvTranspose2d: ConvolutionFamily(),
    nn.ConvTranspose3d: ConvolutionFamily(),
    nn.GroupNorm: GroupNormFamily(),
    nn.InstanceNorm1d: InstanceNormFamily(),
    nn.InstanceNorm2d: InstanceNormFamily(),
    nn.InstanceNorm3d: InstanceNormFamily(),
    nn.LayerNorm: LayerNormFamily(),
    nn.Embedding: EmbeddingFamily(),
}

# Methods that a subclass must not have changed: the engine computes what they compute.
_METHODS = ("forward", "_conv_forward", "_apply_instance_norm")


def trained_layers(model: nn.Module) -> list[Layer]:
    """Return the layers that hold the model's trained parameters.

    Raises:
        PrivacyError: names every parameter that cannot be treated, and why.
    """
    layers, faults = [], []
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        own = [(key, p) for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        family = _family(module)
        reason = f"{type(module).__name__} has no rule" if family is None else family.refusal(module)
        if "forward" in module.__dict__:
            reason = f"the forward of this {type(module).__name__} was replaced"
        for key, parameter in own:
            full = f"{name}.{key}" if name else key
            if reason is not None:
                faults.append(f"{full} ({reason})")
            elif id(parameter) in owners:
                faults.append(f"{full} (the same tensor as {owners[id(parameter)]})")
            owners.setdefault(id(parameter), full)
        if family is not None:
            weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
            layers.append(Layer(name or "model", module, family, weight, bias, frozenset(key for key, _ in own)))
    if faults:
        raise PrivacyError(
            f"backend 'bookkeeping' cannot clip these parameters: {', '.join(faults)}; freeze them, "
            "or use train.backend 'unit'"
        )
    return layers


def _family(module: nn.Module) -> Family | None:
    for kind, family in FAMILIES.items():
        if isinstance(module, kind) and all(
            getattr(type(module), method, None) is getattr(kind, method, None) for method in _METHODS
        ):
            return family
    return None
