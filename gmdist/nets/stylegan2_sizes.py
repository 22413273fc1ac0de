"""What the sizes of StyleGAN2's generator and discriminator have in common."""

ARCHITECTURES = ("orig", "skip", "resnet")
MAX_CHANNELS = 1 << 16


class ChannelsBySide:
    """How wide features are, for configs with these two settings: the smaller their side, the wider."""

    channel_base: int
    channel_max: int

    def width(self, side: int) -> int:
        """Of features of this side."""
        return max(min(self.channel_base // side, self.channel_max), 1)
