"""What a model is told of a sample: nothing, its class, or its caption; and how it does without, for guidance."""

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from gmdist import rng
from gmdist.errors import ConfigError
from gmdist.families.clip import ClipText
from gmdist.families.family import Batch, Condition, Surroundings, captions, conditioned_labels
from gmdist.nets.text import TextConfig, TextEncoder, tokenize

_log = logging.getLogger(__name__)

KINDS = ("none", "class", "text")
ENCODERS = ("words", "clip")


@dataclass
class EncoderConfig:
    """What reads captions."""

    name: str = "words"  # words: a transformer on them, trained along; clip: CLIP's, frozen, from transformers
    path: str | None = field(default=None, metadata={"folder_or_name": True})  # of clip: the name is one on the hub
    transformer: TextConfig = field(default_factory=TextConfig)  # of words


@dataclass
class ConditioningConfig:
    """What the model is told of each sample."""

    kind: str | None = None  # none, class or text; None: class where the data has classes, else none
    dropout: float = 0.1  # share of samples that are trained without it, for guidance
    text: EncoderConfig = field(default_factory=EncoderConfig)

    def problem(self) -> str | None:
        """Why these settings cannot be, as "key: value; what is valid"; None if they can."""
        if self.kind is not None and self.kind not in KINDS:
            return f"kind: '{self.kind}'; must be one of {', '.join(KINDS)}, or null"
        if not 0.0 <= self.dropout < 1.0:
            return f"dropout: {self.dropout}; must be at least 0 and below 1: without any condition, kind is none"
        if self.text.name not in ENCODERS:
            return f"text.name: '{self.text.name}'; must be one of {', '.join(ENCODERS)}"
        if (self.text.name == "clip") != bool(self.text.path):
            return f"text.path: {self.text.path!r}; must be given for text.name 'clip', and for no other"
        problem = self.text.transformer.problem()
        return f"text.transformer.{problem}" if problem else None

    def guidance_problem(self, guidance: float) -> str | None:
        """Why a sampler's guidance cannot be, as "guidance: value; what is valid"; None if it can, as far as is known.

        Of a kind that is left to the data, `Conditioner.check_guidance` says it.
        """
        if guidance == 1.0 or self.kind in (None, "none") or self.dropout > 0.0:
            return None
        return (
            f"guidance: {guidance}; must be 1, or family.conditioning.dropout above 0: at 0 the model is never trained "
            "without what it is told, which guidance leads away from"
        )


@dataclass(frozen=True)
class Told:
    """What a model is told of N samples."""

    label: Tensor | None = None  # int64 [N]; num_classes: nothing
    tokens: Tensor | None = None  # int64 [N, L], which the model's own encoder reads; of the empty text: nothing
    context: Tensor | None = None  # [N, L, D], of an encoder
    context_mask: Tensor | None = None  # bool [N, L]: what of it are words; of an encoder that is trained along
    vector: Tensor | None = None  # [N, D], of the whole text; likewise


