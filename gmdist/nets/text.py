"""A small text encoder that is trained along with a denoiser: bytes to context."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.transformer import FeedForward, SelfAttention, heads_problem

# Tokens 0 to 255 are bytes.
BEGIN, END, PAD = 256, 257, 258
VOCABULARY = 259
_MAX_LENGTH = 1 << 16


@dataclass
class TextConfig:
    """Sizes of the text encoder."""

    channels: int = 256  # width of a token, and of the context
    depth: int = 4  # blocks
    num_heads: int = 4
    max_length: int = 128  # tokens: the UTF-8 bytes of a text and two more; longer texts are cut

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if problem := heads_problem(self.channels, self.num_heads):
            return problem
        if self.depth < 1:
            return f"depth: {self.depth}; must be at least 1"
        if not 2 <= self.max_length <= _MAX_LENGTH:
            return f"max_length: {self.max_length}; must be from 2 to {_MAX_LENGTH}"
        return None


def tokenize(texts: list[str], max_length: int) -> tuple[Tensor, list[bool]]:
    """The UTF-8 bytes of texts between a begin and an end token, padded to `max_length` tokens.

    Args:
        texts: N of them. The empty text stands for "no text".
        max_length: tokens, at least 2. Longer texts are cut between characters, and keep their end token.

    Returns:
        Tokens int64 [N, max_length], on the host, and whether each text was cut.
    """
    tokens = torch.full((len(texts), max_length), PAD)
    cut = []
    for row, text in zip(tokens, texts, strict=True):
        whole = text.encode(errors="replace")  # lone surrogates have no UTF-8
        kept = whole[: max_length - 2]
        cut.append(len(kept) < len(whole))
        if cut[-1]:
            kept = kept.decode(errors="ignore").encode()
        row[: len(kept) + 2] = torch.tensor([BEGIN, *kept, END])
    return tokens, cut


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
        self.tokens = nn.Embedding(VOCABULARY, config.channels)
        self.position_embedding = nn.Parameter(torch.empty(config.max_length, config.channels))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.channels)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [N, L] as `tokenize` gives them -> context [N, L, C], at least fp32, and its mask.

        The mask is bool [N, L], True for tokens, False for padding: what lies in the context there has no meaning.
        """
        mask = tokens != PAD
        x = self.tokens(tokens) + self.position_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return at_least_fp32(self.norm_out(x)), mask
