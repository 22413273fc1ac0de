"""CLIP's text encoder through transformers: what it gives, what it refuses, what it cuts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from gmdist.errors import ConfigError
from gmdist.families.clip import ClipText

pytestmark = pytest.mark.parity

LENGTH = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few random weights, whose tokens are single letters."""
    folder = tmp_path_factory.mktemp("clip")
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


def test_the_context_is_what_transformers_computes(folder: Path) -> None:
    encoder = ClipText(str(folder)).eval()
    tokens, cut = encoder.tokenize(["a cat", ""])
    assert cut == [False, False]
    assert tokens.shape == (2, LENGTH)
    start, end = 52, 53
    assert tokens[1].tolist() == [start] + [end] * (LENGTH - 1)
    assert tokens[0].tolist() == [start, 26, 2, 0, 26 + ord("t") - ord("a"), *[end] * 4]  # a</w> c a t</w>
    whole = CLIPTextModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole(input_ids=tokens).last_hidden_state
    assert (encoder.width, encoder.max_length) == (16, LENGTH)
    torch.testing.assert_close(encoder(tokens), expected, rtol=1e-5, atol=1e-6)
    assert not encoder(tokens).requires_grad


def test_a_caption_that_is_too_long_is_cut_before_its_end_token(folder: Path) -> None:
    tokens, cut = ClipText(str(folder)).tokenize(["abcdefghijklmnop", "a"])
    assert tokens[0].tolist() == [52, 0, 1, 2, 3, 4, 5, 6, 53]
    assert cut == [True, False]


def test_it_loads_its_own_weights_where_a_family_is_built_without_any(folder: Path) -> None:
    with torch.device("meta"):
        encoder = ClipText(str(folder))
    assert next(encoder.parameters()).device.type == "cpu"


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"family.conditioning.text.path: '.*'; no CLIP text encoder"):
        ClipText(str(tmp_path))
