"""The gated PixelCNN: what a value sees, exact likelihoods, and drawing with what was computed before."""

import itertools

import pytest
import torch
from torch import Tensor

from gmdist.nets.pixelcnn import GatedPixelCNN, GatedPixelCNNConfig


def network(config: GatedPixelCNNConfig, num_codes: int, channels: int, *, is_embedded: bool = False) -> GatedPixelCNN:
    """One with weights that matter, told one of two classes."""
    torch.manual_seed(0)
    made = GatedPixelCNN(config, num_codes, channels, 2, is_embedded=is_embedded).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made.double()


def seen_from(made: GatedPixelCNN, height: int, width: int, row: int, column: int) -> Tensor:
    """Which places the logits of a place depend on, by gradients: bool [H, W]."""
    entered = torch.randn(1, made.label.embedding_dim, height, width, dtype=torch.float64, requires_grad=True)
    made.entry.register_forward_hook(lambda module, inputs, output: entered)
    logits = made(torch.zeros(1, 1, height, width, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(logits[0, 0, row, column].square().sum(), entered)
    return gradient[0].abs().sum(dim=0) > 0


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_value_sees_all_places_before_it_and_no_other(kernel_size: int) -> None:
    made = network(GatedPixelCNNConfig(4, 6, kernel_size), 3, 1)
    for row, column in ((0, 0), (0, 4), (2, 0), (3, 2), (5, 5)):
        numbers = torch.arange(36).view(6, 6)
        # No blind spot: to the right of the column, too, all that is above is seen.
        assert torch.equal(seen_from(made, 6, 6, row, column), numbers < numbers[row, column])


def test_a_layer_reaches_half_a_kernel_in_each_direction() -> None:
    seen = seen_from(network(GatedPixelCNNConfig(4, 2, 3), 3, 1), 9, 9, 6, 4)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 2:7] = True  # the shift by one row, and two layers of one row and column each
    expected[6, 1:4] = True
    assert torch.equal(seen, expected)


def test_a_channel_sees_those_before_it_at_its_own_place() -> None:
    made = network(GatedPixelCNNConfig(16, 2, 3), 8, 3)
    codes = torch.randint(8, (1, 3, 4, 4))
    before = made(codes)
    for channel in range(3):
        changed = codes.clone()
        changed[0, channel, 2, 1] = (changed[0, channel, 2, 1] + 3) % 8
        moved = (made(changed) - before).abs().sum(dim=4)[0] > 0
        assert moved[:, 2, 1].tolist() == [channel < later for later in range(3)]
        assert not moved.flatten(1)[:, :9].any()
        assert moved[:, 2, 2].all()


@pytest.mark.parametrize(("channels", "is_embedded"), [(1, False), (1, True), (2, False)])
def test_the_probabilities_of_all_grids_are_one_together(channels: int, is_embedded: bool) -> None:
    num_codes = 3 if channels == 1 else 2
    made = network(GatedPixelCNNConfig(4, 2, 3), num_codes, channels, is_embedded=is_embedded)
    grids = torch.tensor(list(itertools.product(range(num_codes), repeat=4 * channels))).view(-1, channels, 2, 2)
    for label in (None, torch.ones(len(grids), dtype=torch.int64)):
        logs = made(grids, label).log_softmax(dim=-1)
        chosen = logs.gather(4, grids[..., None]).sum(dim=(1, 2, 3, 4))
        assert chosen.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
        assert chosen.std() > 0.1


@pytest.mark.parametrize("given_rows", [0, 2])
@pytest.mark.parametrize(("channels", "is_embedded"), [(1, True), (3, False)])
def test_drawing_gives_what_the_whole_network_gives(channels: int, is_embedded: bool, given_rows: int) -> None:
    made = network(GatedPixelCNNConfig(5, 2, 3), 6, channels, is_embedded=is_embedded)
    begun, label = torch.randint(6, (3, channels, 4, 7)), torch.tensor([0, 1, 2])
    seen: list[Tensor] = []

    def choose(logits: Tensor, number: int) -> Tensor:
        seen.append(logits)
        return (logits + 3.0 * torch.sin(torch.arange(6) * (number + 1.0))).argmax(dim=1)

    with torch.no_grad():
        drawn = made.draw(begun, given_rows, label, choose)
        expected = begun.clone()
        for number, logits in enumerate(list(seen), 7 * channels * given_rows):
            place, channel = divmod(number, channels)
            plain = made(expected, label)[:, channel].flatten(1, 2)[:, place]
            torch.testing.assert_close(logits, plain)
            expected[:, channel, place // 7, place % 7] = choose(plain, number)
    assert len(set(expected.flatten().tolist())) > 3
    assert torch.equal(drawn, expected)
    assert torch.equal(drawn[:, :, :given_rows], begun[:, :, :given_rows])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 0}, "channels: 0; must be from 1 to 65536"),
        ({"depth": 0}, "depth: 0; must be at least 1"),
        ({"kernel_size": 4}, "kernel_size: 4; must be odd, from 3 to 31"),
        ({"dropout": -0.1}, "dropout: -0.1; must be at least 0 and below 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, float], words: str) -> None:
    assert GatedPixelCNNConfig(**changes).problem() == words
