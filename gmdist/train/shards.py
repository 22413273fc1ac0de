"""The fp32 fragments that a worker owns: the one shape in which weights are averaged, saved and loaded."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements: every parameter starts at a multiple of 64 bytes

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one flattened parameter, with the optimizer's state for them."""

    name: str  # the parameter's name in the family: "denoiser.conv_in.weight"
    start: int  # the first element's place in the flattened parameter
    values: Tensor  # fp32 [n], a view: writing to it changes the master weights
    state: dict[str, Tensor]  # the optimizer's, each [n], views too: "exp_avg", "exp_avg_sq"


class FlatParameters:
    """Parameters and their gradients in a few flat tensors, of which they become views.

    The master weights and the sums of gradients are fp32. Where the weights have another type, a flat copy of that type
    is what the network computes with.
    """

    def __init__(self, groups: list[list[Named]], dtype: torch.dtype, multiple_of: int = 1) -> None:
        """Move the parameters.

        Args:
            groups: fp32 parameters with their names, as the optimizer groups them.
            dtype: of the network's weights.
            multiple_of: the flat tensors' length is a multiple of it times ALIGNMENT.
        """
        self.places: list[tuple[str, int, int]] = []  # name, first element, number of elements
        ends, end = [], 0
        for group in groups:
            for name, parameter in group:
                assert parameter.dtype == torch.float32, parameter.dtype
                self.places.append((name, end, parameter.numel()))
                end += _round_up(parameter.numel(), ALIGNMENT)
            ends.append(end)
        length = _round_up(end, multiple_of * ALIGNMENT)
        device = groups[0][0][1].device
        self.values = torch.zeros(length, device=device)
        self.gradients = torch.zeros(length, device=device)
        self._weights = self.values if dtype == torch.float32 else torch.zeros(length, device=device, dtype=dtype)
        self._last = self.gradients if dtype == torch.float32 else torch.zeros_like(self._weights)
        parameters = [parameter for group in groups for _, parameter in group]
        for parameter, (_, start, count) in zip(parameters, self.places, strict=True):
            self.values[start : start + count].view_as(parameter).copy_(parameter.data)
            parameter.data = self._weights[start : start + count].view_as(parameter)
            parameter.grad = self._last[start : start + count].view_as(parameter)
        self.starts = [0, *ends[:-1]]
        self.groups = [nn.Parameter(self.values[low:high]) for low, high in zip(self.starts, ends, strict=True)]
        for values, low, high in zip(self.groups, self.starts, ends, strict=True):
            values.grad = self.gradients[low:high]
        self.publish()

    def collect(self) -> None:
        """Add the gradients of the last backward to the sums."""
        if self._last is not self.gradients:
            self.gradients += self._last
            self._last.zero_()

    def publish(self) -> None:
        """Bring the master weights to those that the network computes with."""
        if self._weights is not self.values:
            self._weights.copy_(self.values)

    def fragments(self, states: list[dict[str, Tensor]], start: int = 0, stop: int | None = None) -> Iterator[Fragment]:
        """The fragments that lie in elements [start, stop) of the flat tensors.

        Args:
            states: the optimizer's state tensors, a group each.
            start, stop: None is the end.
        """
        stop = len(self.values) if stop is None else stop
        for name, first, count in self.places:
            low, high = max(first, start), min(first + count, stop)
            if low < high:
                group = max(i for i, begin in enumerate(self.starts) if begin <= low)
                begin = self.starts[group]
                state = {key: tensor[low - begin : high - begin] for key, tensor in states[group].items()}
                yield Fragment(name, low - first, self.values[low:high], state)


def elementwise_state(state: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """The parts of an optimizer's state that have one value for each element of the parameter."""
    return {
        key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor) and tensor.shape == parameter.shape
    }


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
