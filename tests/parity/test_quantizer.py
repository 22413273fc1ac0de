"""The quantizer against vector-quantize-pytorch: codes, losses, gradients and moving averages."""

import pytest
import torch
from torch import Tensor, nn

from gmdist.nets.kmeans import nearest, sums_of
from gmdist.nets.quantizer import Quantizer, QuantizerConfig

pytestmark = pytest.mark.parity

CHANNELS, CODES = 12, 32


def peer(**settings) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    return VectorQuantize(dim=CHANNELS, codebook_size=CODES, **settings).train()


def ours(theirs: nn.Module, **settings) -> Quantizer:
    """A quantizer with the weights of the peer's."""
    made = Quantizer(QuantizerConfig(CODES, **settings), CHANNELS)
    with torch.no_grad():
        made.codebook.start(theirs.codebook)
    if settings.get("code_channels") is not None:
        made.project_in.load_state_dict(theirs.project_in.state_dict())
        made.project_out.load_state_dict(theirs.project_out.state_dict())
    return made


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(made: Quantizer, theirs: nn.Module, features: Tensor, weight: float) -> Tensor:
    """Codes, outputs, the commitment loss of a weight, and the gradients of the features; the codes."""
    inputs = [features.clone().requires_grad_() for _ in range(2)]
    found = made.quantize(inputs[0])
    features_expected, tokens_expected, loss_expected = theirs(inputs[1])
    outer = numbers(*features.shape, seed=9)
    assert torch.equal(found.tokens, tokens_expected)
    torch.testing.assert_close(found.features, features_expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight * found.commitment, loss_expected.detach().view(()), rtol=1e-5, atol=1e-7)
    ((found.features * outer).sum() + found.loss).backward()
    ((features_expected * outer).sum() + loss_expected.sum()).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    return found.tokens


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("shape", [(4, 9, CHANNELS), (2, 5, 5, CHANNELS)])
def test_learned_by_gradient(rotation: bool, shape: tuple[int, ...]) -> None:
    # The peer has one loss for features and codes: ours at a commitment weight of 1.
    theirs = peer(learnable_codebook=True, ema_update=False, rotation_trick=rotation)
    estimator = "rotation" if rotation else "straight_through"
    made = ours(theirs, learned_by="gradient", estimator=estimator, commitment_weight=1.0)
    features = numbers(*shape, seed=1).view(shape[0], -1, CHANNELS)
    compare(made, theirs, features, 1.0)
    torch.testing.assert_close(made.codebook.embedding.grad, theirs._codebook.embed.grad[0])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("vectors_a_code", [1, 2, 8])
def test_moving_averages(vectors_a_code: int, rotation: bool, normalize: bool, narrow: bool) -> None:
    width = 5 if narrow else None
    settings = {"use_cosine_sim": normalize, "rotation_trick": rotation, "codebook_dim": width}
    theirs = peer(decay=0.8, commitment_weight=0.25, **settings)
    estimator = "rotation" if rotation else "straight_through"
    made = ours(theirs, decay=0.8, normalize=normalize, code_channels=width, estimator=estimator)
    for step in range(4):
        features = numbers(4, vectors_a_code * CODES // 4, CHANNELS, seed=step)
        compare(made, theirs, features, 0.25)
        found = made.quantize(features)
        made.codebook.observe(found.vectors.flatten(0, 1), found.tokens.flatten())
        made.codebook.update(lambda value: value, lambda value: value)
        torch.testing.assert_close(made.codebook.usage, theirs._codebook.cluster_size[0])
        torch.testing.assert_close(made.codebook.sums, theirs._codebook.embed_avg[0])
        torch.testing.assert_close(made.codebook(), theirs.codebook, rtol=1e-4, atol=1e-5)
    if narrow:
        for part, expected in zip(
            [*made.project_in.parameters(), *made.project_out.parameters()],
            [*theirs.project_in.parameters(), *theirs.project_out.parameters()],
            strict=True,
        ):
            torch.testing.assert_close(part.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_a_step_of_kmeans() -> None:
    from vector_quantize_pytorch.vector_quantize_pytorch import kmeans

    vectors = numbers(300, CHANNELS, seed=3)
    start = vectors[:CODES]
    expected, counts = kmeans(vectors[None], CODES, 1, sample_fn=lambda samples, count: samples[:, :count])
    found = sums_of(vectors, nearest(vectors, start), CODES)
    torch.testing.assert_close(found[:, :-1] / found[:, -1:], expected[0])
    assert torch.equal(found[:, -1].long(), counts[0])
