"""Texts as words, and the encoder that is trained along."""

import pytest
import torch

from gmdist.nets.text import BEGIN, END, PAD, TextConfig, TextEncoder, tokenize

CONFIG = TextConfig(channels=16, depth=2, num_heads=2, max_length=10)


def words_of(text: str) -> list[int]:
    """Its tokens, without the first, the last and those that fill up."""
    return [token for token in tokenize([text], 32)[0][0].tolist() if token > END]


def test_tokens_are_words_and_signs_between_begin_and_end() -> None:
    tokens, cut = tokenize(["a small cat", ""], 6)
    assert tokens.dtype == torch.int64
    (a,), (small,), (cat,) = words_of("a"), words_of("small"), words_of("cat")
    assert tokens.tolist() == [[BEGIN, a, small, cat, END, PAD], [BEGIN, END, PAD, PAD, PAD, PAD]]
    assert cut == [False, False]
    assert len({a, small, cat}) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Latin  Small\tletter é\n", ["latin", "small", "letter", "é"]),
        ("sans-serif, bold", ["sans", "-", "serif", ",", "bold"]),
        ("日本語x🦊🦊", ["日", "本", "語", "x", "🦊", "🦊"]),
        ("a_b c3", ["a_b", "c3"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("ดีมาก xี", ["ด", "ี", "ม", "า", "ก", "x", "ี"]),
        ("日\u0301x", ["日", "\u0301", "x"]),
        ("cafe\N{COMBINING ACUTE ACCENT} \N{FULLWIDTH LATIN CAPITAL LETTER A}", ["café", "a"]),
    ],
)
def test_where_words_begin_and_end(text: str, words: list[str]) -> None:
    assert words_of(text) == [words_of(word)[0] for word in words]


def test_long_texts_are_cut_between_words() -> None:
    tokens, cut = tokenize(["one two three four", "one two three"], 5)
    assert tokens[0].tolist() == tokens[1].tolist()
    assert tokens[0, -1] == END
    assert cut == [True, False]


def test_tokens_of_words_are_the_same_in_every_process() -> None:
    # blake2b("cat", 8 bytes), little endian, by 4096^2, plus 3: Python's own hash would be another each time.
    assert words_of("cat") == [14_493_494]


def test_what_has_no_utf8_is_taken_as_it_is() -> None:
    assert len(words_of("a \ud800 b")) == 3


def test_no_texts_and_the_shortest_length() -> None:
    assert tokenize([], 4)[0].shape == (0, 4)
    assert tokenize(["a b c", ""], 2)[0].tolist() == [[BEGIN, END]] * 2
    assert tokenize(["a b c", ""], 2)[1] == [True, False]


def test_words_that_share_a_bucket_are_told_apart() -> None:
    torch.manual_seed(0)
    embedding = TextEncoder(CONFIG).words
    first = 5 + 4096 * 7  # the hashes (5, 7)
    tokens = torch.tensor([[3 + first, 3 + first + 1, 3 + first + 4096, PAD, BEGIN, END]])
    vectors = embedding(tokens)[0]
    assert torch.cdist(vectors, vectors).fill_diagonal_(1.0).min() > 1e-3
    torch.testing.assert_close(vectors[0], embedding.table.weight[3 + 5] + embedding.table.weight[3 + 4096 + 7])


def test_padding_does_not_matter() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    with torch.no_grad():
        context, mask = encoder(tokenize(["the quick fox", "a cat and a fox"], 10)[0])
        short, _ = encoder(tokenize(["the quick fox"], 5)[0])
    assert context.shape == (2, 10, 16)
    assert context.dtype == torch.float32
    assert mask.sum(1).tolist() == [5, 7]
    torch.testing.assert_close(context[0, :5], short[0])


def test_order_matters() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(CONFIG).eval()
    context, _ = encoder(tokenize(["a b", "b a"], 4)[0])
    assert (context[0, 0] - context[1, 0]).abs().max() > 1e-5  # what the begin token has gathered


def test_gradients_reach_every_parameter() -> None:
    encoder = TextEncoder(CONFIG)
    context, mask = encoder(tokenize(["a cat", "a fox, longer than that"], 10)[0])
    (context * torch.randn_like(context) * mask[:, :, None]).sum().backward()
    table = encoder.words.table.weight
    assert table.grad is not None
    used = (table.grad != 0).any(dim=1)
    assert used[[BEGIN, END]].all()
    assert used.sum() == 2 + 2 * 7  # a, cat, fox, the comma, longer, than, that
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
