"""Products by what is fastest: torch's values and derivatives, counted FLOPs, and what is left to torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from gmdist.nets import products
from gmdist.nets.blocks import attention
from gmdist.nets.products import Conv2d, Linear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "IS_ONEDNN_FASTER", True)


@needs_onednn
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


@needs_onednn
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_convolves_single_pixels_in_one_thread(bias: bool, layout: torch.memory_format, by_onednn: None) -> None:
    torch.manual_seed(0)
    layer = Conv2d(24, 40, 1, bias=bias)
    x = torch.randn(3, 24, 9, 8).to(memory_format=layout).requires_grad_()
    asked = torch.randn(3, 40, 9, 8)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with profile() as called:
            y = layer(x)
    finally:
        torch.set_num_threads(num_threads)
    assert "aten::mkldnn_convolution" in {event.name for event in called.events()}
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *layer.parameters())]
    expected = F.conv2d(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(y, [x, *layer.parameters()], asked, create_graph=True)
    wanted = torch.autograd.grad(expected, exact, asked.double(), create_graph=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)
    (twice,) = torch.autograd.grad(found[0].square().sum(), layer.weight)
    torch.testing.assert_close(
        twice.double(), torch.autograd.grad(wanted[0].square().sum(), exact[1])[0], rtol=1e-5, atol=1e-3
    )


@needs_onednn
def test_products_are_counted_as_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer, x in (
        (Linear(24, 40), torch.randn(64, 24, requires_grad=True)),
        (Conv2d(24, 40, 1), torch.randn(2, 24, 8, 4, requires_grad=True)),
    ):
        counts = []
        for is_faster in (True, False):
            monkeypatch.setattr(products, "IS_ONEDNN_FASTER", is_faster)
            with FlopCounterMode(display=False) as counter:
                layer(x).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts == [3 * 2 * 64 * 24 * 40] * 2


@needs_onednn
def test_few_rows_and_other_precisions_are_left_to_torch(by_onednn: None) -> None:
    layer = Linear(24, 40)
    for x in (torch.randn(63, 24), torch.randn(64, 24).double()):
        of_torch = torch.nn.Linear(24, 40).to(x.dtype)
        of_torch.load_state_dict(layer.state_dict())
        assert torch.equal(layer.to(x.dtype)(x), of_torch(x))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(64, 24)).dtype == torch.bfloat16


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "HAS_BF16", False)


LAYERS = {
    "linear": (lambda: Linear(24, 40), (2, 64, 24)),
    "linear without bias": (lambda: Linear(24, 40, bias=False), (64, 24)),
    "convolution": (lambda: Conv2d(6, 10, 3, padding=1), (2, 6, 9, 8)),
    "strided convolution without bias": (lambda: Conv2d(6, 10, (4, 3), stride=2, bias=False), (2, 6, 9, 8)),
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_bf16_in_fp32_is_the_product_of_rounded_operands_rounded(name: str, autocast: bool, without_bf16: None) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(shape)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    x.requires_grad_()
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.dtype) or tensor, lambda kept: kept),
    ):
        y = layer(x)
    assert set(kept) == {torch.bfloat16}
    asked = torch.randn(y.shape).bfloat16()
    y.backward(asked)
    exact = make().double()
    exact.load_state_dict({key: value.bfloat16() for key, value in layer.state_dict().items()})
    like = x.detach().bfloat16().double().requires_grad_()
    expected = exact(like)
    expected.backward(asked.double())
    pairs = [(y, expected), (x.grad, like.grad)]
    pairs += [(ours.grad, of.grad) for ours, of in zip(layer.parameters(), exact.parameters(), strict=True)]
    for found, wanted in pairs:
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.double(), wanted, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_bf16_in_fp32_can_be_differentiated_twice(
    name: str, without_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "IS_ONEDNN_FASTER", False)  # of oneDNN in fp32, which it is compared with, only once
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape, requires_grad=True)
    penalties = []
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = layer(x).float().square().sum()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), [x, layer.weight]))
    for found, wanted in zip(*penalties, strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_bf16_in_fp32_counts_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for make, shape in LAYERS.values():
        layer, x = make().bfloat16(), torch.randn(shape).bfloat16().requires_grad_()
        counts = []
        for has_bf16 in (True, False):
            monkeypatch.setattr(products, "HAS_BF16", has_bf16)
            with FlopCounterMode(display=False) as counter:
                layer(x).float().sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_attention_without_bf16_stays_bf16_outside(without_bf16: None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 300, 8).bfloat16().requires_grad_()
    attended = attention(query, key, value)
    assert attended.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(attended.double(), exact.transpose(1, 2).flatten(2), rtol=2.0**-8, atol=1e-5)
    attended.sum().backward()


def test_float64_is_left_alone(without_bf16: None) -> None:
    for make, shape in LAYERS.values():
        with torch.autocast("cpu", torch.bfloat16):
            assert make().double()(torch.randn(shape, dtype=torch.float64)).dtype == torch.float64


def test_attention_is_counted() -> None:
    query, key, value = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    with FlopCounterMode(display=False) as counter:
        attention(query, key, value).sum().backward()
    # Scores and sums; in the backward the gradients of both operands of both, and the scores again.
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 3 * 5 * 7 * 8)


@pytest.mark.parametrize(
    ("flags", "has_bf16"),
    [
        ({"fpu", "avx", "avx2", "avx512f"}, False),
        ({"avx", "avx512f", "avx512_bf16"}, True),
        ({"avx", "avx512f", "amx_bf16"}, True),
        ({"avx", "avx2", "avx_ne_convert"}, True),
        ({"fp", "asimd", "bf16"}, True),  # not x86: torch decides
        (set(), True),
    ],
)
def test_which_processors_multiply_bf16(flags: set[str], has_bf16: bool) -> None:
    assert products._has_bf16(frozenset(flags)) == has_bf16
