"""How codes are drawn, beside distributions by hand."""

import math

import pytest
import torch

from gmdist.errors import DivergedError
from gmdist.families.code_sampler import CodeSamplerConfig, drawn, guided, probabilities

GIVEN = (0.1, 0.4, 0.2, 0.3)
LOGITS = torch.tensor([GIVEN]).log() + 5.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, GIVEN),
        ({"temperature": 0.5}, [p / 0.30 for p in (0.01, 0.16, 0.04, 0.09)]),
        ({"temperature": 1e-3}, (0, 1, 0, 0)),
        ({"temperature": 1e-310}, (0, 1, 0, 0)),
        ({"top_k": 2}, (0, 4 / 7, 0, 3 / 7)),
        ({"top_k": 1}, (0, 1, 0, 0)),
        ({"top_k": 9}, GIVEN),
        ({"top_p": 0.39}, (0, 1, 0, 0)),
        ({"top_p": 0.41}, (0, 4 / 7, 0, 3 / 7)),
        ({"top_p": 0.8}, (0, 4 / 9, 2 / 9, 3 / 9)),
        ({"top_p": 1e-9}, (0, 1, 0, 0)),
        ({"top_k": 3, "top_p": 0.7}, (0, 4 / 7, 0, 3 / 7)),  # of the three, two have 7/9 together
        ({"temperature": 0.5, "top_p": 0.8}, (0, 16 / 25, 0, 9 / 25)),  # 25/30 together
    ],
)
def test_distributions_by_hand(changes: dict[str, float], expected: list[float]) -> None:
    found = probabilities(LOGITS, CodeSamplerConfig(**changes))
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_of_equal_codes_the_first_are_kept_and_no_more_than_asked_for() -> None:
    ties = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    for top_k, kept in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])):
        found = probabilities(ties, CodeSamplerConfig(top_k=top_k))
        assert found[0].nonzero().flatten().tolist() == kept
    # As many as one code in a thousand has: sorts of long rows are other algorithms.
    found = probabilities(torch.zeros(2, 5000), CodeSamplerConfig(top_k=5))
    assert found[1].tolist() == [0.2] * 5 + [0.0] * 4995
    least = probabilities(ties, CodeSamplerConfig(temperature=1e-310))
    assert least[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_quantiles_pick_each_code_for_its_share_of_them() -> None:
    quantiles = (torch.arange(1000).double() + 0.5) / 1000
    found = torch.tensor([[0.0, 0.1, 0.0, 0.4, 0.5, 0.0]], dtype=torch.float64).expand(1000, -1)
    assert drawn(found, quantiles).bincount(minlength=6).tolist() == [0, 100, 0, 400, 500, 0]
    ends = torch.tensor([2.0**-33, 1.0 - 2.0**-33], dtype=torch.float64)
    assert drawn(found[:2], ends).tolist() == [1, 4]


def test_guidance_leads_away_from_what_is_drawn_without_a_class() -> None:
    told, free = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert torch.equal(guided(told, free, 1.0), told)
    assert torch.equal(guided(told, free, 0.0), free)
    assert guided(told, free, 3.0).tolist() == [[3.0, 0.0]]


def test_of_logits_that_are_not_finite_nothing_is_drawn() -> None:
    for wrong in (math.nan, math.inf):
        with pytest.raises(DivergedError, match="the model's logits are not finite; check its weights"):
            probabilities(torch.tensor([[0.0, 1.0], [wrong, 1.0]]), CodeSamplerConfig())
    ruled_out = probabilities(torch.tensor([[-math.inf, 1.0]]), CodeSamplerConfig())
    assert ruled_out.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, "temperature: 0.0; must be a number above 0: top_k 1 takes the most probable code"),
        ({"temperature": math.nan}, "temperature: nan; must be a number above 0"),
        ({"top_k": 0}, "top_k: 0; must be at least 1, or null for all codes"),
        ({"top_p": 0.0}, "top_p: 0.0; must be above 0, where no code would be left, and at most 1, their sum"),
        ({"top_p": 1.5}, "top_p: 1.5; must be above 0"),
        ({"guidance": -1.0}, "guidance: -1.0; must be from 0 to 1000"),
        ({"guidance": 1e39}, "guidance: 1e+39; must be from 0 to 1000"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, float], words: str) -> None:
    assert CodeSamplerConfig().problem() is None
    assert str(CodeSamplerConfig(**changes).problem()).startswith(words)
