"""Images as grids of codes, for families that draw code by code: tokens of a tokenizer, or the levels of pixels."""

import torch
from torch import Tensor, nn

from gmdist.errors import ConfigError, DataError
from gmdist.families.family import Batch, Surroundings
from gmdist.families.first_stage import open_first_stage
from gmdist.families.tokenizer import Tokenizer

_LEVELS = 256  # of a byte


class Coding(nn.Module):
    """What a prior knows of its codes."""

    shape: tuple[int, int, int]  # codes of an image: channels, rows, columns
    num_codes: int  # they are 0 to num_codes - 1
    cached: tuple[str, ...] = ()  # of a batch, any of which may be in place of its image

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__()
        self.image_size = surroundings.image_size

    def of_batch(self, batch: Batch) -> Tensor:
        """The codes of a batch, int64 [N, *shape]; for a loss: it does not wait for the device."""
        raise NotImplementedError

    def checked(self, batch: Batch) -> Tensor:
        """The same; DivergedError where what makes codes of images is not finite."""
        return self.of_batch(batch)

    def of_images(self, images: Tensor) -> Tensor:
        """The codes of images [N, C, H, W] in [-1, 1], int64 [N, *shape]."""
        raise NotImplementedError

    def shown(self, codes: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] of codes int64 [N, *shape]."""
        raise NotImplementedError

    def check(self, batch: Batch) -> None:
        """ConfigError or DataError for codes that were made before by something else; waits for the device."""

    def begun(self, rows: Tensor) -> tuple[Tensor, int]:
        """The codes of images whose first rows of pixels are given.

        An encoder sees the last of these rows repeated in place of those that are not given, so codes at the edge may
        differ from those of the whole image.

        Args:
            rows: [N, C, R, W] in [-1, 1].

        Returns:
            int64 [N, *shape], and how many of its first rows have a meaning: those whose pixels are all given.

        Raises:
            ConfigError: images of another width, or that give no whole row of codes, or all.
        """
        size, pixels = self.image_size, self.image_size // self.shape[1]  # of a row of codes
        height, width = rows.shape[2:]
        if pixels == size:
            raise ConfigError("an image is one row of codes here: nothing is left to be drawn below given rows")
        if width != size or not pixels <= height < size:
            raise ConfigError(
                f"{width}x{height} pixels; must be {size} wide, and from {pixels} to {size - 1} high: of each {pixels} "
                "rows of pixels a row of codes is kept, and the rest is drawn"
            )
        whole = torch.cat([rows, rows[:, :, -1:].expand(-1, -1, size - height, -1)], dim=2)
        return self.of_images(whole), height // pixels


class Pixels(Coding):
    """Each channel of each pixel by its level."""

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self.shape = (surroundings.image_channels, surroundings.image_size, surroundings.image_size)
        self.num_codes = _LEVELS

    def of_batch(self, batch: Batch) -> Tensor:
        return self.of_images(batch["image"])

    def of_images(self, images: Tensor) -> Tensor:
        return ((images + 1.0) * ((_LEVELS - 1) / 2)).round().long().clamp(0, _LEVELS - 1)

    def shown(self, codes: Tensor) -> Tensor:
        return codes / ((_LEVELS - 1) / 2) - 1.0


class Tokens(Coding):
    """The codes that a frozen tokenizer makes of images; they may have been made before."""

    cached = ("tokens",)

    def __init__(self, run: str, surroundings: Surroundings) -> None:
        """Open the tokenizer's run; ConfigError or CheckpointError as `open_first_stage`."""
        super().__init__(surroundings)
        tokenizer = open_first_stage(run, Tokenizer, "a tokenizer, whose latents are codes", surroundings)
        self.shape, self.num_codes = (1, *tokenizer.token_shape), tokenizer.codebook_size
        self.tokenizer, self._run = tokenizer, run
        for name, _ in list(tokenizer.named_children()):
            if name not in tokenizer.averaged:  # a discriminator has no place in a prior's checkpoints
                setattr(tokenizer, name, None)

    def of_batch(self, batch: Batch) -> Tensor:
        if "tokens" not in batch:
            with torch.autocast(batch["image"].device.type, enabled=False), torch.no_grad():
                return self.tokenizer.tokens(batch["image"])[:, None]
        if batch["tokens"].is_cpu:  # elsewhere only the first ones are looked at: every step would wait for the device
            self.check(batch)
        return batch["tokens"].long()[:, None]

    def checked(self, batch: Batch) -> Tensor:
        return self.of_batch(batch) if "tokens" in batch else self.of_images(batch["image"])

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)["tokens"][:, None]

    def shown(self, codes: Tensor) -> Tensor:
        return self.tokenizer.decode(codes[:, 0]).float().clamp(-1.0, 1.0)

    def check(self, batch: Batch) -> None:
        if "tokens" not in batch:
            self.of_images(batch["image"])  # which looks at the first stage, too
            return
        tokens = batch["tokens"]
        if tokens.shape[1:] != self.shape[1:] or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise ConfigError(
                f"data.arrays: 'tokens.npy'; they are {str(tokens.dtype).removeprefix('torch.')} "
                f"{list(tokens.shape[1:])}, and those of {self._run} are integers {list(self.shape[1:])}: encode the "
                "data set with it"
            )
        low, high = (bound.item() for bound in tokens.long().aminmax())
        if low < 0 or high >= self.num_codes:
            raise DataError(
                f"data.arrays: 'tokens.npy'; holds the code {low if low < 0 else high}, and those of {self._run} are 0 "
                f"to {self.num_codes - 1}: encode the data set with it"
            )
