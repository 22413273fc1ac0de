"""Folders of diffusers' weights: there and back, in shards and in half precision, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gmdist.errors import ConfigError
from gmdist.interchange.diffusers import read_folder, write_folder
from gmdist.interchange.names import links, shapes_there
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.dit import DiTConfig
from gmdist.nets.unet import UNetConfig, stable_diffusion_1

UNET = NetworkSpec(
    UNetConfig(16, (1, 2), 1, (0,), 2, context_channels=6, norm_groups=4, vector_channels=1540), 4, num_classes=3
)
SPECS = {
    "unet": UNET,
    "plain": NetworkSpec(UNetConfig(16, (1, 2), 1, (1,), head_channels=8, norm_groups=4), 3, size=8),
    "autoencoder": NetworkSpec(AutoencoderConfig(32, (1, 1), 1, 2), 1, size=16, latent_scale=0.5, latent_shift=0.25),
    "small_groups": NetworkSpec(AutoencoderConfig(16, (1, 2), 1, 2, norm_groups=8), 1, latent_scale=0.5),
    "dit": NetworkSpec(DiTConfig(16, 3, 2), 3, num_classes=2, size=4),
    "dit_block_embeddings": NetworkSpec(DiTConfig(16, 3, 2, block_embeddings=True), 3, num_classes=2, size=4),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def random_state(spec: NetworkSpec) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in spec.outline().state_dict().items()}


def changed(folder: Path, spec: NetworkSpec) -> tuple[Path, dict[str, Tensor]]:
    """The weights' file of a folder that is written here, and its tensors, to be changed."""
    write_folder(folder, spec, random_state(spec))
    return folder / WEIGHTS, load_file(folder / WEIGHTS)


@pytest.mark.parametrize("name", SPECS)
def test_there_and_back_is_exact(name: str, tmp_path: Path) -> None:
    spec, state = SPECS[name], random_state(SPECS[name])
    write_folder(tmp_path, spec, state)
    found, read = read_folder(tmp_path)
    assert found.build().load_state_dict(read)
    assert (found.in_channels, found.num_classes) == (spec.in_channels, spec.num_classes)
    assert (found.latent_scale, found.latent_shift) == (spec.latent_scale, spec.latent_shift)
    assert read.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(read[key], value), key


def test_names_of_stable_diffusion_1() -> None:
    # Of the published file; there are 686.
    spec = NetworkSpec(stable_diffusion_1(), 4)
    shapes = shapes_there(spec.outline(), links(spec, spec.outline()))
    assert len(shapes) == 686
    attention = "down_blocks.1.attentions.0"
    assert shapes["time_embedding.linear_1.weight"] == [1280, 320]
    assert shapes[f"{attention}.proj_in.weight"] == [640, 640, 1, 1]
    assert shapes[f"{attention}.transformer_blocks.0.attn2.to_k.weight"] == [640, 768]
    assert shapes[f"{attention}.transformer_blocks.0.attn1.to_out.0.bias"] == [640]
    assert shapes[f"{attention}.transformer_blocks.0.ff.net.0.proj.weight"] == [5120, 640]
    assert shapes["mid_block.resnets.1.time_emb_proj.weight"] == [1280, 1280]
    assert shapes["up_blocks.3.resnets.0.conv_shortcut.weight"] == [320, 960, 1, 1]
    assert shapes["up_blocks.0.upsamplers.0.conv.weight"] == [1280, 1280, 3, 3]
    assert shapes["conv_norm_out.weight"] == [320]


def test_shards_in_half_precision(tmp_path: Path) -> None:
    file, tensors = changed(tmp_path, UNET)
    file.unlink()
    names = sorted(tensors)
    places = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        kinds = (torch.float16, torch.bfloat16, torch.float64)
        dtype = kinds[int(part[5])]
        save_file({name: tensors[name].to(dtype) for name in names if places[name] == part}, tmp_path / part)
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    _, state = read_folder(tmp_path)
    assert {value.dtype for value in state.values()} == {torch.float32}
    for key, value in random_state(UNET).items():
        torch.testing.assert_close(state[key], value, rtol=2**-8, atol=1e-6)

    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"index\.json: 'part-1\.safetensors' is not a file beside it"):
        read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../part-0.safetensors"}}))
    with pytest.raises(ConfigError, match=r"'\.\./part-0\.safetensors' is not a file beside it"):
        read_folder(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="no weight_map"):
        read_folder(tmp_path)


def test_shards_go_before_the_whole_file_of_earlier_weights(tmp_path: Path) -> None:
    # What diffusers leaves where it writes shards into a folder that had weights, and then reads.
    file, tensors = changed(tmp_path, UNET)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "part.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")})
    )
    _, state = read_folder(tmp_path)
    assert torch.equal(state["conv_in.bias"], load_file(file)["conv_in.bias"] + 1)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    file, tensors = changed(tmp_path, SPECS["autoencoder"])
    name = "encoder.mid_block.attentions.0.to_q.bias"
    save_file(tensors | {name.replace("to_q", "query"): tensors[name] + 1}, file)
    with pytest.raises(ConfigError, match=r"attentions\.0\.(to_q|query)\.bias are one tensor under two names"):
        read_folder(tmp_path)


