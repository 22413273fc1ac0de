"""Linear layers by oneDNN: torch's values and derivatives, counted FLOPs, and where they are left to torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gmdist.nets import linear
from gmdist.nets.linear import Linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_derivatives_are_those_of_float64(bias: bool, by_onednn: None) -> None:
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias)
    x = torch.randn(2, 64, 24, requires_grad=True)
    asked = torch.randn(2, 64, 40)
    y = layer(x)
    y.backward(asked)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *layer.parameters())]
    expected = F.linear(*exact)
    expected.backward(asked.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip((x, *layer.parameters()), exact, strict=True):
        assert found.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=1e-4)


def test_products_are_counted_as_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(24, 40), torch.randn(64, 24, requires_grad=True)
    counts = []
    for is_faster in (True, False):
        monkeypatch.setattr(linear, "onednn_is_faster", lambda is_faster=is_faster: is_faster)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 64 * 24 * 40] * 2


def test_few_rows_and_other_precisions_are_left_to_torch(by_onednn: None) -> None:
    layer = Linear(24, 40)
    for x in (torch.randn(63, 24), torch.randn(64, 24).double()):
        of_torch = torch.nn.Linear(24, 40).to(x.dtype)
        of_torch.load_state_dict(layer.state_dict())
        assert torch.equal(layer.to(x.dtype)(x), of_torch(x))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(64, 24)).dtype == torch.bfloat16
