"""Random numbers keyed by sample: a pure function of (seed, purpose, key), whoever computes it.

The generator is Philox4x32-10 (Salmon 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter goes through ten
rounds of multiplication under a key. The key is a hash of the seed and the purpose, the counter holds the sample's
number and the position in its tensor. So no state exists to save, share or lose: the noise of sample 12,345 does not
depend on the batch, the worker or the step in which it is drawn.
"""

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words out of a counter of four 32-bit words and a key of two.

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit words wraps in int64, but its 64 bits are right: the mask drops the sign's copies.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def bits(seed: int, purpose: str, keys: Tensor, count: int) -> Tensor:
    """Independent 32-bit words for each key.

    Args:
        seed: any integer.
        purpose: what the numbers are for ("noise", "timestep", ...); purposes are independent of each other.
        keys: int64 [N], the samples' numbers.
        count: words a key.

    Returns:
        int64 [N, count], values in [0, 2**32).
    """
    blocks = torch.arange((count + 3) // 4, device=keys.device)[None, :]
    low = (keys & _MASK)[:, None]
    high = ((keys >> 32) & _MASK)[:, None]
    words = philox((blocks, torch.zeros_like(blocks), low, high), _key(seed, purpose))
    return torch.stack([word.expand(len(keys), -1) for word in words], dim=2).flatten(1)[:, :count]


def uniform(seed: int, purpose: str, keys: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in [0, 1) with 24 bits: float32 [N, *shape] for int64 keys [N]."""
    words = bits(seed, purpose, keys, math.prod(shape))
    return ((words >> 8).float() * 2.0**-24).view(len(keys), *shape)


def normal(seed: int, purpose: str, keys: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers by Box and Muller: float32 [N, *shape] for int64 keys [N]."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    words = bits(seed, purpose, keys, 2 * pairs)
    # The radius takes its words in (0, 1], so that the logarithm is finite; all 32 bits keep the tail, to 6.6 sigma.
    radius = torch.sqrt(-2.0 * torch.log((words[:, :pairs].float() + 1.0).mul_(2.0**-32).clamp_(max=1.0)))
    angle = words[:, pairs:].float().mul_(2.0 * math.pi * 2.0**-32)
    numbers = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return numbers[:, :count].reshape(len(keys), *shape)


def quantiles(seed: int, purpose: str, keys: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers inside (0, 1) with all 32 bits: float64 [N, *shape] for int64 keys [N]."""
    words = bits(seed, purpose, keys, math.prod(shape))
    return ((words.double() + 0.5) * 2.0**-32).view(len(keys), *shape)


def integers(seed: int, purpose: str, keys: Tensor, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Integers in [0, high): int64 [N, *shape] for int64 keys [N]; high at most 2**31.

    Multiply and shift (Lemire 2019): the bias is below high / 2**32.
    """
    assert 0 < high <= 2**31, high
    words = bits(seed, purpose, keys, math.prod(shape))
    return ((words * high) >> 32).view(len(keys), *shape)


def derive(seed: int, purpose: str, number: int) -> int:
    """A seed in [0, 2**63) for a generator with state of its own, as a pure function."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
