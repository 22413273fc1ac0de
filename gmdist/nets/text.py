"""A small text encoder that is trained along with a denoiser: words to context, without a vocabulary."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor, nn

from gmdist.checks import at_least, between
from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.transformer import FeedForward, SelfAttention, heads_problem

PAD, BEGIN, END = 0, 1, 2
_WORDS = 3  # tokens from here on are words
_BUCKETS = 4096  # of each of the two hashes that make a word's embedding
_MAX_LENGTH = 1 << 16
# Where words are not set apart by spaces (Thai to Burmese, Khmer; from U+2E80 on Chinese, Japanese, emoji), a character
# is a word.
_ALONE = "\u0e00-\u109f\u1780-\u17ff\u2e80-\U0010ffff"
# What stands on or between the letters of a word, and is no letter to `re`: vowels of Hindi, accents, joiners.
_MARKS = "".join(c for c in map(chr, range(0x2E80)) if unicodedata.category(c)[0] == "M") + "\u200c\u200d"
_WORD = re.compile(f"[{_ALONE}]|[^\\W{_ALONE}](?:(?![{_ALONE}])[\\w{_MARKS}])*|[^\\w\\s]")


@dataclass
class TextConfig:
    """Sizes of the text encoder."""

    channels: int = 256  # width of a token, and of the context
    depth: int = 4  # blocks
    num_heads: int = 4
    max_length: int = 64  # tokens: the words and signs of a text and two more; longer texts are cut

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        return (
            heads_problem(self.channels, self.num_heads)
            or at_least(1, depth=self.depth)
            or between(2, _MAX_LENGTH, max_length=self.max_length)
        )


def tokenize(texts: list[str], max_length: int) -> tuple[Tensor, list[bool]]:
    """The words and signs of texts between a begin and an end token, padded to `max_length` tokens.

    Args:
        texts: N of them. The empty text stands for "no text". Upper case is as lower case, and so are other ways to
            write the same signs in Unicode (NFKC).
        max_length: tokens, at least 2. Longer texts are cut, and keep their end token.

    Returns:
        Tokens int64 [N, max_length], on the host, and whether each text was cut.
    """
    tokens = torch.full((len(texts), max_length), PAD)
    cut = []
    for row, text in zip(tokens, texts, strict=True):
        words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        kept = [_token(word) for word in words[: max_length - 2]]
        cut.append(len(kept) < len(words))
        row[: len(kept) + 2] = torch.tensor([BEGIN, *kept, END])
    return tokens, cut


@lru_cache(maxsize=1 << 16)
def _token(word: str) -> int:
    """A word by its hash: two words have the same token once in 17 million pairs."""
    digest = blake2b(word.encode(errors="replace"), digest_size=8).digest()  # lone surrogates have no UTF-8
    return _WORDS + int.from_bytes(digest, "little") % _BUCKETS**2


class WordEmbedding(nn.Module):
    """Embeddings of words by their hashes: each is the sum of two out of few (Svenstrup 2017, "Hash embeddings")."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(_WORDS + 2 * _BUCKETS, channels)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [N, L] -> [N, L, C]."""
        word = tokens - _WORDS
        first = torch.where(word < 0, tokens, _WORDS + word % _BUCKETS)
        second = torch.where(word < 0, tokens, _WORDS + _BUCKETS + word // _BUCKETS)
        return self.table(first) + self.table(second)


class TextBlock(nn.Module):
    """Self-attention and feed-forward, each residual after a norm (Xiong 2020, Fig. 1b)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.channels
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, config.num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens [N, L, C], mask bool [N, L] -> [N, L, C]."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.feed_forward(self.norm2(x))


BLOCKS = (TextBlock,)  # what families list as `blocks`: compiled, and computed again in the backward, as one


class TextEncoder(nn.Module):
    """A transformer over the tokens of a text, every token seeing every other."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.words = WordEmbedding(config.channels)
        self.position_embedding = nn.Parameter(torch.empty(config.max_length, config.channels))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.channels)
        nn.init.normal_(self.position_embedding, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [N, L] as `tokenize` gives them -> context [N, L, C], at least fp32, and its mask.

        The mask is bool [N, L], True for tokens, False for padding: what lies in the context there has no meaning.
        """
        mask = tokens != PAD
        x = self.words(tokens) + self.position_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return at_least_fp32(self.norm_out(x)), mask