def test_averages_of_diffusers_scripts_are_read(tmp_path: Path) -> None:
    changed(tmp_path, UNET)
    config = tmp_path / "config.json"
    of_averages = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 7, "power": 0.75}
    config.write_text(
        json.dumps(json.loads(config.read_text()) | of_averages | {"update_after_step": 0, "use_ema_warmup": True})
    )
    assert read_folder(tmp_path)[0].config == UNET.config


def test_written_in_fp32_whatever_the_weights_are_in(tmp_path: Path) -> None:
    write_folder(tmp_path, UNET, {name: tensor.bfloat16() for name, tensor in random_state(UNET).items()})
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_a_variant_alone_is_read(tmp_path: Path) -> None:
    file, _ = changed(tmp_path, UNET)
    file.rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert read_folder(tmp_path)[1].keys() == random_state(UNET).keys()


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file, tensors = changed(tmp_path, UNET)
    kept = {name: tensor for name, tensor in tensors.items() if "attentions" not in name}
    kept["conv_in.bias"] = torch.zeros(3)
    kept |= {f"lora.{i:02}": torch.zeros(1) for i in range(12)}
    save_file(kept, file)
    with pytest.raises(ConfigError) as caught:
        read_folder(tmp_path)
    message = str(caught.value)
    missing = len(tensors) - sum("attentions" not in name for name in tensors)
    assert message.startswith(
        f"{tmp_path}: tensors do not fit the config: {missing} missing: down_blocks.0.attentions.0"
    )
    assert f"; 12 not known: {', '.join(f'lora.{i:02}' for i in range(12))};" in message
    assert all(name in message for name in tensors.keys() - kept.keys())
    assert message.endswith("1 of another shape: conv_in.bias [3] for [16]")


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    state = random_state(UNET)
    del state["conv_in.bias"]
    with pytest.raises(ConfigError, match=r"the state dict: .* 1 missing: conv_in\.bias"):
        write_folder(tmp_path, UNET, state)
    assert not list(tmp_path.iterdir())


def test_what_belongs_to_the_loss_is_not_written(tmp_path: Path) -> None:
    spec = SPECS["autoencoder"]
    write_folder(tmp_path, spec, random_state(spec) | {"logvar": torch.zeros(1)})
    assert not [name for name in load_file(tmp_path / WEIGHTS) if "logvar" in name]


def test_embeddings_that_differ_between_blocks_are_each_blocks_own(tmp_path: Path) -> None:
    file, tensors = changed(tmp_path, SPECS["dit"])
    copies = [name for name in tensors if name.endswith("timestep_embedder.linear_1.weight")]
    assert len(copies) == 3
    assert torch.equal(tensors[copies[0]], tensors[copies[2]])
    assert read_folder(tmp_path)[0].config == SPECS["dit"].config

    tensors["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight"][0, 0] += 1
    save_file(tensors, file)
    spec, state = read_folder(tmp_path)
    assert spec.config == SPECS["dit_block_embeddings"].config
    assert spec.build().load_state_dict(state)
    assert torch.equal(state["block_times.0.0.weight"], state["time.0.weight"])
    assert (state["block_times.1.0.weight"] != state["time.0.weight"]).sum() == 1
    assert torch.equal(state["block_labels.1.weight"], state["label.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    file, tensors = changed(tmp_path, SPECS["plain"])
    tensors["conv_in.weight"][0, 1, 2, 0] = value
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"conv_in\.weight has values that are not finite"):
        read_folder(tmp_path)


def test_names_of_old_first_stages(tmp_path: Path) -> None:
    # Before diffusers 0.14 the projections of an autoencoder's attention had these names.
    file, tensors = changed(tmp_path, SPECS["autoencoder"])
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    _, state = read_folder(tmp_path)
    for key, value in random_state(SPECS["autoencoder"]).items():
        assert torch.equal(state[key], value), key


def test_pickles_and_unsound_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_folder(tmp_path)
    file, tensors = changed(tmp_path, UNET)
    with pytest.raises(ConfigError, match="no such file; give a folder"):
        read_folder(file)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert read_folder(tmp_path)[1]

    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"{WEIGHTS}: not a sound safetensors file"):
        read_folder(tmp_path)
    save_file(tensors | {"conv_in.bias": torch.zeros(16, dtype=torch.int8)}, file)
    with pytest.raises(ConfigError, match=r"conv_in\.bias is I8; must be one of F16, BF16, F32, F64"):
        read_folder(tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"the weights are pickles \(\.bin or \.ckpt\), which can run any code"):
        read_folder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=f"no {WEIGHTS}, and no index .*; beside config.json is nothing"):
        read_folder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.non_ema.safetensors").touch()
    with pytest.raises(ConfigError, match=r"beside config.json is diffusion_pytorch_model\.non_ema\.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json: not a mapping"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(ConfigError, match=r"config\.json: _class_name: 'Other'; must be one of"):
        read_folder(tmp_path)