class Conditioner(nn.Module):
    """Reads labels and captions. Frozen: an encoder that is trained belongs to the model."""

    def __init__(self, config: ConditioningConfig, surroundings: Surroundings) -> None:
        """ConfigError: there is no such encoder."""
        super().__init__()
        self._config, self._seed = config, surroundings.seed
        self.kind = config.kind or ("class" if surroundings.num_classes else "none")
        if self.kind == "class" and not surroundings.num_classes:
            raise ConfigError("family.conditioning.kind: 'class'; needs data.num_classes")
        self.num_classes = surroundings.num_classes if self.kind == "class" else 0
        self.clip = ClipText(config.text.path) if self.kind == "text" and config.text.path else None

    def check_guidance(self, sampler: str, guidance: float) -> None:
        """ConfigError where a sampler's guidance leads from nothing; `sampler` is its section of the config."""
        if problem := replace(self._config, kind=self.kind).guidance_problem(guidance):
            raise ConfigError(f"{sampler}.{problem}")

    @property
    def conditions(self) -> tuple[str, ...]:
        """What samples can be asked for by."""
        return {"none": (), "class": ("label",), "text": ("prompt",)}[self.kind]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads of a batch."""
        return {"none": (), "class": ("label",), "text": ("caption",)}[self.kind]

    @property
    def context_channels(self) -> int | None:
        """The width of what a model attends to; None where there is none."""
        if self.kind != "text":
            return None
        return self._config.text.transformer.channels if self.clip is None else self.clip.width

    @property
    def vector_channels(self) -> int | None:
        """The width of the vector that conditions the whole image; None where there is none."""
        return self._config.text.transformer.channels if self.kind == "text" and self.clip is None else None

    def trained_encoder(self) -> TextEncoder | None:
        """A new encoder for the model to train; None where it needs none."""
        return TextEncoder(self._config.text.transformer) if self.kind == "text" and self.clip is None else None

    def of_batch(self, batch: Batch, dropout: float = 0.0) -> Told:
        """What a batch says of its samples; of one without labels, nothing.

        Args:
            batch: of N samples.
            dropout: the share of samples that nothing is said of, keyed by sample.

        Raises:
            ConfigError: nothing is said, and the model was never trained without.
        """
        keys = batch["key"]
        if self.kind == "class" and "label" not in batch:
            if self._config.dropout == 0.0:
                raise ConfigError(
                    "family.conditioning.dropout: 0.0; a model that was always told the class needs labels, and the "
                    "data have none"
                )
            return Told(torch.full_like(keys, self.num_classes))
        is_dropped = rng.uniform(self._seed, "label_dropout", keys) < dropout
        if self.kind == "class":
            return Told(torch.where(is_dropped, self.num_classes, batch["label"]))
        if self.kind == "text":
            tokens = _moved(self._tokenize(["", *captions(batch)])[0], keys.device)
            return self._encode(torch.where(is_dropped[:, None], tokens[:1], tokens[1:]))
        return Told()

    def of_training(self, batch: Batch) -> Told:
        """What the model is told of a batch that it learns from."""
        return self.of_batch(batch, self._config.dropout)

    def of_request(self, keys: Tensor, condition: Condition | None) -> Told:
        """What is asked for, for int64 keys [N]: where nothing is, labels in turn, or empty texts."""
        if self.kind == "class":
            return Told(conditioned_labels(keys, condition, self.num_classes))
        if self.kind == "text":
            prompts = condition.prompts if condition is not None else None
            tokens, is_cut = self._tokenize(list(prompts or [""] * len(keys)))
            for prompt in dict.fromkeys(text for text, cut in zip(prompts or (), is_cut, strict=False) if cut):
                _log.warning("a prompt is cut to the %d tokens that the encoder takes: %.60s", tokens.shape[1], prompt)
            return self._encode(_moved(tokens, keys.device))
        return Told()

    def nothing(self, count: int, device: torch.device) -> Told | None:
        """To be told nothing, `count` times; None where that is all that a model ever is."""
        if self.kind == "class":
            return Told(torch.full((count,), self.num_classes, device=device))
        if self.kind == "text":
            return self._encode(_moved(self._tokenize([""])[0], device).expand(count, -1))
        return None

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        if self.clip is not None:
            return self.clip.tokenize(texts)
        return tokenize(texts, self._config.text.transformer.max_length)

    def _encode(self, tokens: Tensor) -> Told:
        return Told(tokens=tokens) if self.clip is None else Told(context=self.clip(tokens))


def _moved(tokens: Tensor, device: torch.device) -> Tensor:
    """The tokens on a device: a GPU fetches them when it comes to that, and the host does not wait for it."""
    return tokens.to(device) if device.type == "cpu" else tokens.pin_memory().to(device, non_blocking=True)


class Denoiser(nn.Module):
    """A denoising network, and the text encoder that is trained with it where captions are read by one."""

    def __init__(self, network: nn.Module, text: TextEncoder | None) -> None:
        super().__init__()
        self.network, self.text = network, text

    def read(self, told: Told) -> Told:
        """What the encoder makes of the tokens, in their place: all that the network needs, at whatever time."""
        if told.tokens is None:
            return told
        assert self.text is not None
        context, mask = self.text(told.tokens)
        # The mean of all words conditions the whole image, as SDXL's pooled text does: it is learned from sooner.
        weights = mask / mask.sum(dim=1, keepdim=True)
        return Told(context=context, context_mask=mask, vector=(context * weights[:, :, None]).sum(dim=1))

    def forward(self, x: Tensor, times: Tensor, told: Told) -> Tensor:
        """X [N, C, H, W], times [N] -> [N, C, H, W]."""
        told = self.read(told)
        if told.vector is not None:
            return self.network(x, times, context=told.context, context_mask=told.context_mask, vector=told.vector)
        if told.context is not None:
            return self.network(x, times, context=told.context)
        return self.network(x, times, told.label)


def together(first: Told, second: Told) -> Told:
    """N samples and M samples as N + M."""
    pairs = {name: (value, getattr(second, name)) for name, value in vars(first).items() if value is not None}
    return Told(**{name: torch.cat(pair) for name, pair in pairs.items()})
