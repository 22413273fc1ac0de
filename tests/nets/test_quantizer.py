"""The quantizer's losses and gradients against formulas in float64, its averages against a reference by hand."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gmdist.nets.kmeans import nearest
from gmdist.nets.quantizer import Quantizer, QuantizerConfig, perplexity, rotated, straight_through

CHANNELS, CODES = 6, 8
ALONE = (lambda value: value,) * 2  # one worker: its sums and lists are all there is


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def quantizer(seed: int = 0, **changes) -> Quantizer:
    torch.manual_seed(seed)
    return Quantizer(QuantizerConfig(CODES, **changes), CHANNELS).double()


def observe(made: Quantizer, features: Tensor) -> Tensor:
    """Take in features; the codes that they were given."""
    found = made.quantize(features)
    vectors = found.vectors.flatten(0, -2)
    made.codebook.observe(vectors, found.tokens.flatten())
    if made.config.revive:
        made.codebook.offer(vectors, torch.arange(len(vectors)))
    return found.tokens


@pytest.mark.parametrize("learned_by", ["averages", "gradient"])
@pytest.mark.parametrize("shape", [(5, 3, 4, CHANNELS), (5, 7, CHANNELS)], ids=["maps", "rows"])
def test_losses_and_straight_through_gradients(learned_by: str, shape: tuple[int, ...]) -> None:
    made = quantizer(learned_by=learned_by)
    features = numbers(*shape).requires_grad_()
    found = made.quantize(features)
    codes = made.codebook()
    chosen = codes[found.tokens]
    assert found.tokens.shape == shape[:-1]
    assert torch.equal(found.tokens.flatten(), nearest(features.detach().flatten(0, -2), codes.detach()))
    torch.testing.assert_close(found.features, chosen)
    torch.testing.assert_close(made.lookup(made.tokens(features)), chosen)
    error = (features - chosen).square().mean()
    learned = learned_by == "gradient"
    torch.testing.assert_close(found.loss, (0.25 + learned) * error)
    torch.testing.assert_close(found.commitment, error.detach())
    outer = numbers(*shape, seed=2)
    ((found.features * outer).sum() + found.loss).backward()
    slope = 2.0 * (features - chosen).detach() / features.numel()
    torch.testing.assert_close(features.grad, outer + 0.25 * slope)
    if learned:
        expected = torch.zeros(CODES, CHANNELS).double().index_add_(0, found.tokens.flatten(), -slope.flatten(0, -2))
        torch.testing.assert_close(made.codebook.embedding.grad, expected)


def test_rotation_by_its_matrix() -> None:
    vectors, codes = numbers(9, CHANNELS).requires_grad_(), numbers(9, CHANNELS, seed=1)
    found, outer = rotated(vectors, codes), numbers(9, CHANNELS, seed=2)
    (gradient,) = torch.autograd.grad((found * outer).sum(), vectors)
    torch.testing.assert_close(found, codes)
    for i in range(9):
        e, q = F.normalize(vectors[i].detach(), dim=0), F.normalize(codes[i], dim=0)
        r = F.normalize(e + q, dim=0)
        matrix = torch.eye(CHANNELS).double() - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)  # Fifty 2024, Sec. 4.2
        scale = codes[i].norm() / vectors[i].detach().norm()
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(CHANNELS).double())
        torch.testing.assert_close(gradient[i], scale * matrix.t() @ outer[i])


def test_where_there_is_no_direction_the_gradient_goes_straight_through() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1e-7, 0.0], [1e-30, 1e-30], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1e-5, 0.0], [0.0, 0.0], [-1.0, -2.0]])
    found = rotated(vectors.requires_grad_(), codes)
    assert torch.equal(found, codes)
    found.sum().backward()
    assert torch.equal(vectors.grad[:6], torch.ones(6, 2))
    assert vectors.grad[6].norm() == pytest.approx(2**0.5)  # opposite: the lengths are the same, and so are gradients'


@pytest.mark.parametrize("estimate", [straight_through, rotated])
def test_what_comes_out_is_the_code(estimate) -> None:
    vectors, codes = (numbers(40, 3, seed=seed).float() for seed in (0, 1))
    vectors[20:] *= 1e6
    assert torch.equal(estimate(vectors, codes), codes)


def test_straight_through() -> None:
    vectors, codes = numbers(4, 3).requires_grad_(), numbers(4, 3, seed=1)
    found = straight_through(vectors, codes)
    torch.testing.assert_close(found, codes)
    assert torch.equal(torch.autograd.grad(found.sum(), vectors)[0], torch.ones_like(vectors))


@pytest.mark.parametrize("learned_by", ["averages", "gradient"])
def test_narrow_normalized_codes(learned_by: str) -> None:
    made = quantizer(learned_by=learned_by, code_channels=3, normalize=True)
    features = numbers(5, 7, CHANNELS)
    found, codes = made.quantize(features), made.codebook()
    inner = F.normalize(F.linear(features, made.project_in.weight, made.project_in.bias), dim=-1)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(CODES).double())
    assert torch.equal(found.tokens, (inner @ codes.t()).argmax(dim=-1))
    expected = F.linear(codes[found.tokens], made.project_out.weight, made.project_out.bias)
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(made.lookup(found.tokens), expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_averages_by_hand(normalize: bool) -> None:
    made = quantizer(decay=0.9, normalize=normalize, dead_below=0.3)
    usage, sums = torch.ones(CODES).double(), made.codebook().clone()
    for step in range(5):
        parts = numbers(2, 15, CHANNELS, seed=step)
        codes = made.codebook().clone()
        tokens = torch.cat([observe(made, part) for part in parts])
        metrics = made.codebook.update(*ALONE)
        vectors = parts.flatten(0, 1)
        vectors = F.normalize(vectors, dim=1) if normalize else vectors
        assert torch.equal(tokens, nearest(vectors, codes))
        for code in range(CODES):  # van den Oord 2017, Eq. 6 to 8
            chosen = vectors[tokens == code]
            usage[code] = 0.9 * usage[code] + 0.1 * len(chosen)
            sums[code] = 0.9 * sums[code] + 0.1 * chosen.sum(0)
        smoothed = (usage + 1e-5) / (usage.sum() + CODES * 1e-5) * usage.sum()
        expected = sums / smoothed[:, None]
        torch.testing.assert_close(made.codebook(), F.normalize(expected, dim=1) if normalize else expected)
        torch.testing.assert_close(made.codebook.usage, usage)
        assert not made.codebook.observed.any()
        shares = torch.bincount(tokens, minlength=CODES) / 30
        entropy = -sum(float(share) * float(share.log()) for share in shares if share > 0)
        assert metrics["perplexity"].log().item() == pytest.approx(entropy, abs=1e-6)
        assert metrics["used_share"] == (shares > 0).double().mean()
        assert metrics["dead_share"] == (usage < 0.3 * usage.mean()).double().mean()


def far_off(made: Quantizer, alive: int) -> None:
    """Let no vector be near all but the first codes."""
    codes = made.codebook().clone()
    codes[alive:] = 1000.0
    made.codebook.start(codes)


def test_dead_codes_are_put_where_vectors_are() -> None:
    made = quantizer(decay=0.5, revive=True, dead_below=0.2)
    far_off(made, 3)
    for step in range(2):
        features = numbers(20, CHANNELS, seed=step)
        observe(made, features)
        metrics = made.codebook.update(*ALONE)
        assert metrics["dead_share"] == (5 / 8 if step == 1 else 0.0)
    codes = made.codebook()
    # The highest priorities were those of the last features, which went to the first dead codes.
    torch.testing.assert_close(codes[3:8], features.flip(0)[:5], rtol=1e-4, atol=1e-4)
    share = (8 * 0.25 + 20 * 0.75) / 8  # of uses a step, in the average: all codes began with one
    assert torch.equal(made.codebook.usage[3:8], torch.full((5,), share).double())
    assert (made.codebook.priority == -1).all()


def test_no_more_codes_are_revived_than_there_are_vectors() -> None:
    made = quantizer(decay=0.5, revive=True, dead_below=0.2)
    far_off(made, 3)
    metrics, step = {"dead_share": 0.0}, 0
    while not metrics["dead_share"]:
        features = numbers(2, CHANNELS, seed=step)
        observe(made, features)
        metrics, step = made.codebook.update(*ALONE), step + 1
    assert metrics["dead_share"] >= 5 / 8
    assert (torch.cdist(made.codebook(), features) < 1e-3).sum() == 2


def test_without_revival_they_stay() -> None:
    made = quantizer(decay=0.5, dead_below=0.2)
    far_off(made, 3)
    for step in range(4):
        observe(made, numbers(20, CHANNELS, seed=step))
        metrics = made.codebook.update(*ALONE)
    assert metrics["dead_share"] >= 5 / 8
    assert "priority" not in dict(made.codebook.named_buffers())


def test_normalized_codes_that_nothing_uses_keep_their_direction() -> None:
    """Shorter ones would be nearest to every vector that is far from all codes."""
    made = quantizer(decay=0.5, normalize=True)
    made.codebook.float()
    start = made.codebook().clone()
    for _ in range(300):  # to 0.5^300 of the start, which fp32 has no number for
        observe(made, start[:1].repeat(9, 1))
        made.codebook.update(*ALONE)
    torch.testing.assert_close(made.codebook(), start)


def test_the_search_is_fp32_under_autocast_and_with_bf16_features() -> None:
    torch.manual_seed(0)
    made = Quantizer(QuantizerConfig(64), 16)
    features = torch.randn(200, 16)
    expected = nearest(features, made.codebook())
    with torch.autocast("cpu", torch.bfloat16):
        found = made.quantize(features)
        assert torch.equal(made.quantize(features.bfloat16()).tokens, nearest(features.bfloat16(), made.codebook()))
    assert torch.equal(found.tokens, expected)
    assert found.vectors.dtype == found.loss.dtype == torch.float32


def test_perplexity() -> None:
    assert perplexity(torch.tensor([2.0, 2.0, 0.0, 2.0])).item() == pytest.approx(3.0)
    assert perplexity(torch.tensor([5.0, 0.0])).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 1}, "codebook_size: 1; must be from 2 to 1048576"),
        ({"code_channels": 0}, "code_channels: 0; must be from 1 to 65536, or null for no projection"),
        ({"learned_by": "ema"}, "learned_by: 'ema'; must be one of averages, gradient"),
        ({"estimator": "st"}, "estimator: 'st'; must be one of straight_through, rotation"),
        ({"decay": 1.0}, "decay: 1.0; must be above 0 and below 1"),
        ({"decay": 0.0}, "decay: 0.0; must be above 0 and below 1"),  # a code that nothing is nearest to would be 0
        ({"commitment_weight": -1.0}, "commitment_weight: -1.0; must be a number of at least 0"),
        ({"kmeans_steps": -1}, "kmeans_steps: -1; must be at least 0"),
        ({"dead_below": 1.0}, "dead_below: 1.0; must be at least 0 and below 1"),
        ({"learned_by": "gradient", "revive": True}, "revive: true; goes with learned_by: averages."),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    assert QuantizerConfig().problem() is None
    problem = dataclasses.replace(QuantizerConfig(), **changes).problem()
    assert problem is not None
    assert problem.startswith(message)
