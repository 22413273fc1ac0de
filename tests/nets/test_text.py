"""Texts as bytes, and the encoder that is trained along."""

import pytest
import torch

from gmdist.nets.text import BEGIN, END, PAD, TextConfig, TextEncoder, tokenize

CONFIG = TextConfig(channels=16, depth=2, num_heads=2, max_length=10)


def test_tokens_are_bytes_between_begin_and_end() -> None:
    tokens, cut = tokenize(["hé", ""], 8)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [BEGIN, ord("h"), 0xC3, 0xA9, END, PAD, PAD, PAD],
        [BEGIN, END, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert cut == [False, False]


@pytest.mark.parametrize(
    ("text", "kept"),
    [("abcdef", "abcdef"), ("abcdefg", "abcdef"), ("abcdeé", "abcde"), ("日本語", "日本"), ("🦊🦊", "🦊")],
)
def test_long_texts_are_cut_between_characters(text: str, kept: str) -> None:
    tokens, cut = tokenize([text], 8)
    length = len(kept.encode())
    assert bytes(tokens[0, 1 : 1 + length].tolist()).decode() == kept
    assert tokens[0, 1 + length] == END
    assert cut == [text != kept]


def test_what_has_no_utf8_is_a_question_mark() -> None:
    assert tokenize(["a\ud800"], 5)[0].tolist() == [[BEGIN, ord("a"), ord("?"), END, PAD]]


def test_no_texts_and_the_shortest_length() -> None:
    assert tokenize([], 4)[0].shape == (0, 4)
    assert tokenize(["abc", ""], 2)[0].tolist() == [[BEGIN, END]] * 2
    assert tokenize(["abc", ""], 2)[1] == [True, False]


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    with torch.no_grad():
        context, mask = encoder(tokenize(["fox", "a cat"], 10)[0])
        short, _ = encoder(tokenize(["fox"], 5)[0])
    assert context.shape == (2, 10, 16)
    assert context.dtype == torch.float32
    assert mask.sum(1).tolist() == [5, 7]
    torch.testing.assert_close(context[0, :5], short[0])


def test_order_matters() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    context, _ = encoder(tokenize(["ab", "ba"], 4)[0])
    assert (context[0, 0] - context[1, 0]).abs().max() > 1e-5  # what the begin token has gathered


def test_gradients_reach_every_parameter() -> None:
    encoder = TextEncoder(CONFIG)
    context, mask = encoder(tokenize(["a cat", "a fox, longer than that"], 10)[0])
    (context * torch.randn_like(context) * mask[:, :, None]).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (TextConfig(channels=10, num_heads=4), "num_heads: 4; must divide the width 10"),
        (TextConfig(depth=0), "depth: 0; must be at least 1"),
        (TextConfig(max_length=1), "max_length: 1; must be from 2"),
    ],
)
def test_what_cannot_be_is_named(config: TextConfig, problem: str) -> None:
    assert CONFIG.problem() is None
    assert (config.problem() or "").startswith(problem)
