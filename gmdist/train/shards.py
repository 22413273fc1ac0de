"""The fp32 fragments that a worker owns: the one shape in which weights are averaged, saved and loaded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of one flattened parameter, with the optimizer's state for them."""

    name: str  # the parameter's name in the family: "denoiser.conv_in.weight"
    start: int  # the first element's place in the flattened parameter
    values: Tensor  # fp32 [n], a view: writing to it changes the master weights
    state: dict[str, Tensor]  # the optimizer's, each [n], views too: "exp_avg", "exp_avg_sq"


class FlatParameters:
    """A module's parameters and gradients as two flat fp32 tensors, of which they become views."""

    ALIGNMENT = 16  # elements: every parameter starts at a multiple of 64 bytes

    def __init__(self, module: nn.Module, prefix: str, multiple_of: int = 1) -> None:
        """Move the parameters.

        Args:
            module: all its parameters are fp32.
            prefix: of the parameters' names.
            multiple_of: the flat tensors' length is a multiple of it times ALIGNMENT.
        """
        self.places: list[tuple[str, int, int]] = []  # name, first element, number of elements
        parameters = list(module.named_parameters())
        end = 0
        for name, parameter in parameters:
            self.places.append((f"{prefix}.{name}", end, parameter.numel()))
            end += _round_up(parameter.numel(), self.ALIGNMENT)
        length = _round_up(end, multiple_of * self.ALIGNMENT)
        device = parameters[0][1].device
        self.values = nn.Parameter(torch.zeros(length, device=device))
        self.gradients = torch.zeros(length, device=device)
        for (_, parameter), (_, start, count) in zip(parameters, self.places, strict=True):
            assert parameter.dtype == torch.float32, parameter.dtype
            view = self.values.data[start : start + count].view_as(parameter)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.gradients[start : start + count].view_as(parameter)
        self.values.grad = self.gradients

    def fragments(self, state: dict[str, Tensor], start: int = 0, stop: int | None = None) -> Iterator[Fragment]:
        """The fragments that lie in elements [start, stop) of the flat tensor.

        Args:
            state: the optimizer's state tensors for the flat tensor.
            start, stop: None is the end.
        """
        stop = len(self.values) if stop is None else stop
        for name, first, count in self.places:
            low, high = max(first, start), min(first + count, stop)
            if low < high:
                yield Fragment(
                    name,
                    low - first,
                    self.values.data[low:high],
                    {key: tensor[low:high] for key, tensor in state.items()},
                )


def elementwise_state(state: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """The parts of an optimizer's state that have one value for each element of the parameter."""
    return {
        key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor) and tensor.shape == parameter.shape
    }


def num_elements(fragments: Iterable[Fragment]) -> int:
    """Elements of all the fragments."""
    return sum(fragment.values.numel() for fragment in fragments)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
