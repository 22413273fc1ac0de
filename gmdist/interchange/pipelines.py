"""Whole models as values, and as the folders that diffusers' `from_pretrained` loads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmdist.diffusion.config import DiffusionConfig
from gmdist.errors import ConfigError
from gmdist.interchange.configs import config_json
from gmdist.interchange.diffusers import write_folder
from gmdist.interchange.names import is_class_table
from gmdist.interchange.schedulers import scheduler_config
from gmdist.interchange.spec import NetworkSpec

INDEX = "model_index.json"
DIT_CLASSES = 1000  # DiTPipeline's number for "no class", whatever the transformer
_UNITS = 8  # StableDiffusionPipeline makes images whose sides are multiples of it


@dataclass(frozen=True)
class Network:
    """A network and its weights: one folder."""

    spec: NetworkSpec
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline of diffusers is made of: a folder for each part, and their index."""

    kind: str  # its class
    networks: dict[str, Network]  # by folder
    scheduler: dict[str, Any]  # scheduler_config.json
    others: dict[str, Any] = field(default_factory=dict)  # parts of transformers, by folder
    absent: tuple[str, ...] = ()  # parts that it may do without
    values: dict[str, Any] = field(default_factory=dict)  # of the index, beside the parts
    call: dict[str, Any] = field(default_factory=dict)  # what it is called with to sample as the run does; not written


def stable_diffusion(unet: Network, first_stage: Network, text: dict[str, Any], diffusion: DiffusionConfig) -> Pipeline:
    """A UNet of latents under CLIP's captions; ConfigError where the pipeline would draw otherwise.

    Args:
        unet, first_stage: the networks; the first stage's spec has the latents' scale.
        text: CLIP's text_encoder and tokenizer.
        diffusion: the process and its sampler.
    """
    size = first_stage.spec.size
    if size is not None and size % _UNITS:
        raise ConfigError(
            f"data.image_size: {size}; diffusers' StableDiffusionPipeline makes images whose sides are multiples of "
            f"{_UNITS}"
        )
    scheduler = scheduler_config(diffusion)
    if scheduler["steps_offset"] != 1:
        raise ConfigError(
            f"family.diffusion.sampler.num_steps: {diffusion.sampler.num_steps}; diffusers' StableDiffusionPipeline "
            f"ends leading timesteps at 1, where these end at 0: use at most {diffusion.num_timesteps // 2}"
        )
    return Pipeline(
        "StableDiffusionPipeline",
        {"unet": unet, "vae": first_stage},
        scheduler,
        text,
        absent=("safety_checker", "feature_extractor", "image_encoder"),
        values={"requires_safety_checker": False},
        call=_call(diffusion),
    )


def dit_pipeline(transformer: Network, first_stage: Network, diffusion: DiffusionConfig) -> Pipeline:
    """A transformer of latents with classes; ConfigError where the pipeline would draw otherwise.

    The pipeline asks for class 1000 where it means none, so tables of classes are filled up to there: every row after
    the classes is that of "no class".
    """
    spec = transformer.spec
    if not 1 <= spec.num_classes <= DIT_CLASSES:
        raise ConfigError(f"a transformer of {spec.num_classes} classes; diffusers' DiTPipeline has 1 to {DIT_CLASSES}")
    state = dict(transformer.state)
    for name in filter(is_class_table, transformer.state):
        state[name] = torch.cat([state[name], state[name][-1:].expand(DIT_CLASSES - spec.num_classes, -1)])
    padded = Network(replace(spec, num_classes=DIT_CLASSES), state)
    labels = {str(number): str(number) for number in range(spec.num_classes)}
    return Pipeline(
        "DiTPipeline",
        {"transformer": padded, "vae": first_stage},
        scheduler_config(diffusion, scales_start=False),
        values={"id2label": labels},
        call=_call(diffusion),
    )


def pixel_pipeline(unet: Network, diffusion: DiffusionConfig, clip: float) -> Pipeline:
    """A UNet of pixels that is told nothing; ConfigError where the pipeline would draw otherwise.

    Args:
        unet: the network.
        diffusion: the process and its sampler.
        clip: bound of the images' absolute values.
    """
    kinds = {"ddim": "DDIMPipeline", "ddpm": "DDPMPipeline"}
    name, steps = diffusion.sampler.name, {"num_inference_steps": diffusion.sampler.num_steps}
    if name not in kinds:
        raise ConfigError(
            f"family.diffusion.sampler.name: '{name}'; diffusers' pipelines of pixels have {' and '.join(kinds)}"
        )
    # Unless it is told so, their DDIM adds the noise that belongs to the image before it was clipped.
    call = steps | ({"use_clipped_model_output": True} if name == "ddim" else {})
    return Pipeline(kinds[name], {"unet": unet}, scheduler_config(diffusion, clip=clip), call=call)


def _call(diffusion: DiffusionConfig) -> dict[str, Any]:
    steps, guidance = diffusion.sampler.num_steps, diffusion.sampler.guidance
    if guidance < 1.0:
        raise ConfigError(
            f"family.diffusion.sampler.guidance: {guidance}; diffusers' pipelines guide above 1 alone: 1 or more can "
            "be exported"
        )
    return {"num_inference_steps": steps, "guidance_scale": guidance}


def write_pipeline(path: str | Path, pipeline: Pipeline) -> None:
    """Write a pipeline; model_index.json comes last.

    Args:
        path: a local folder, which is made.
        pipeline: what to write.

    Raises:
        ConfigError: diffusers lacks one of its networks; begins with its name there.
    """
    folder = Path(path)
    index: dict[str, Any] = {"_class_name": pipeline.kind} | pipeline.values
    index |= {name: [None, None] for name in pipeline.absent}
    for name, network in pipeline.networks.items():
        try:
            write_folder(folder / name, network.spec, network.state)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        index[name] = ["diffusers", config_json(network.spec)["_class_name"]]
    for name, part in pipeline.others.items():
        part.save_pretrained(folder / name)
        index[name] = ["transformers", type(part).__name__]
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    index["scheduler"] = ["diffusers", pipeline.scheduler["_class_name"]]
    _write_json(folder / INDEX, index)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
