"""Our networks beside diffusers': the same weights give the same outputs and gradients, in both directions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gmdist.interchange.configs import config_json
from gmdist.interchange.diffusers import read_folder, to_diffusers, write_folder
from gmdist.interchange.spec import NetworkSpec
from gmdist.nets.autoencoder import AutoencoderConfig
from gmdist.nets.dit import DiTConfig
from gmdist.nets.unet import SIZE_CHANNELS, UNetConfig, sizes_embedding

pytestmark = pytest.mark.parity

N, LENGTH, CONTEXT, POOLED, CLASSES = 2, 7, 24, 16, 5
TIMESTEPS = torch.tensor([3, 977])
LABELS = torch.tensor([1, CLASSES])  # the last is "no class"
SIZES = torch.tensor([[512.0, 768, 0, 13, 512, 512], [64, 64, 1, 2, 1024, 1024]])

_STABLE = {"channels": 32, "norm_groups": 32, "norm_eps": 1e-5, "context_channels": CONTEXT}
SPECS = {
    "sd1": NetworkSpec(UNetConfig(multipliers=(1, 2, 2), attention_levels=(0, 1), num_heads=4, **_STABLE), 4),
    "sd2": NetworkSpec(
        UNetConfig(
            multipliers=(1, 2),
            num_res_blocks=1,
            attention_levels=(0,),
            head_channels=16,
            linear_projections=True,
            **_STABLE,
        ),
        4,
        num_classes=CLASSES,
    ),
    "sdxl": NetworkSpec(
        UNetConfig(
            multipliers=(1, 2, 4),
            num_res_blocks=1,
            attention_levels=(1, 2),
            head_channels=16,
            transformer_depths=(1, 2, 3),
            linear_projections=True,
            vector_channels=POOLED + 6 * SIZE_CHANNELS,
            **_STABLE,
        ),
        4,
    ),
    "inpainting": NetworkSpec(UNetConfig(multipliers=(1, 2), attention_levels=(0,), **_STABLE), 9, out_channels=4),
    "ddpm": NetworkSpec(
        UNetConfig(channels=32, multipliers=(1, 2, 2), head_channels=8, norm_groups=8), 3, num_classes=CLASSES, size=16
    ),
    "ddpm_published": NetworkSpec(
        UNetConfig(
            channels=32,
            multipliers=(1, 2),
            norm_groups=32,
            frequency_shift=1,
            sines_first=True,
            asymmetric_downsampling=True,
        ),
        3,
        size=16,
    ),
    "autoencoder": NetworkSpec(AutoencoderConfig(128, (1, 2), 1, 4), 3, latent_scale=0.13025),
    "autoencoder_16": NetworkSpec(
        AutoencoderConfig(64, (2, 2, 2), 1, 16, quant_convs=False), 3, latent_scale=0.3611, latent_shift=0.1159
    ),
    "autoencoder_small": NetworkSpec(AutoencoderConfig(32, (1, 2), 1, 4, norm_groups=8), 3, latent_scale=0.5),
    "dit_block_embeddings": NetworkSpec(
        DiTConfig(32, 3, 4, 2, learned_sigma=True, block_embeddings=True), 4, num_classes=CLASSES, size=16
    ),
    "dit": NetworkSpec(DiTConfig(32, 3, 4, 2, learned_sigma=True), 4, num_classes=CLASSES, size=16),
    "dit_published_norms": NetworkSpec(
        DiTConfig(32, 2, 2, 4, feed_forward_norm_eps=1e-5), 3, num_classes=CLASSES, size=16
    ),
}


def random_network(spec: NetworkSpec) -> nn.Module:
    """A network of which no branch begins as the identity."""
    torch.manual_seed(0)
    network = spec.build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def peer_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Diffusers' network of a folder, and what it says of missing or unexpected tensors."""
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    peer, report = getattr(diffusers, kind).from_pretrained(folder, output_loading_info=True)
    return peer.eval(), report


def inputs_of(spec: NetworkSpec) -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(N, spec.in_channels, 16, 16)}
    if isinstance(spec.config, UNetConfig) and spec.config.context_channels:
        inputs["context"] = torch.randn(N, LENGTH, CONTEXT)
    if isinstance(spec.config, UNetConfig) and spec.config.vector_channels:
        inputs["pooled"] = torch.randn(N, POOLED)
    return inputs


def ours(network: nn.Module, spec: NetworkSpec, inputs: dict[str, Tensor]) -> Tensor:
    if isinstance(spec.config, AutoencoderConfig):
        mean, logvar = network.encode(inputs["x"])
        return torch.cat([part.flatten(1) for part in (mean, logvar, network.decode(mean))], dim=1)
    label = LABELS if spec.num_classes else None
    if isinstance(spec.config, DiTConfig):
        return network(inputs["x"], TIMESTEPS, label)
    vector = torch.cat([inputs["pooled"], sizes_embedding(SIZES)], dim=1) if "pooled" in inputs else None
    return network(inputs["x"], TIMESTEPS, label, context=inputs.get("context"), vector=vector)


