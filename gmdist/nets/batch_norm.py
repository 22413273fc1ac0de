"""Batch normalization whose statistics are those of all workers' batches (Ioffe 2015)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.blocks import at_least_fp32
from gmdist.workers import all_mean, world_size


class _MeanOverWorkers(torch.autograd.Function):
    """The mean of a tensor over workers: linear and its own transpose, so it differentiates any number of times."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_mean(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _MeanOverWorkers.apply(gradient)


_EPS = 1e-5
_MOMENTUM = 0.1  # the share of a batch's statistics in the running ones, which are used outside training


class BatchNorm(nn.Module):
    """For features [N, C] or [N, C, H, W]; in training all workers call it together, with as many samples each.

    torch's own synchronised one is for CUDA alone.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape, at least fp32."""
        x = at_least_fp32(x)
        if not self.training:
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, eps=_EPS)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = _over_workers(x.mean(dims))
        centered = x - mean.view(shape)
        variance = _over_workers(centered.square().mean(dims))
        if torch.is_grad_enabled() and self.weight.requires_grad:
            # In another network's phase, such as a generator in the discriminator's, no trace is left.
            count = x.numel() // x.shape[1] * world_size()
            self.running_mean.lerp_(mean.detach(), _MOMENTUM)
            self.running_var.lerp_(variance.detach() * (count / max(count - 1, 1)), _MOMENTUM)
        factor = self.weight * (variance + _EPS).rsqrt()
        return torch.addcmul(self.bias.view(shape), centered, factor.view(shape))


def _over_workers(value: Tensor) -> Tensor:
    return _MeanOverWorkers.apply(value) if world_size() > 1 else value
