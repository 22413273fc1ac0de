"""CLIP's text encoder through transformers: what it gives, what it refuses, what it cuts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def test_a_text_without_utf8_is_read_as_a_question_mark_there(folder: Path) -> None:
    clip = ClipText(str(folder))
    assert torch.equal(clip.tokenize(["a \udcff cat"])[0], clip.tokenize(["a ? cat"])[0])


def test_it_loads_its_own_weights_where_a_family_is_built_without_any(folder: Path) -> None:
    with torch.device("meta"):
        encoder = ClipText(str(folder))
    assert next(encoder.parameters()).device.type == "cpu"


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"family.conditioning.text.path: '.*'; no CLIP text encoder"):
        ClipText(str(tmp_path))
    with pytest.raises(ConfigError, match=r"text.path: '~/gone'; .* \(there is no such folder\)"):
        ClipText("~/gone")


def test_a_pipelines_folder_and_its_encoder_find_the_tokenizer_beside(folder: Path, tmp_path: Path) -> None:
    for name, files in (
        ("text_encoder", ["config.json", "model.safetensors"]),
        ("tokenizer", ["vocab.json", "merges.txt"]),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(folder / file, tmp_path / name)
    wanted = ClipText(str(folder)).tokenize(["a cat"])[0]
    for place in (tmp_path, tmp_path / "text_encoder"):
        assert torch.equal(ClipText(str(place)).tokenize(["a cat"])[0], wanted)


def _without_words(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def _without_a_layer(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in state.items() if "layers.0.mlp" not in name}, folder / "model.safetensors"
    )


def _of_another_shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "layers.0.mlp.fc1.weight" in name)
    save_file(state | {name: state[name][:-1].clone()}, folder / "model.safetensors")


def _cut_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])


def _of_more_words(folder: Path) -> None:
    words = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(words | {"zzz": len(words)}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_without_words, "its tokenizer has no words: vocab.json and merges.txt are missing"),
        (_without_a_layer, r"its weights lack .*layers\.0\.mlp\.fc1\.bias, .*layers\.0\.mlp\.fc2\.weight"),
        (_of_another_shape, "mismatch"),
        (_cut_short, "header|incomplete|truncated|deserializ"),
        (_of_more_words, "its tokenizer has 55 tokens, its encoder 54"),
    ],
)
def test_what_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    # transformers draws what weights lack, and makes a tokenizer of no words, of which every caption is the same.
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copied)
    with pytest.raises(ConfigError, match=rf"no CLIP text encoder can be read there \(.*({reason})"):
        ClipText(str(copied))
