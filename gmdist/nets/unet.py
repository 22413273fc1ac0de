"""The UNet of denoising diffusion, from DDPM's (Ho 2020) to those of Stable Diffusion (Rombach 2022, Podell 2023)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmdist.nets.blocks import (
    Downsample,
    ResBlock,
    SelfAttention2d,
    Upsample,
    at_least_fp32,
    group_norm,
    norm_groups_problem,
    timestep_embedding,
    widths_problem,
    zero_init,
)
from gmdist.nets.products import Conv2d, Linear
from gmdist.nets.transformer import Transformer2d, TransformerBlock

# What families list as `blocks`: compiled, and computed again in the backward, as one.
BLOCKS = (ResBlock, SelfAttention2d, TransformerBlock)

SIZE_CHANNELS = 256  # of SDXL's embedding of each of its six sizes


@dataclass
class UNetConfig:
    """Sizes of the UNet; the defaults are those of DDPM on CIFAR-10 (35,746,307 parameters without classes).

    With `context_channels`, attention is a transformer that also attends to a context, such as the features of a text.
    """

    channels: int = 128  # width at full resolution
    multipliers: tuple[int, ...] = (1, 2, 2, 2)  # width of each level / channels; every level but the last halves
    num_res_blocks: int = 2  # a level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (1,)  # levels with attention after each residual block; the middle has one too
    num_heads: int = 1  # of each attention, where head_channels is None
    dropout: float = 0.0  # above 0, its masks depend on the number of workers
    head_channels: int | None = None  # width of a head, of which wider levels have more; None: num_heads at all levels
    context_channels: int | None = None  # width of the context; None: no context, and self-attention alone
    transformer_depths: tuple[int, ...] = ()  # blocks of each level's transformers, the last also the middle's; (): 1
    linear_projections: bool = False  # around transformers: linear layers (SD 2, SDXL), or 1x1 convolutions (SD 1)
    vector_channels: int | None = None  # width of a vector that conditions the whole image (SDXL); None: no vector
    norm_groups: int | None = None  # None: at most 32, as many as divide a width and leave each 4 channels or more
    norm_eps: float = 1e-6  # of residual blocks, plain self-attention and the output; transformers have 1e-6
    # As in Ho's own code, and so in the weights published with it, are 1, true and true.
    frequency_shift: int = 0  # of the timestep embedding: 1: the longest period is the last one
    sines_first: bool = False  # in the timestep embedding; false: cosines
    asymmetric_downsampling: bool = False  # padded right and below only; false: on all sides

    @property
    def downsampling(self) -> int:
        """Input side / lowest side: the input's side must be a multiple of it."""
        return 2 ** (len(self.multipliers) - 1)

    def heads(self, width: int) -> int:
        """The number of heads of an attention of this width."""
        return width // self.head_channels if self.head_channels else self.num_heads

    def depth(self, level: int) -> int:
        """The number of blocks of a level's transformers."""
        return self.transformer_depths[level] if self.transformer_depths else 1

    def problem(self) -> str | None:
        """Why these sizes cannot be, as "key: value; what is valid"; None if they can."""
        if problem := widths_problem(self.channels, self.multipliers, self.num_res_blocks):
            return problem
        levels = range(len(self.multipliers))
        if not set(self.attention_levels) <= set(levels):
            return f"attention_levels: {list(self.attention_levels)}; the levels are 0 to {len(levels) - 1}"
        widths = sorted({self.channels * multiplier for multiplier in self.multipliers})
        attended = sorted({self.channels * self.multipliers[level] for level in (*self.attention_levels, levels[-1])})
        if self.head_channels is not None:
            if self.head_channels < 1 or any(width % self.head_channels for width in attended):
                return f"head_channels: {self.head_channels}; must divide the attended widths {attended}"
        elif self.num_heads < 1 or any(width % self.num_heads for width in attended):
            return f"num_heads: {self.num_heads}; must divide the attended widths {attended}"
        if not 0.0 <= self.dropout < 1.0:
            return f"dropout: {self.dropout}; must be at least 0 and below 1"
        for key, value in (("context_channels", self.context_channels), ("vector_channels", self.vector_channels)):
            if value is not None and value < 1:
                return f"{key}: {value}; must be at least 1, or null"
        if self.context_channels is None and (self.transformer_depths or self.linear_projections):
            key = "transformer_depths" if self.transformer_depths else "linear_projections"
            return f"{key}: only transformers have it, and there are none without context_channels"
        if self.transformer_depths and (
            len(self.transformer_depths) != len(levels) or min(self.transformer_depths) < 1
        ):
            depths = list(self.transformer_depths)
            return f"transformer_depths: {depths}; must be a number of at least 1 for each of the {len(levels)} levels"
        if problem := norm_groups_problem(self.norm_groups, sorted({self.channels, *widths})):
            return problem
        if self.frequency_shift not in (0, 1) or self.channels <= 2 * self.frequency_shift:
            return f"frequency_shift: {self.frequency_shift}; must be 0, or 1 for more than 2 channels"
        if not 0.0 < self.norm_eps < 1.0:
            return f"norm_eps: {self.norm_eps}; must be above 0 and below 1"
        return None


def stable_diffusion_1() -> UNetConfig:
    """Stable Diffusion 1.x: 859,520,964 parameters on 4 latent channels, its context CLIP-L's hidden states."""
    return UNetConfig(
        channels=320,
        multipliers=(1, 2, 4, 4),
        attention_levels=(0, 1, 2),
        num_heads=8,
        context_channels=768,
        norm_groups=32,
        norm_eps=1e-5,
    )


