"""Tokenizers and their prior beside peers: a training step of a ViT VQ-VAE, nearest codes, drawing an image's codes.

    make bench-tokenizers

It is not named tokenizers.py: transformers would import it in place of the package of that name.

Each side is a process of its own with one thread on the CPU; they take turns, and ratios are medians over the turns.
Time is what the process gets of the processor, which on a quiet machine is the wall clock's. "As it comes" has the C
library's allocator, "tuned" that of our workers, as ours does; nothing is compiled. AdamW is fused; "its examples" is
as it comes with AdamW as the examples of vector-quantize-pytorch make it, which updates one tensor after another.

vit: ViTLayers of transformers with its default attention (torch's) and VectorQuantize of vector-quantize-pytorch, in
the shell of our patches, norms and projections, from our weights. The loss is the squared error with the two losses of
the codes. VectorQuantize does not learn codes of length 1, so that there only features are made so, and codes start so.
nearest: all distances at once, and ours in chunks; memory is the peak of the first call beyond what was there before.
draw: the network of the transformer prior with its cache, without (all tokens so far again at each one), and
LlamaForCausalLM.generate with its own. All have the same weights: ours takes Llama's rotations here, so that the most
probable codes are comparable. In "drawn" codes are drawn from the distribution, each side with its own numbers.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Peer, difference, ratio, serve, start, take_turns

from gmdist.families.code_sampler import CodeSamplerConfig, drawn, probabilities
from gmdist.families.vit_vqvae import pixels
from gmdist.nets.causal_transformer import CausalTransformer, CausalTransformerConfig
from gmdist.nets.kmeans import nearest
from gmdist.nets.quantizer import Quantizer, QuantizerConfig
from gmdist.nets.vit import ViTBlock, ViTConfig, ViTDecoder, ViTEncoder

CODES, CODE_CHANNELS = 8192, 32
VIT = ViTConfig(channels=768, depth=12, num_heads=12, hidden_channels=3072)
PATCH, IMAGE_SIDE, BATCH = 8, 128, 1  # the side where a task names no other
IMAGES, TOKENS = 32, 1024  # of the search for nearest codes
PRIOR, GRID = CausalTransformerConfig(channels=512, depth=8, num_heads=8, dropout=0.0), (16, 16)
UNFUSED = "its examples"
# Whose, under our workers' allocator.
VIT_SIDES = {
    "ours": ("ours", True),
    UNFUSED: ("theirs", False),
    "as it comes": ("theirs", False),
    "tuned": ("theirs", True),
}
NEAREST_SIDES = {"ours": ("ours", True), "product": ("ours", True), "cdist": ("ours", True)}
DRAW_SIDES = {
    "ours": ("ours", True),
    "without cache": ("ours", True),
    "as it comes": ("theirs", False),
    "tuned": ("theirs", True),
    "static cache": ("theirs", True),
}
TASKS = ["vit fp32", "vit bf16", "vit bf16 256", "nearest", "draw 1", "draw 8", "drawn 8"]
AT_MOST = {UNFUSED: 0.8, "tuned": 1.0, "dense": 1.1, "without cache": 0.2, "generate": 1.0}  # of their time
EXTRA_MB = 100
AGREE = {"fp32": 1e-4, "bf16": 2e-2}  # of losses, relative


class Tokenizer(nn.Module):
    """Our encoder, codebook and decoder."""

    def __init__(self, image_side: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        side = image_side // PATCH
        self.encoder, self.decoder = ViTEncoder(VIT, 3, PATCH, side), ViTDecoder(VIT, 3, PATCH, side)
        codebook = QuantizerConfig(
            CODES, CODE_CHANNELS, normalize=True, learned_by="gradient", kmeans_steps=0, commitment_weight=1.0
        )
        self.quantizer = Quantizer(codebook, VIT.channels)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, W] -> the decoder's output, like them, and a loss of each of the two of the codes."""
        found = self.quantizer.quantize(self.encoder(image))
        return self.decoder(found.features), found.loss / 2


class TheirTokenizer(nn.Module):
    """The same with blocks of transformers and the quantizer of vector-quantize-pytorch."""

    def __init__(self, made: Tokenizer) -> None:
        """From our weights, which it takes."""
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        for half in (made.encoder, made.decoder):
            half.blocks = nn.Sequential(*(their_block(block) for block in half.blocks))
        self.encoder, self.decoder = made.encoder, made.decoder
        self.project_in, self.project_out = made.quantizer.project_in, made.quantizer.project_out
        self.quantizer = VectorQuantize(
            CODE_CHANNELS, CODES, learnable_codebook=True, ema_update=False, rotation_trick=False
        )
        with torch.no_grad():
            self.quantizer.codebook = made.quantizer.codebook()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """As `Tokenizer.forward`."""
        vectors = F.normalize(self.project_in(self.encoder(image)).float(), dim=-1)
        codes, _, loss = self.quantizer(vectors)
        return self.decoder(self.project_out(codes)), loss