def theirs(network: Any, spec: NetworkSpec, inputs: dict[str, Tensor]) -> Tensor:
    if isinstance(spec.config, AutoencoderConfig):
        posterior = network.encode(inputs["x"]).latent_dist
        parts = (posterior.mean, posterior.logvar, network.decode(posterior.mean).sample)
        return torch.cat([part.flatten(1) for part in parts], dim=1)
    labels = {"class_labels": LABELS} if spec.num_classes else {}
    if "context" in inputs:
        labels["encoder_hidden_states"] = inputs["context"]
    if "pooled" in inputs:
        labels["added_cond_kwargs"] = {"text_embeds": inputs["pooled"], "time_ids": SIZES}
    output = network(inputs["x"], TIMESTEPS, **labels).sample
    return output[:, : spec.in_channels] if isinstance(spec.config, DiTConfig) else output


def with_gradients(forward: Callable[..., Tensor], network: Any, spec: NetworkSpec, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradient of a fixed sum of it with respect to each input."""
    inputs = {name: value.to(dtype).requires_grad_() for name, value in inputs_of(spec).items()}
    output = forward(network, spec, inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), list(inputs.values()))]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# In fp32 they round differently; in float64 a norm's 1e-5 for 1e-6 is seen, which moves small networks by 1e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", SPECS)
def test_same_outputs_and_gradients(name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    spec, network = SPECS[name], random_network(SPECS[name])
    write_folder(tmp_path, spec, network.state_dict())
    peer, report = peer_of(tmp_path)
    assert not any(report.values()), report
    found = with_gradients(ours, network.to(dtype), spec, dtype)
    wanted = with_gradients(theirs, peer.to(dtype), spec, dtype)
    for our, their in zip(found, wanted, strict=True):
        assert our.dtype == dtype
        assert their.std() > 1e-3
        assert relative_error(our, their) < tolerance


@pytest.mark.parametrize("name", SPECS)
def test_there_and_back_is_exact(name: str, tmp_path: Path) -> None:
    spec, network = SPECS[name], random_network(SPECS[name])
    write_folder(tmp_path / "ours", spec, network.state_dict())
    peer_of(tmp_path / "ours")[0].save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert list((tmp_path / "theirs").glob("*.index.json"))
    found, state = read_folder(tmp_path / "theirs")
    assert found.latent_scale == spec.latent_scale
    rebuilt = found.build().eval()
    rebuilt.load_state_dict(state)
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], value), key
    inputs = inputs_of(spec)
    with torch.no_grad():
        assert torch.equal(ours(rebuilt, found, inputs), ours(network, spec, inputs))


def test_a_mask_hides_what_it_hides_there() -> None:
    spec = SPECS["sd1"]
    network, inputs = random_network(spec), inputs_of(spec)
    peer = diffusers.UNet2DConditionModel.from_config(config_json(spec)).eval()
    peer.load_state_dict(to_diffusers(spec, network.state_dict())[1])
    mask = torch.arange(LENGTH) < torch.tensor([[3], [LENGTH]])
    with torch.no_grad():
        found = network(inputs["x"], TIMESTEPS, context=inputs["context"], context_mask=mask)
        wanted = peer(inputs["x"], TIMESTEPS, inputs["context"], encoder_attention_mask=mask).sample
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("of", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_transformer_made_by_diffusers(of: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = getattr(diffusers, of)(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, in_channels=4, out_channels=8, sample_size=16,
        patch_size=2, num_embeds_ada_norm=CLASSES, activation_fn="gelu-approximate", attention_bias=True,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    peer.save_pretrained(tmp_path)
    spec, state = read_folder(tmp_path)
    assert spec.config == DiTConfig(32, 3, 4, 2, learned_sigma=True, feed_forward_norm_eps=1e-5, block_embeddings=True)
    network = spec.build().eval()
    network.load_state_dict(state)
    x = inputs_of(spec)["x"]
    with torch.no_grad():
        found = network(x, TIMESTEPS, LABELS)
        wanted = peer(x, timestep=TIMESTEPS, class_labels=LABELS).sample[:, :4]
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", ["autoencoder", "ddpm_published"])
def test_old_names_of_attention(name: str, tmp_path: Path) -> None:
    # Before diffusers 0.14 the projections of plain self-attention were query, key, value and proj_attn.
    spec, network = SPECS[name], random_network(SPECS[name])
    write_folder(tmp_path, spec, network.state_dict())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {key.replace(new, old): value for key, value in tensors.items()}
    save_file(tensors, file)
    _, state = read_folder(tmp_path)
    for key, value in network.state_dict().items():
        assert torch.equal(state[key], value), key
    inputs = inputs_of(spec)
    with torch.no_grad():  # diffusers reads such a file, too
        assert relative_error(ours(network, spec, inputs), theirs(peer_of(tmp_path)[0], spec, inputs)) < 1e-5
