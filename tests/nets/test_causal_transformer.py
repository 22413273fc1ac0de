"""The decoder-only transformer: published sizes, what a code sees, exact likelihoods, and drawing with kept keys."""

import itertools

import pytest
import torch
from torch import Tensor

from gmdist.nets.causal_transformer import CausalTransformer, CausalTransformerConfig, rotation_table, turned


def network(num_codes: int, grid: tuple[int, int], num_classes: int = 2) -> CausalTransformer:
    """A small one with weights that matter."""
    torch.manual_seed(0)
    made = CausalTransformer(CausalTransformerConfig(16, 2, 2), num_codes, grid, num_classes).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made.double()


@pytest.mark.parametrize(
    ("sizes", "count", "published"),
    [
        ((768, 12, 12), 110_888_448, "111 M"),
        ((1024, 24, 16), 342_910_976, "343 M"),
        ((1280, 36, 20), 774_699_520, "775 M"),
        ((1536, 48, 24), 1_410_972_672, "1.4 B"),
        ((3200, 24, 32), 3_096_659_200, "3.1 B"),
    ],
)
def test_has_the_published_sizes(sizes: tuple[int, int, int], count: int, published: str) -> None:
    # LlamaGen-B to 3B (Sun 2024, Table 1), with 16,384 codes on a grid of 16 x 16 and 1,000 classes.
    assert CausalTransformerConfig(*sizes).problem() is None
    with torch.device("meta"):
        made = CausalTransformer(CausalTransformerConfig(*sizes), 16_384, (16, 16), 1000)
    assert sum(parameter.numel() for parameter in made.parameters()) == count
    assert published == (f"{count / 1e6:.0f} M" if count < 1e9 else f"{count / 1e9:.1f} B")


def test_a_code_sees_the_class_and_the_codes_before_it() -> None:
    made = network(5, (3, 3))
    embedded: list[Tensor] = []
    made.codes.register_forward_hook(lambda module, inputs, output: embedded.append(output.detach().requires_grad_()))
    made.codes.register_forward_hook(lambda module, inputs, output: embedded[-1])
    logits = made(torch.randint(5, (1, 1, 3, 3)), torch.tensor([1])).flatten(1, 3)
    for number in range(9):
        inputs = (embedded[0], made.label.weight)
        of_codes, of_labels = torch.autograd.grad(logits[0, number].square().sum(), inputs, retain_graph=True)
        assert (of_codes[0].abs().sum(dim=1) > 0).tolist() == [before < number for before in range(8)]
        assert (of_labels.abs().sum(dim=1) > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("label", [None, torch.tensor([1])])
def test_the_probabilities_of_all_grids_are_one_together(label: Tensor | None) -> None:
    made = network(3, (2, 2))
    grids = torch.tensor(list(itertools.product(range(3), repeat=4))).view(-1, 1, 2, 2)
    logs = made(grids, label if label is None else label.expand(len(grids))).log_softmax(dim=-1)
    chosen = logs.gather(4, grids[..., None]).sum(dim=(1, 2, 3, 4))
    assert chosen.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert chosen.std() > 0.1


@pytest.mark.parametrize("given_rows", [0, 1, 3])
def test_kept_keys_give_the_codes_that_the_whole_network_gives(given_rows: int) -> None:
    made, label = network(7, (4, 3)), torch.tensor([0, 1, 2])
    begun = torch.randint(7, (3, 1, 4, 3))
    seen: list[Tensor] = []

    def choose(logits: Tensor, number: int) -> Tensor:
        seen.append(logits)
        return (logits + 3.0 * torch.sin(torch.arange(7) * (number + 1.0))).argmax(dim=1)

    with torch.no_grad():
        drawn = made.draw(begun, given_rows, label, choose)
        expected = begun.clone()
        for number, logits in enumerate(list(seen), 3 * given_rows):
            plain = made(expected, label).flatten(1, 3)[:, number]
            torch.testing.assert_close(logits, plain)
            expected.view(3, -1)[:, number] = choose(plain, number)
    assert len(set(expected.flatten().tolist())) > 3
    assert torch.equal(drawn, expected)
    assert torch.equal(drawn[:, :, :given_rows], begun[:, :, :given_rows])


def test_attention_knows_how_far_apart_two_places_are() -> None:
    table = rotation_table((4, 5), 8).double()
    query, key = torch.randn(2, 8, dtype=torch.float64)

    def product(first: tuple[int, int], second: tuple[int, int]) -> float:
        pair = [turned(x, table[:, 1 + 5 * row + column]) for x, (row, column) in ((query, first), (key, second))]
        return (pair[0] * pair[1]).sum().item()

    assert product((0, 0), (0, 0)) == pytest.approx((query * key).sum().item())
    assert product((3, 4), (1, 1)) == pytest.approx(product((2, 3), (0, 0)))
    assert product((3, 4), (1, 1)) != pytest.approx(product((3, 4), (1, 2)))
    assert product((3, 4), (1, 1)) != pytest.approx(product((3, 4), (2, 1)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, "num_heads: 5; must divide the width 768"),
        ({"channels": 0}, "channels: 0; must be at least 1"),
        ({"num_heads": 768}, "num_heads: 768; must leave each a multiple of 4 of the 768 channels"),
        ({"depth": 0}, "depth: 0; must be at least 1"),
        ({"dropout": 1.0}, "dropout: 1.0; must be at least 0 and below 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, float], words: str) -> None:
    assert CausalTransformerConfig(**changes).problem() == words
