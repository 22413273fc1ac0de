"""CLIP's text encoder through transformers, frozen: captions become the context that a denoiser attends to."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gmdist.errors import ConfigError


class ClipText(nn.Module):
    """The text half of CLIP (Radford 2021) with its tokenizer."""

    def __init__(self, path: str) -> None:
        """Load both.

        Args:
            path: a folder with config.json, model.safetensors and the tokenizer's files, that of a pipeline with
                text_encoder/ and tokenizer/ or its text_encoder, or a name on the hub.

        Raises:
            ConfigError: transformers is not installed, or there is no such encoder, or not all of it.
        """
        super().__init__()
        transformers = _import_transformers()
        try:
            with torch.device("cpu"):  # its own weights, also where families are built without any
                encoder, tokenizer = _places(path)
                self._tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer)
                # Safetensors only: other files are pickles.
                self.model, found = transformers.CLIPTextModel.from_pretrained(
                    encoder,
                    use_safetensors=True,
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                    output_loading_info=True,
                )
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise _unreadable(path, (str(error).strip().splitlines() or [""])[0]) from error
        if found["missing_keys"]:  # transformers has drawn them, and says so in a table
            raise _unreadable(path, f"its weights lack {', '.join(sorted(found['missing_keys']))}")
        vocabulary = self._tokenizer.get_vocab()
        if set(vocabulary) <= set(self._tokenizer.all_special_tokens):  # what transformers makes of no files
            raise _unreadable(path, "its tokenizer has no words: vocab.json and merges.txt are missing")
        if max(vocabulary.values()) >= self.model.config.vocab_size:
            raise _unreadable(
                path, f"its tokenizer has {len(vocabulary)} tokens, its encoder {self.model.config.vocab_size}"
            )
        self.width: int = self.model.config.hidden_size
        self.max_length: int = self.model.config.max_position_embeddings

    def tokenize(self, texts: list[str]) -> tuple[Tensor, list[bool]]:
        """Token numbers int64 [N, L] on the host, and whether each text was cut because it is too long."""
        texts = [text.encode(errors="replace").decode() for text in texts]  # lone surrogates have no UTF-8
        rows = self._tokenizer(texts, padding="max_length", max_length=self.max_length, truncation=False)["input_ids"]
        cut = [len(row) > self.max_length for row in rows]
        # A text that is cut keeps its end token, whose place CLIP looks for.
        kept = [[*row[: self.max_length - 1], row[-1]] for row in rows]
        return torch.tensor(kept), cut

    def for_transformers(self) -> dict[str, Any]:
        """Encoder and tokenizer as pipelines name them, each with a `save_pretrained`."""
        self._tokenizer.model_max_length = self.max_length  # where the pipelines cut
        return {"text_encoder": self.model, "tokenizer": self._tokenizer}

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [N, L] -> the last hidden states [N, L, D], which Stable Diffusion 1 attends to."""
        return self.model(input_ids=tokens).last_hidden_state.float()


def _places(path: str) -> tuple[str, str]:
    """Where encoder and tokenizer are: one place, or neighbouring folders as in a pipeline of diffusers."""
    folder = Path(path)
    if (folder / "text_encoder").is_dir():
        folder = folder / "text_encoder"
    elif not folder.is_dir():
        if path.startswith(("/", ".", "~")):  # no name on the hub does
            raise _unreadable(path, "there is no such folder")
        return path, path
    has_tokenizer = any((folder / name).exists() for name in ("vocab.json", "tokenizer.json"))
    beside = folder.resolve().parent / "tokenizer"
    return os.fspath(folder), os.fspath(beside if beside.is_dir() and not has_tokenizer else folder)


def _unreadable(path: str, reason: str) -> ConfigError:
    return ConfigError(
        f"family.conditioning.text.path: '{path}'; no CLIP text encoder can be read there ({reason}); give a folder "
        "with config.json, model.safetensors and the tokenizer's files, a pipeline's, or a name on the hub"
    )


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "family.conditioning.text.name: 'clip'; it needs transformers (pip install transformers); or take 'words'"
        ) from error
    return transformers