def their_block(block: ViTBlock) -> nn.Module:
    """A ViTLayer with the weights of a block."""
    from transformers.models.vit.modeling_vit import ViTConfig as TheirConfig
    from transformers.models.vit.modeling_vit import ViTLayer

    config = TheirConfig(
        hidden_size=VIT.channels, num_attention_heads=VIT.num_heads, intermediate_size=VIT.hidden_channels,
        hidden_act="tanh", qkv_bias=False, layer_norm_eps=block.norm1.eps, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        layer = ViTLayer(config)
    state = dict(zip(("q", "k", "v"), block.qkv.weight.detach().clone().chunk(3), strict=True))
    state = {f"attention.{name}_proj.weight": weight.clone() for name, weight in state.items()}
    parts = {
        "attention.o_proj": block.out, "layernorm_before": block.norm1, "layernorm_after": block.norm2,
        "mlp.fc1": block.up, "mlp.fc2": block.down,
    }  # fmt: skip
    for name, part in parts.items():
        state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    return layer


def training(side: str, precision: str, image_side: int) -> Callable[[], float]:
    """A step, which returns its loss."""
    network: nn.Module = Tokenizer(image_side)
    if VIT_SIDES[side][0] == "theirs":
        network = TheirTokenizer(network)
    network.train()
    torch.manual_seed(1)
    image = torch.rand(BATCH, 3, image_side, image_side) * 2 - 1
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=None if side == UNFUSED else True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits, loss_of_codes = network(image)
            value = F.mse_loss(pixels(logits.float()), image) + loss_of_codes
            # Ours are two losses of one value, theirs is one with both gradients.
            loss = value + loss_of_codes if isinstance(network, Tokenizer) else value
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def searching(side: str) -> Callable[[], dict[str, float]]:
    """A search; returns a sum over the tokens, and by how many MB memory peaked."""
    torch.manual_seed(1)
    vectors = F.normalize(torch.randn(IMAGES * TOKENS, CODE_CHANNELS), dim=1)
    codes = F.normalize(torch.randn(CODES, CODE_CHANNELS), dim=1)

    def find() -> Tensor:
        if side == "ours":
            return nearest(vectors, codes)
        if side == "cdist":
            return torch.cdist(vectors, codes).argmin(dim=1)
        return torch.addmm(0.5 * codes.square().sum(dim=1), vectors, codes.t(), alpha=-1.0).argmin(dim=1)

    def step() -> dict[str, float]:
        before_mb = resident_mb(since_now=True)
        with torch.no_grad():
            tokens = find()
        return {"sum": tokens.sum().item(), "mb": resident_mb() - before_mb}

    return step


def resident_mb(*, since_now: bool = False) -> float:
    """The process's peak of resident memory; since now: forget the peak that was."""
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024 * 1.048576


def prior() -> CausalTransformer:
    """Ours, where positions are those of a row as in Llama, and all logits differ."""
    torch.manual_seed(0)
    network = CausalTransformer(PRIOR, CODES, GRID, 0).eval()
    half = PRIOR.channels // PRIOR.num_heads // 2
    angles = torch.arange(len(network.rotations[0]))[:, None] * 10_000.0 ** -(torch.arange(half) / half)
    network.rotations.copy_(torch.stack([angles.cos(), angles.sin()]))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
    return network


def their_prior(made: CausalTransformer) -> Any:
    """Llama with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, heads = PRIOR.channels, PRIOR.num_heads
    hidden = made.blocks[0].feed_forward.down.in_features
    config = LlamaConfig(
        vocab_size=CODES, hidden_size=width, intermediate_size=hidden, num_hidden_layers=PRIOR.depth,
        num_attention_heads=heads, max_position_embeddings=512, rms_norm_eps=made.norm_out.eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": made.codes.weight,
        "model.norm.weight": made.norm_out.weight,
        "lm_head.weight": made.out.weight,
    }

    def halves(weight: Tensor) -> Tensor:
        """Rows of a head in the order of Llama, where what is turned together is half a head apart."""
        return weight.view(heads, -1, 2, width).transpose(1, 2).reshape(width, width)

    for number, block in enumerate(made.blocks):
        query, key, value = block.attention.qkv.weight.chunk(3)
        gate, up = block.feed_forward.up.weight.chunk(2)
        parts = {
            "self_attn.q_proj": halves(query), "self_attn.k_proj": halves(key), "self_attn.v_proj": value,
            "self_attn.o_proj": block.attention.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
            "mlp.down_proj": block.feed_forward.down.weight, "input_layernorm": block.norm1.weight,
            "post_attention_layernorm": block.norm2.weight,
        }  # fmt: skip
        state |= {f"model.layers.{number}.{name}.weight": weight for name, weight in parts.items()}
    llama.load_state_dict(state)
    return llama


def drawing(side: str, count: int, is_random: bool) -> Callable[[], list[int]]:
    """Draw the codes of images; returns the codes."""
    network = prior()
    length = GRID[0] * GRID[1]
    torch.manual_seed(1)
    quantiles = torch.rand(count, length, dtype=torch.float64)

    def choose(logits: Tensor, number: int) -> Tensor:
        if is_random:
            return drawn(probabilities(logits, CodeSamplerConfig()), quantiles[:, number])
        return logits.argmax(dim=1)

    def with_cache() -> Tensor:
        return network.draw(torch.zeros(count, 1, *GRID, dtype=torch.long), 0, None, choose)

    def without_cache() -> Tensor:
        codes = torch.zeros(count, length, dtype=torch.long)
        first = network._first(None, codes)
        for number in range(length):
            seen = network._seen(torch.cat([first, network.codes(codes[:, :number])], dim=1), 0)
            codes[:, number] = choose(network._logits(seen[:, -1]), number)
        return codes

    find = {"ours": with_cache, "without cache": without_cache}.get(side)
    if find is None:
        llama = their_prior(network)
        settings = {"do_sample": True, "top_k": 0} if is_random else {"do_sample": False}
        if side == "static cache":
            settings["cache_implementation"] = "static"
        begun = network.label.weight.detach()[:1].expand(count, 1, -1)

        def find() -> Tensor:
            mask = torch.ones(count, 1, dtype=torch.long)
            return llama.generate(
                inputs_embeds=begun, attention_mask=mask, max_new_tokens=length, use_cache=True, **settings
            )

    def step() -> list[int]:
        with torch.no_grad():
            found = find().flatten()
        assert len(found) == count * length, found.shape
        return found.tolist()

    return step


def work(side: str, task: str) -> None:
    """One side."""
    torch.set_num_threads(1)
    name, _, detail = task.partition(" ")
    with contextlib.redirect_stdout(sys.stderr):
        if name == "vit":
            precision, _, image_side = detail.partition(" ")
            step: Callable[[], Any] = training(side, precision, int(image_side or IMAGE_SIDE))
        elif name == "nearest":
            step = searching(side)
        else:
            step = drawing(side, int(detail), is_random=name == "drawn")
    serve(step)


def measure(task: str, rounds: int, peers: Path) -> dict[str, Peer]:
    """All sides in turn."""
    name = task.split()[0]
    sides = {"vit": VIT_SIDES, "nearest": NEAREST_SIDES}.get(name, DRAW_SIDES)
    found = {}
    for side, (whose, our_allocator) in sides.items():
        if side == "without cache" and task != "draw 1":
            continue  # minutes
        folder = peers if whose == "theirs" else None
        found[side] = start(__file__, [side, task], our_allocator=our_allocator, peers=folder)
    take_turns(found, rounds, is_warm=False)
    return found


def row(task: str, found: dict[str, Peer]) -> str:
    """A line of the table: times, ours by theirs, and what else is asked for."""
    ours = found["ours"]
    columns = [f"ours {ours.median_s():.3f} s"]
    for side, peer in found.items():
        if side != "ours":
            columns.append(f"{side} {peer.median_s():.3f} s: {ratio(ours, peer):.2f}")
    name, _, detail = task.partition(" ")
    if name == "vit":
        first, apart = (difference(ours, found["as it comes"], count) for count in (1, None))
        said = f"memory {ours.gib / found['as it comes'].gib:.2f}; losses differ by {first:.0e}, later {apart:.0e}"
        columns.append(said + ("" if apart < AGREE[detail.split()[0]] else " (not equal)"))
    elif name == "nearest":
        extra = ", ".join(f"{side} {peer.values[0]['mb']:.0f} MB" for side, peer in found.items())
        is_equal = len({peer.values[0]["sum"] for peer in found.values()}) == 1
        columns.append(f"{extra}; {'the same codes' if is_equal else 'codes differ in rounding'}")
    elif name == "draw":
        same = min(
            sum(a == b for a, b in zip(ours.values[0], peer.values[0], strict=True)) / len(ours.values[0])
            for peer in found.values()
        )
        columns.append(f"{same:.0%} of the codes are the same")
    return f"| {task} | " + " | ".join(columns) + " |"


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path(".parity"), help="the folder that peers are installed in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="TASK", choices=TASKS)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work)
        return
    print("each: median time of a step, and ours by it")
    for task in options.only or TASKS:
        print(row(task, measure(task, options.rounds, options.peers)), flush=True)
    print(
        f"asked for, at most: vit {AT_MOST[UNFUSED]} / {UNFUSED}, {AT_MOST['tuned']} / tuned; nearest "
        f"{AT_MOST['dense']} / dense and {EXTRA_MB} MB; draw {AT_MOST['without cache']} / without cache, "
        f"{AT_MOST['generate']} / generate"
    )


if __name__ == "__main__":
    main()