def stable_diffusion_2() -> UNetConfig:
    """Stable Diffusion 2.x: 865,910,724 parameters, its context OpenCLIP-H's hidden states."""
    return UNetConfig(
        channels=320,
        multipliers=(1, 2, 4, 4),
        attention_levels=(0, 1, 2),
        head_channels=64,
        context_channels=1024,
        linear_projections=True,
        norm_groups=32,
        norm_eps=1e-5,
    )


def stable_diffusion_xl() -> UNetConfig:
    """SDXL: 2,567,463,684 parameters, its context two text encoders', its vector their pooled text and six sizes."""
    return UNetConfig(
        channels=320,
        multipliers=(1, 2, 4),
        attention_levels=(1, 2),
        head_channels=64,
        context_channels=2048,
        transformer_depths=(1, 2, 10),
        linear_projections=True,
        vector_channels=1280 + 6 * SIZE_CHANNELS,
        norm_groups=32,
        norm_eps=1e-5,
    )


def sizes_embedding(sizes: Tensor) -> Tensor:
    """Original height and width, crop's top and left, target height and width [N, 6], in pixels -> [N, 1536].

    SDXL's `vector` is the pooled text [N, 1280] followed by this (Podell 2023, Sec. 2.2).
    """
    return timestep_embedding(sizes.flatten(), SIZE_CHANNELS).view(len(sizes), -1)


class Stage(nn.Module):
    """A residual block, with attention after it where the level has it."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding: int, config: UNetConfig, attention_depth: int | None
    ) -> None:
        super().__init__()
        norm = (config.norm_groups, config.norm_eps)
        self.residual = ResBlock(in_channels, out_channels, embedding, config.dropout, *norm)
        heads = config.heads(out_channels)
        self.attention: nn.Module | None = None
        if attention_depth is not None and config.context_channels is None:
            self.attention = SelfAttention2d(out_channels, heads, *norm)
        elif attention_depth is not None and config.context_channels is not None:
            self.attention = Transformer2d(
                out_channels,
                heads,
                attention_depth,
                config.context_channels,
                config.linear_projections,
                config.norm_groups,
            )

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """X [N, C_in, H, W], embedding [N, E], context [N, L, D], mask bool [N, L] -> [N, C_out, H, W]."""
        x = self.residual(x, embedding)
        if self.attention is None:
            return x
        return self.attention(x) if context is None else self.attention(x, context, mask)


class UNet(nn.Module):
    """Denoiser of images or latents; `num_classes` adds a class embedding with one more row for "no class"."""

    def __init__(
        self, config: UNetConfig, in_channels: int, num_classes: int = 0, out_channels: int | None = None
    ) -> None:
        """Draw the weights.

        Args:
            config: the sizes.
            in_channels: of the noised input, with what is given beside it: the mask and image of inpainting.
            num_classes: 0 without labels.
            out_channels: None: in_channels.
        """
        super().__init__()
        self.config = config
        self.takes_context = config.context_channels is not None
        embedding = 4 * config.channels
        self.time = _two_layers(config.channels, embedding)
        self.label = nn.Embedding(num_classes + 1, embedding) if num_classes else None
        self.vector = _two_layers(config.vector_channels, embedding) if config.vector_channels else None
        self.conv_in = Conv2d(in_channels, config.channels, 3, padding=1)

        widths = [config.channels * m for m in config.multipliers]
        depths = [config.depth(level) if level in config.attention_levels else None for level in range(len(widths))]
        width = config.channels
        skips = [width]
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(Stage(width, out, embedding, config, depths[level]))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Downsample(width, config.asymmetric_downsampling))
                skips.append(width)

        self.middle = nn.ModuleList(
            [
                Stage(width, width, embedding, config, config.depth(len(widths) - 1)),
                Stage(width, width, embedding, config, None),
            ]
        )

        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(Stage(width + skips.pop(), out, embedding, config, depths[level]))
                width = out
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = group_norm(width, config.norm_groups, config.norm_eps)
        self.conv_out = zero_init(Conv2d(width, out_channels or in_channels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        """Predict eps, v, or whatever the loss asks for.

        Args:
            x: [N, C, H, W], the noised input.
            timesteps: [N], fractional values allowed.
            label: int64 [N]; `num_classes` means "no class". For a network with classes, and no other.
            context: [N, L, D]. For a network with `context_channels`, and no other.
            context_mask: bool [N, L], True for what is attended to; None: all of the context.
            vector: [N, E]. For a network with `vector_channels`, and no other.

        Returns:
            [N, C_out, H, W], at least fp32.
        """
        assert self.takes_context == (context is not None)
        config = self.config
        frequencies = timestep_embedding(
            timesteps, config.channels, frequency_shift=config.frequency_shift, sines_first=config.sines_first
        )
        embedding = self.time(frequencies.to(x.dtype))
        if self.label is not None:
            assert label is not None
            embedding = embedding + self.label(label)
        if self.vector is not None:
            assert vector is not None
            embedding = embedding + self.vector(vector)
        h = self.conv_in(x)
        skips = [h]
        for module in self.down:
            h = module(h, embedding, context, context_mask) if isinstance(module, Stage) else module(h)
            skips.append(h)
        for module in self.middle:
            h = module(h, embedding, context, context_mask)
        for module in self.up:
            if isinstance(module, Stage):
                h = module(torch.cat([h, skips.pop()], dim=1), embedding, context, context_mask)
            else:
                h = module(h)
        return at_least_fp32(self.conv_out(F.silu(self.norm_out(h))))


def _two_layers(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(Linear(in_channels, out_channels), nn.SiLU(), Linear(out_channels, out_channels))
