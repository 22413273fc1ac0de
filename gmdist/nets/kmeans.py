"""Nearest neighbours among codes, and k-means: exact, and in memory that does not grow with both numbers."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gmdist.nets.blocks import at_least_fp32
from gmdist.nets.sums import add_rows

_CHUNK_ELEMENTS = 1 << 22  # distances at once: 16 MiB in fp32
_BLOCK = 128  # codes of which the least distance is found at first
_EXACT_COPIES = 16  # of a vector's fp32 elements, while two distances of it are summed in float64
_ROUNDS = 64


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor, chunk_elements: int = _CHUNK_ELEMENTS) -> Tensor:
    """The code nearest to each vector; of equally near ones the first. fp32 at least, in autocast too.

    A product of matrices finds two candidates. Where rounding may have changed their order, their distances are summed
    in float64: what is rounded in the product depends on its shape, and a vector's code would depend on what is looked
    up beside it. Where rounding may have hidden the nearest behind both, which is rare unless codes are equal or far
    from their mean, it is sought again.

    Args:
        vectors: [N, D].
        codes: [K, D].
        chunk_elements: the most distances that are held at once; of one vector, all are.

    Returns:
        int64 [N].
    """
    vectors, codes = at_least_fp32(vectors), at_least_fp32(codes)
    with torch.autocast(vectors.device.type, enabled=False):
        pairs = torch.empty(len(vectors), 2, dtype=torch.long, device=vectors.device)
        is_first, is_sure = torch.empty_like(pairs, dtype=torch.bool).unbind(dim=1)
        start = 0
        for chunk, distances, errors in _distances(vectors, codes, chunk_elements):
            part = slice(start, start := start + len(chunk))
            pairs[part], gap, lead = _two_least(distances)
            is_first[part], is_sure[part] = gap > 2.0 * errors, lead > 2.0 * errors
        found = pairs[:, 0].clone()
        for rows in (~is_first).nonzero().squeeze(1).split(max(1, chunk_elements // (_EXACT_COPIES * codes.shape[1]))):
            pair = pairs[rows].sort(dim=1).values  # [n, 2]
            exact = _exact(vectors[rows][:, None], codes[pair])
            found[rows] = pair.gather(1, exact.argmin(dim=1, keepdim=True)).squeeze(1)
        unsure = (~is_sure).nonzero().squeeze(1)
        if len(unsure):
            found[unsure] = _nearest_of_all(vectors[unsure], codes, found[unsure], chunk_elements)
    return found


def _distances(vectors: Tensor, codes: Tensor, chunk_elements: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """By parts of the vectors: they themselves [n, D], |x - c|^2 / 2 less |x|^2 / 2 [n, K], and its largest error [n].

    The next part overwrites the distances.
    """
    center = codes.mean(dim=0)  # what all have in common would cost digits
    centered = codes - center
    half_norms = 0.5 * centered.square().sum(dim=1)
    longest = (2.0 * half_norms.max()).sqrt()
    # Of a sum of D products, each of two rounded factors, in any order (Higham 2002, Eq. 3.5), and of two more sums.
    info = torch.finfo(codes.dtype)
    unit, least = (codes.shape[1] + 8) * 0.5 * info.eps, (codes.shape[1] + 8) * info.tiny
    chunks = vectors.split(max(1, chunk_elements // max(codes.shape)))
    room = vectors.new_empty(len(chunks[0]), len(codes))  # once: memory would be freed in pieces
    for chunk in chunks:
        moved = chunk - center
        distances = torch.addmm(half_norms, moved, centered.t(), alpha=-1.0, out=room[: len(chunk)])
        yield chunk, distances, unit * longest * (moved.norm(dim=1) + 0.5 * longest) + least


def _exact(vectors: Tensor, codes: Tensor) -> Tensor:
    """Squared distances [...] of [..., D], in float64."""
    return (vectors.double() - codes.double()).square().sum(dim=-1)


def _nearest_of_all(vectors: Tensor, codes: Tensor, found: Tensor, chunk_elements: int) -> Tensor:
    """The same int64 [n], in float64, of all codes that rounding leaves; `found` where distances are not finite."""
    parts, start, size = [], 0, len(codes)
    # Of equal ones the first stands for all: where many are, as dead ones may be, each vector would have as many pairs.
    codes, which = codes.unique(dim=0, return_inverse=True)
    first_of = which.new_full((len(codes),), size).scatter_reduce(0, which, torch.arange(size).to(which), "amin")
    for chunk, distances, errors in _distances(vectors.double(), codes.double(), chunk_elements // 2):
        is_near = distances <= (distances.amin(dim=1) + 2.0 * errors)[:, None]
        rows, places = is_near.nonzero().unbind(dim=1)  # one place a row, more only where codes are as good as equal
        pairs = zip(*(part.split(max(1, chunk_elements // codes.shape[1])) for part in (rows, places)), strict=True)
        exact = torch.cat([_exact(chunk[row], codes[place]) for row, place in pairs])
        least = exact.new_full((len(chunk),), math.inf).scatter_reduce(0, rows, exact, "amin")
        first = torch.where(exact == least[rows], first_of[places], size)
        best = torch.full_like(found[: len(chunk)], size).scatter_reduce(0, rows, first, "amin")
        parts.append(torch.where(best < size, best, found[start : (start := start + len(chunk))]))
    return torch.cat(parts)


def _two_least(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the two least of each row are, and by how much the first is less than the second and than all others.

    They are in the two blocks with the least minima, which are found many times faster than places are.

    Returns:
        int64 [n, 2] of [n, K], the least first, of equal ones the first; by how much the first is less than the second
        [n]; and than all others [n], infinite where there are none.
    """
    width = math.gcd(rows.shape[1], _BLOCK)
    if rows.shape[1] > _BLOCK and width > 1:
        blocks = rows.unflatten(1, (-1, width))  # [n, K / width, width]
        which, _, lead = _two_least(blocks.amin(dim=2))
        which = which.sort(dim=1).values  # [n, 2]
        nearby = blocks.gather(1, which[:, :, None].expand(-1, -1, width)).flatten(1)  # [n, 2 * width]
        places, gap, nearby_lead = _two_least_plainly(nearby)
        places = width * which.gather(1, places // width) + places % width
        return places, gap, torch.minimum(lead, nearby_lead)
    return _two_least_plainly(rows)


def _two_least_plainly(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, by looking at all three times; `rows` loses its two least."""
    first = rows.argmin(dim=1, keepdim=True)
    least = rows.gather(1, first)
    second = rows.scatter_(1, first, math.inf).argmin(dim=1, keepdim=True)
    gap = rows.gather(1, second) - least
    others = rows.scatter_(1, second, math.inf).amin(dim=1, keepdim=True)
    return torch.cat([first, second], dim=1), gap.squeeze(1), (others - least).squeeze(1)


def sums_of(vectors: Tensor, tokens: Tensor, num_codes: int) -> Tensor:
    """The sums of the vectors [N, D] of each code, and their numbers: [K, D + 1], for int64 tokens [N]."""
    rows = torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1)
    return add_rows(rows.new_zeros(num_codes, rows.shape[1]), tokens, rows)


@torch.no_grad()
def kmeans(vectors: Tensor, count: int, steps: int, draw: Callable[[int], Tensor], *, normalize: bool) -> Tensor:
    """Centres [K, D] of vectors [N, D], by Lloyd's algorithm from a start as that of k-means++ (Arthur 2007).

    The start is drawn in rounds, K/64 of the centres each, with probabilities as the squared distances from those
    that were drawn before: without replacement, by the largest of d^2 / Exp(1) (Efraimidis 2006). Equal vectors that
    are drawn in one round are two equal centres, of which the second stays without vectors.

    Args:
        vectors: at least K; fp32.
        count: K.
        steps: of Lloyd's algorithm. A centre that no vector is nearest to stays where it is.
        draw: round -> uniform numbers in [0, 1), [N].
        normalize: whether centres have length 1, as the vectors do.
    """
    assert count <= len(vectors), (count, len(vectors))
    centers, distances = vectors[:0], torch.ones_like(vectors[:, 0])
    for number in range(_ROUNDS):
        size = (number + 1) * count // _ROUNDS - len(centers)
        if size == 0:
            continue
        picked = (distances / -torch.log(draw(number))).topk(size).indices
        fresh = vectors[picked]
        nearby = (vectors - fresh[nearest(vectors, fresh)]).square().sum(dim=1)
        distances = torch.minimum(distances, nearby) if len(centers) else nearby
        centers = torch.cat([centers, fresh])
    for _ in range(steps):
        sums, counts = sums_of(vectors, nearest(vectors, centers), count).split([vectors.shape[1], 1], dim=1)
        centers = torch.where(counts > 0, sums / counts.clamp(min=1.0), centers)
        centers = F.normalize(centers, dim=1) if normalize else centers
    return centers
