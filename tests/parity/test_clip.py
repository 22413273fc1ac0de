"""CLIP's text encoder through transformers: what it gives, what it refuses, what it cuts."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from gmdist.errors import ConfigError
from gmdist.families.clip import ClipText
from tests.parity.clip import LENGTH, write_clip

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


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
