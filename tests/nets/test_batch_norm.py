"""Batch statistics over workers beside torch's batch normalization of the joint batch."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmdist.nets.batch_norm import BatchNorm
from tests.support import run_workers

SHAPES = [(8, 5), (8, 5, 4, 3)]


def joint(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.0 + 1.0


def modules(shape: tuple[int, ...]) -> tuple[BatchNorm, nn.Module]:
    ours = BatchNorm(shape[1]).double()
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1]).double()
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(torch.linspace(0.5, 1.5, shape[1]))
            module.bias.copy_(torch.linspace(-1.0, 1.0, shape[1]))
    return ours, theirs


def penalty(module: nn.Module, x: Tensor) -> Tensor:
    """A loss of a gradient: what R1 asks of a discriminator."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    return gradient.square().sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_one_worker_is_as_torch(shape: tuple[int, ...]) -> None:
    ours, theirs = modules(shape)
    x = joint(shape)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def compare(rank: int, world: int, shape: tuple[int, ...]) -> None:
    ours, theirs = modules(shape)
    x, count = joint(shape), world
    torch.testing.assert_close(ours(x[rank::count]), theirs(x)[rank::count])
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    for loss in (penalty, lambda module, x: module(x).pow(3).sum()):
        ours.zero_grad(), theirs.zero_grad()
        loss(ours, x[rank::count]).backward()
        loss(theirs, x).backward()
        for own, whole in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            assert own.grad is not None
            dist.all_reduce(own.grad)
            torch.testing.assert_close(own.grad, whole.grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_workers_are_as_one_on_the_joint_batch(shape: tuple[int, ...]) -> None:
    run_workers(compare, 2, shape)
