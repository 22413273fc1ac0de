"""Where numbers stop being finite: the first layer of a network whose output is not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gmdist.errors import DivergedError


class Watch:
    """What a network's layers gave, in the order in which they ended: a layer comes before what it is a part of."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, Tensor]] = []

    def note(self, name: str, output: object) -> None:
        """Look at a layer's output, without waiting for the device."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
                # Much faster than isfinite of all: where there is a NaN, it is both the least and the largest.
                extremes = torch.stack(leaf.detach().aminmax())
                self._seen.append((name, extremes.isfinite().all()))

    def first(self) -> str | None:
        """The name of the first layer whose output was not finite; None if all were. Waits for the device."""
        if not self._seen:
            return None
        flags = torch.stack([flag for _, flag in self._seen]).tolist()
        return next((name for (name, _), flag in zip(self._seen, flags, strict=True) if not flag), None)


@contextmanager
def watched(network: nn.Module) -> Iterator[Watch]:
    """Look at what every layer of a network gives in a block."""
    watch = Watch()

    def hook_of(name: str) -> object:
        return lambda module, args, output: watch.note(name, output)

    layers = [(name, layer) for name, layer in network.named_modules() if name]
    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def all_finite(network: nn.Module, what: str) -> Iterator[None]:
    """Let no layer of a network give in a block what is not finite.

    Raises:
        DivergedError: after the block; it names the first layer, and `what` would have come of it.
    """
    with watched(network) as watch:
        yield
    if (layer := watch.first()) is not None:
        raise DivergedError(f"no {what}: the output of {layer} is not finite; check the images and the weights")
