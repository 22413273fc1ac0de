"""Export: files that others read, whole or not at all; and runs that start from such files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmdist import storage
from gmdist.cli import main
from gmdist.config import load
from gmdist.errors import ConfigError
from gmdist.interchange.diffusers import read_folder
from gmdist.launch.export import export
from gmdist.runs import build_family, open_run, read_config
from gmdist.start import check_start, train_worker
from tests.exporting import DIT, UNET, settings, train

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def dit(noise: str, noise_stage: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformer's run on its latents."""
    run = tmp_path_factory.mktemp("dit") / "run"
    return train("latent_diffusion", noise, run, f"family.first_stage={noise_stage}", *DIT)


@pytest.fixture(scope="module")
def exported(dit: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for diffusers. Read only."""
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    export(dit, str(folder), "diffusers")
    return folder


@pytest.fixture
def start(noise: str, noise_stage: str, tmp_path: Path) -> list[str]:
    """Arguments of a new run of the transformer."""
    more = [f"family.first_stage={noise_stage}", *DIT, "train.seed=9"]
    return settings("latent_diffusion", noise, tmp_path / "new", *more)


def test_one_file_with_the_averaged_weights(dit: str, tmp_path: Path) -> None:
    assert export(dit, str(tmp_path / "out"), "safetensors").startswith(f"{tmp_path}/out: step 2 as ")
    assert storage.list_names(str(tmp_path / "out")) == ["config.yaml", "model.safetensors"]
    found, (_, family) = load_file(tmp_path / "out/model.safetensors"), open_run(dit)
    assert found.keys() == family.state_dict().keys()
    assert {"latent_scale", "first_stage.encoder.conv_in.weight"} <= found.keys()
    for name, value in family.state_dict().items():
        assert torch.equal(found[name], value), name
    fresh = build_family(load(str(tmp_path / "out/config.yaml")))
    assert fresh.load_state_dict(found)


def test_a_codebook_is_exported_as_the_table_that_codes_stand_for(noise: str, tmp_path: Path) -> None:
    sizes = "family={name: vq_vae, network: {channels: [8, 8]}, feature_channels: 4, quantizer: {codebook_size: 32}}"
    more = ["optim={autoencoder: {lr: 0.02}}", sizes, "family.quantizer.revive=true"]
    run = train("vq_vae", noise, tmp_path / "run", *more)
    export(run, str(tmp_path / "out"), "safetensors")
    found, (_, family) = load_file(tmp_path / "out/model.safetensors"), open_run(run)
    book = {name.rpartition(".")[2] for name in found if name.startswith("autoencoder.quantizer.codebook.")}
    assert book == {"codes", "sums", "usage"}  # and none of what a step counts
    codes = torch.arange(32).view(2, 4, 4)
    assert torch.equal(found["autoencoder.quantizer.codebook.codes"][codes], family.quantizer.lookup(codes))


def test_a_pipeline_of_diffusers(dit: str, exported: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    assert index["id2label"] == {str(number): str(number) for number in range(4)}
    _, family = open_run(dit)
    spec, state = read_folder(exported / "transformer")
    assert spec.num_classes == 1000  # DiTPipeline asks for class 1000 where it means none
    ours = family.denoiser.network.state_dict()
    for name, value in ours.items():
        assert torch.equal(state[name][: len(value)] if value.dim() else state[name], value), name
    assert torch.equal(state["label.weight"][1000], ours["label.weight"][4])
    spec, state = read_folder(exported / "vae")
    assert spec.latent_scale == float(family.latent_scale) != 1.0
    assert torch.equal(state["decoder.conv_in.weight"], family.first_stage.state_dict()["decoder.conv_in.weight"])
    scheduler = json.loads((exported / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["beta_schedule"] == "squaredcos_cap_v2"


def test_a_first_stage_leaves_its_loss_behind(noise_stage: str, tmp_path: Path) -> None:
    export(noise_stage, str(tmp_path), "diffusers")
    assert storage.list_names(str(tmp_path)) == ["config.json", WEIGHTS]
    spec, state = read_folder(tmp_path)
    assert spec.latent_scale == 1.0
    assert set(state) == set(open_run(noise_stage)[1].autoencoder.state_dict()) - {"logvar"}


def test_to_object_storage(noise_stage: str, bucket, tmp_path: Path) -> None:
    export(noise_stage, str(tmp_path), "diffusers")
    export(noise_stage, "s3://pictures/exports/first", "diffusers")
    names = storage.list_names("s3://pictures/exports/first")
    assert names == ["config.json", WEIGHTS]
    for name in names:
        assert storage.read(f"s3://pictures/exports/first/{name}") == (tmp_path / name).read_bytes()
    with pytest.raises(ConfigError, match="s3://pictures/exports/first: holds other files already"):
        export(noise_stage, "s3://pictures/exports/first", "safetensors")


@pytest.mark.parametrize(("format", "last"), [("diffusers", "model_index.json"), ("safetensors", "config.yaml")])
def test_half_an_export_is_not_taken_for_a_whole(
    format: str, last: str, dit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def copy(path: str, location: str) -> None:
        if location.endswith(f"out/{last}"):
            raise OSError("the power went")
        copied.append(location)

    monkeypatch.setattr(storage, "copy_from_local", copy)
    with pytest.raises(OSError, match="the power went"):
        export(dit, str(tmp_path / "out"), format)
    assert len(copied) == {"diffusers": 5, "safetensors": 1}[format]  # all else was there


def refused(capsys: pytest.CaptureFixture[str], code: int, *command: str) -> str:
    assert main(command) == code
    (problem,) = capsys.readouterr().err.strip().splitlines()
    return problem


def test_wrong_commands(noise_stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert "--format: 'onnx'; must be one of safetensors, diffusers" in refused(
        capsys, 2, "export", noise_stage, out, "--format", "onnx"
    )
    assert "not a run" in refused(capsys, 2, "export", str(tmp_path), out, "--format", "diffusers")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    line = refused(capsys, 2, "export", noise_stage, str(tmp_path / "full"), "--format", "safetensors")
    assert "holds other files already (notes.txt, ...): choose another folder" in line
    line = refused(capsys, 2, "export", noise_stage, str(tmp_path / "full/notes.txt"), "--format", "safetensors")
    assert "is a file" in line
    assert main(["export", noise_stage, out, "--format", "diffusers"]) == 0
    assert capsys.readouterr().out == f"{out}: step 2 as diffusers' AutoencoderKL\n"


def test_what_diffusers_has_no_pipeline_for(
    noise: str, noise_stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = ["latent_diffusion", f"family.first_stage={noise_stage}", UNET]
    bytes_ = ["family.conditioning={kind: text, text: {transformer: {channels: 16, depth: 1, num_heads: 2}}}"]
    kinds = {
        "told classes": latents,
        "told words": [*latents, *bytes_, "data.caption=txt"],
        "told nothing": [*latents, "family.conditioning={kind: none}"],
        "diffusers' pipelines of pixels have a UNet that is told nothing": ["ddpm", UNET],
        "'heun'; diffusers' pipelines of pixels have ddim and ddpm": [
            *("ddpm", UNET, "family.conditioning={kind: none}"),
            "family.diffusion={schedule: linear, sampler: {name: heun}}",
        ],
        "0 classes": [*latents, *DIT, "family.conditioning={kind: none}"],
    }
    for number, (reason, (config, *more)) in enumerate(kinds.items()):
        run = train(config, noise, tmp_path / f"run-{number}", *more)
        line = refused(capsys, 2, "export", run, str(tmp_path / "out"), "--format", "diffusers")
        assert reason in line
        assert line.endswith("--format safetensors holds every family")
        assert not (tmp_path / "out").exists()
        assert main(["export", run, str(tmp_path / f"out-{number}"), "--format", "safetensors"]) == 0
        capsys.readouterr()


def test_another_sampler_may_be_asked_for(dit: str, tmp_path: Path) -> None:
    sampler = "family.diffusion.sampler="
    with pytest.raises(ConfigError, match="sampler.name: 'euler'; this pipeline starts from unit noise"):
        export(dit, str(tmp_path), "diffusers", [sampler + "{name: euler}"])
    with pytest.raises(ConfigError, match="sampler.guidance: 0.5; .* 1 or more can be exported"):
        export(dit, str(tmp_path), "diffusers", [sampler + "{name: dpmpp_2m, num_steps: 20, guidance: 0.5}"])
    line = export(dit, str(tmp_path), "diffusers", [sampler + "{name: dpmpp_2m, num_steps: 20, guidance: 3.0}"])
    assert line.endswith("DiTPipeline, which samples as the run with num_inference_steps=20, guidance_scale=3.0")
    assert "DPMSolverMultistepScheduler" in (tmp_path / "model_index.json").read_text()


def test_a_run_starts_from_what_another_exported(dit: str, exported: Path, start: list[str], tmp_path: Path) -> None:
    config = load(start[0], [*start[1:], f"family.init_from={exported}", "optim.denoiser.lr=1e-9"])
    assert check_start(config) == (None, [])
    train_worker(config, torch.device("cpu"))
    wanted = open_run(dit)[1].denoiser.state_dict()
    (exported / "model_index.json").rename(tmp_path / "index")  # its files are not needed any more
    try:
        found = open_run(str(tmp_path / "new"))[1].denoiser.state_dict()
        assert check_start(config)[0] is not None
    finally:
        (tmp_path / "index").rename(exported / "model_index.json")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7)
    assert read_config(str(tmp_path / "new")).family.init_from == str(exported)


def test_a_pipeline_that_was_trained_otherwise_is_warned_of(exported: Path, start: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(exported, folder)
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "sample"}))
    _, (line,) = check_start(load(start[0], [*start[1:], f"family.init_from={folder}"]))
    words = "diffusion.prediction is v here, and its scheduler's is sample"
    assert line == f"family.init_from: {folder}; {words}"
    cosine = '"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"'
    for content, words in (
        (f'{{"_class_name": "PNDMScheduler", {cosine}}}', None),  # of the same process
        (
            '{"prediction_type": "v_prediction", "beta_start": 0.001}',
            "diffusion.schedule 'cosine' leaves 0.677 of the data at timestep 522 here, and its scheduler's",
        ),
        (
            '{"prediction_type": "v_prediction", "trained_betas": [0.1]}',
            "its scheduler has 1 betas, and there are 1000",
        ),
        ('{"prediction_type": "v_prediction", "beta_schedule": 3}', "a scheduler whose beta_schedule cannot be read"),
        (f'{{"prediction_type": "v_prediction", "trained_betas": [{10**400}]}}', "whose trained_betas cannot be read"),
        ('{"prediction_type": "v_prediction", "beta_end": 2}', "a scheduler whose beta_end are no betas from 0 to 1"),
        (
            '{"_class_name": "FlowMatchEulerDiscreteScheduler"}',
            "its scheduler is a FlowMatchEulerDiscrete",
        ),
        ("[]", "scheduler_config.json: not a mapping of keys to values"),
    ):
        scheduler.write_text(content)
        for place in (folder, folder / "transformer"):
            _, lines = check_start(load(start[0], [*start[1:], f"family.init_from={place}"]))
            assert [str(words) in line for line in lines] == [True] * (words is not None), (content, lines)


def test_latents_have_the_scale_of_the_pipeline_that_they_are_of(
    exported: Path, start: list[str], tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "pipeline")
    file = tmp_path / "pipeline/vae/config.json"
    written = json.loads(file.read_text())
    own = written["scaling_factor"]
    # Latents of 3 times the deviation are others; this run's are drawn with another seed.
    for theirs, wanted, error in ((1.3 * own, 1.3 * own, 1e-6), (3.0 * own, own, 0.05)):
        file.write_text(json.dumps(written | {"scaling_factor": theirs}))
        run = tmp_path / f"run-{theirs}"
        more = [f"family.init_from={tmp_path}/pipeline/transformer", f"run.dir={run}"]
        train_worker(load(start[0], [*start[1:], *more]), torch.device("cpu"))
        assert float(open_run(str(run))[1].latent_scale) == pytest.approx(wanted, rel=error)
    file.write_text(json.dumps(written | {"scaling_factor": 0.0}))
    with pytest.raises(ConfigError, match="vae/config.json: scaling_factor: 0.0; must be above 0"):
        check_start(load(start[0], [*start[1:], f"family.init_from={tmp_path}/pipeline"]))


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_tensors_that_do_not_fit_are_named(change: str, exported: Path, start: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_bytes((exported / "transformer/config.json").read_bytes())
    tensors = load_file(exported / "transformer" / WEIGHTS)
    if change == "missing":
        del tensors["pos_embed.proj.bias"]
    else:
        tensors["pos_embed.proj.gain"] = torch.zeros(3)
    save_file(tensors, folder / WEIGHTS)
    words = {"missing": r"1 missing: pos_embed\.proj\.bias", "extra": r"1 not known: pos_embed\.proj\.gain"}
    with pytest.raises(ConfigError, match=rf"family\.init_from: {folder}: .*{words[change]}"):
        check_start(load(start[0], [*start[1:], f"family.init_from={folder}"]))


def test_embeddings_of_each_block_are_asked_for(exported: Path, start: list[str], tmp_path: Path) -> None:
    own = "family.dit={channels: 16, depth: 2, num_heads: 2, block_embeddings: true}"
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_bytes((exported / "transformer/config.json").read_bytes())
    tensors = load_file(exported / "transformer" / WEIGHTS)
    second = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    tensors[second][2] += 1.0
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="holds another network: block_embeddings true there, false here"):
        check_start(load(start[0], [*start[1:], f"family.init_from={folder}"]))

    changed = json.loads((folder / "config.json").read_text()) | {"norm_eps": 1e-5}
    (folder / "other").mkdir()
    (folder / "other/config.json").write_text(json.dumps(changed))
    (folder / "other" / WEIGHTS).symlink_to(folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"norm_eps \(feed_forward_norm_eps\) 1e-05 there, 1e-06 here"):
        check_start(load(start[0], [*start[1:], own, f"family.init_from={folder}/other"]))

    for source in (folder, exported):  # and where all are equal, each block begins with that one
        config = load(start[0], [*start[1:], own, f"family.init_from={source}"])
        assert check_start(config) == (None, [])
        family = build_family(config)
        family.initialize({"key": torch.arange(4), "image": torch.rand(4, 3, 16, 16)})
        state = family.denoiser.network.state_dict()
        assert len(state["block_labels.0.weight"]) == len(state["label.weight"]) == 5
        differing = (state["block_labels.0.weight"] != state["label.weight"]).any(dim=1)
        assert differing.tolist() == [False, False, source == folder, False, False]


def test_every_difference_is_named_before_the_start(
    noise: str, exported: Path, start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *start, f"family.init_from={exported}"]
    line = refused(capsys, 2, *command, "family.dit.depth=3", "family.dit.patch_size=4")
    assert f"family.init_from: {exported}/transformer; holds another network: " in line
    assert "num_layers (depth) 2 there, 3 here; patch_size 2 there, 4 here" in line
    line = refused(capsys, 2, *command, "data.num_classes=7")
    assert "num_embeds_ada_norm (data.num_classes) 4 there, 7 here" in line
    line = refused(capsys, 2, *command, "family.dit.qk_norm=true")
    assert "this run's network is none that diffusers has: qk_norm" in line
    line = refused(capsys, 2, *command, "family.network=unet", "family.dit={}", UNET)
    assert f"family.init_from: {exported}; a pipeline without the 'unet' that this run has" in line
    line = refused(capsys, 2, *command, f"family.init_from={exported}/vae")
    assert "holds a AutoencoderKL, and this run has a DiTTransformer2DModel" in line
    line = refused(capsys, 2, *command, "family.init_from=s3://pictures/dit")
    assert "family.init_from: 's3://pictures/dit'; must be a local folder" in line
    line = refused(capsys, 2, *command, f"family.init_from={tmp_path}")
    assert "config.json: no such file" in line
    first = settings("autoencoder_kl", noise, tmp_path / "first", f"family.init_from={exported}")
    line = refused(capsys, 2, "train", *first, "family.autoencoder.num_res_blocks=2")
    assert "layers_per_block (num_res_blocks) 1 there, 2 here" in line
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "first").exists()
