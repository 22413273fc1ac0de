"""A CLIP of a few random weights, whose tokens are single letters."""

import json
from pathlib import Path

import torch

LENGTH = 9


def write_clip(folder: Path) -> Path:
    """Its text encoder and tokenizer, as transformers reads them."""
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    start, end = len(tokens) - 2, len(tokens) - 1
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=LENGTH,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        **sizes,
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder)
    return folder
