"""Configs: composition, overrides, and refusals that name the key."""

from pathlib import Path

import pytest

from gmdist.config import Config, from_yaml, load
from gmdist.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.name != "base.yaml" and path.parent.name != "sweeps"
)

BASE = """
name: base
family: {name: autoencoder_kl, autoencoder: {channels: 8, multipliers: [1, 2]}}
data: {train: data/x, batch_size: 8, image_size: 16, channels: 1}
optim: {autoencoder: {lr: 1e-3}}
train: {num_steps: 10}
run: {dir: runs/x}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "base.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path) -> None:
    config = load(str(path))
    assert from_yaml(config.to_yaml(), "again") == Config(**vars(config))


def test_base_then_file_then_overrides(base: Path) -> None:
    above = base.parent / "above.yaml"
    above.write_text("base: base.yaml\nname: above\ntrain: {seed: 3}\nfamily: {autoencoder: {num_res_blocks: 1}}\n")
    config = load(str(above), ["train.num_steps=20", "optim.autoencoder.betas=[0.5, 0.9]", "data.test=null"])
    assert config.name == "above"
    assert (config.train.num_steps, config.train.seed) == (20, 3)
    assert config.family.autoencoder.multipliers == (1, 2)
    assert config.family.autoencoder.num_res_blocks == 1
    assert config.optim["autoencoder"].betas == (0.5, 0.9)
    assert config.optim["autoencoder"].lr == 1e-3
    assert config.data.test is None
    assert config.cluster.num_workers == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.autoencoder.lrate=1", "optim.autoencoder.lrate: no such key; did you mean 'lr'?"),
        ("train.num_step=1", "train.num_step: no such key; did you mean 'num_steps'?"),
        ("trian.num_steps=1", "trian: no such key; did you mean 'train'?"),
        ("family.autoencoder.chanels=8", "family.autoencoder.chanels: no such key; did you mean 'channels'?"),
        ("family.zzz=8", "family.zzz: no such key; the keys here are autoencoder, kl_weight"),
        ("family.name=vea", "family.name: 'vea'; must be one of autoencoder, "),
        ("train.num_steps=many", "train.num_steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("train.num_steps=1.5", "train.num_steps: Value '1.5' of type 'float' could not be converted to Integer"),
        ("train.num_steps=null", "train.num_steps: "),
        ("train=3", "train: 3; must be a mapping"),
        ("optim.autoencoder=3", "optim.autoencoder: 3; must be a mapping"),
        ("data.mix=[{train: a}]", "data.mix: [{'train': 'a'}]; must be a mapping of names to settings"),
        ("base=other.yaml", "base: 'other.yaml'; is for config files"),
        (f"optim={'[' * 3000}{']' * 3000}", "not a valid YAML config"),
        ("name=null", "name: missing"),
        ("data.image_size=17", "family.autoencoder.multipliers: image sides must be divisible by 2, not 17"),
        ("cluster.num_workers=3", "data.batch_size: 8; 3 workers do not divide it"),
        ("train.zero_stage=4", "train.zero_stage: 4; must be 0, 1, 2 or 3"),
        ("data.train='pipe:curl x'", "pipe:curl x: not a location"),
        ("data.train=http://x/y", "http://x/y: not a location"),
        ("data.channels=2", "data.channels: 2; must be 1 (grey) or 3 (RGB)"),
        ("run.dir='${oc.env:HOME}'", "has no meaning here"),
        ("train.num_steps", "'train.num_steps': not an override; write key=value"),
        (".x=1", "'.x=1': not an override"),
        ("name.x=1", "name.x: no such key; 'name' has no keys below it"),
        ("train.num_steps=[", "not a valid YAML config"),
        ("family.name=[a]", "family.name: '['a']'; must be one of"),
        ("family.autoencoder.channels=7", "family.autoencoder.channels: 7; must be even"),
        ("family.autoencoder.channels=-8", "family.autoencoder.channels: -8; must be even"),
        ("family.autoencoder.multipliers=[]", "family.autoencoder.multipliers: []; must be one or more"),
        ("family.autoencoder.multipliers=[1,-2]", "family.autoencoder.multipliers: [1, -2]"),
        ("family.autoencoder.latent_channels=0", "family.autoencoder.latent_channels: 0; must be at least 1"),
        ("family.autoencoder.num_res_blocks=-1", "family.autoencoder.num_res_blocks: -1; must be at least 1"),
        ("family.kl_weight=.nan", "family.kl_weight: nan"),
        ("family.perceptual.name=vgg", "family.perceptual.name: 'vgg'; must be one of none, gradient_frequency, lpips"),
        ("family.perceptual.name=lpips", "family.perceptual.path: missing; must be a folder or a file for lpips"),
        ("family.discriminator.chanels=8", "family.discriminator.chanels: no such key; did you mean 'channels'?"),
        (
            "family.discriminator.num_layers=9",
            "family.discriminator.num_layers: 9; must be at least 1, and image sides",
        ),
        ("family.discriminator=3", "family.discriminator: 3; must be a mapping of keys to values"),
        ("optim.autoencoder.betas=[0.9,1.5]", "optim.autoencoder.betas: (0.9, 1.5); must be at least 0 and below 1"),
        ("optim.autoencoder.betas=[0.9,x]", "optim.autoencoder.betas: [0.9, 'x']; must be a list of 2 numbers"),
        ("optim.autoencoder.betas=[0.9]", "optim.autoencoder.betas: [0.9]; must be a list of 2 numbers"),
        ("optim.autoencoder.betas={a: 0.9}", "optim.autoencoder.betas: {'a': 0.9}; must be a list of 2 numbers"),
        ("evaluation.metrics=fid", "evaluation.metrics: fid; must be a list of texts"),
        ("family.autoencoder.multipliers=[1.5]", "family.autoencoder.multipliers: [1.5]; must be a list of integers"),
        ("family.autoencoder.multipliers=[null]", "family.autoencoder.multipliers: [None]; must be a list of integers"),
        ("family.autoencoder.multipliers=[[1]]", "family.autoencoder.multipliers: [[1]]; must be a list of integers"),
        ("optim.autoencoder.lr=.inf", "optim.autoencoder.lr: inf; must be a number above 0"),
        ("optim.autoencoder.warmup_steps=-5", "optim.autoencoder.warmup_steps: -5"),
        ("optim.autoencoder.momentum=1.0", "optim.autoencoder.momentum: 1.0"),
        ("train.ema_ramp=5", "train.ema_ramp: 5.0"),
        ("train={num_steps: 5, profile_steps: 2}", "train.profile_steps: 2; of a run of train.num_steps 5 nothing"),
        ("train.seed=99999999999999999999999", "train.seed: 99999999999999999999999; must fit into 64 bits"),
        ("data.seed=99999999999999999999999", "data.seed: 99999999999999999999999; must fit into 64 bits"),
        ("data.image_size=100000", "data.image_size: 100000; must be at most"),
        ("cluster.timeout_s=0", "cluster.timeout_s: 0.0; must be from 1 to 31536000, a year"),
        ("cluster.timeout_s=1e10", "cluster.timeout_s: 10000000000.0; must be from 1 to 31536000, a year"),
        ("cluster.address=ray://head:10001", "cluster.address: 'ray://head:10001'; use host:port of the head"),
        ("family=0", "family: 0; must be a mapping"),
        ("cluster=false", "cluster: False; must be a mapping"),
        ("optim=[]", "optim: []; must be a mapping"),
        ("train.num_steps=010", "train.num_steps=010: 010: YAML reads it as another number"),
        ("train.num_steps=1:30", "train.num_steps=1:30: 1:30: YAML reads it as another number"),
        ("optim.autoencoder.betas=[0.5, 1:30.5]", "1:30.5: YAML reads it as another number"),
        ("train.num_steps=???", "train.num_steps=???: '???': stands for a value that is missing"),
        ("name='???'", "name='???': '???': stands for a value that is missing"),
        ("run.dir=''", "run.dir: ''; must be a folder"),
    ],
)
def test_refusals_name_the_key(base: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(str(base), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("family.unet.num_heads=3", "family.unet.num_heads: 3; must divide the attended widths [32, 64]"),
        ("family.unet.num_heads=0", "family.unet.num_heads: 0"),
        ("family.unet.dropout=2", "family.unet.dropout: 2.0"),
        ("family.unet.attention_levels=[9]", "family.unet.attention_levels: [9]; the levels are 0 to 1"),
        ("family.diffusion.num_timesteps=99999999999", "family.diffusion.num_timesteps: 99999999999"),
        ("family.diffusion.sampler.guidance=.nan", "family.diffusion.sampler.guidance: nan"),
        ("family.conditioning.dropout=2", "family.conditioning.dropout: 2.0; must be at least 0 and below 1"),
    ],
)
def test_denoisers_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(str(ROOT / "configs/digits/latent_diffusion.yaml"), [override])
    assert message in str(caught.value)


def test_parts_of_a_family_are_left_out_or_set(base: Path) -> None:
    assert load(str(base)).family.discriminator is None
    config = load(str(base), ["family.discriminator.num_layers=1", "family.discriminator.adaptive=false"])
    assert (config.family.discriminator.num_layers, config.family.discriminator.channels) == (1, 64)
    assert from_yaml(config.to_yaml(), "again") == config
    assert load(str(base), ["family.discriminator={num_layers: 2}"]).family.discriminator.num_layers == 2
    assert load(str(base), ["family.discriminator={}", "family.discriminator=null"]).family.discriminator is None
    null_first = ["family.discriminator=null", "family.discriminator.num_layers=2"]
    assert load(str(base), null_first).family.discriminator.num_layers == 2


def test_locations_are_made_absolute(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    config = load(str(base), ["data.test=s3://bucket/test/"])
    assert config.run.dir == str(base.parent / "runs/x")
    assert config.data.train == str(base.parent / "data/x")
    assert config.data.test == "s3://bucket/test"
    lpips = load(str(base), ["family.perceptual.name=lpips", "family.perceptual.path=weights"])
    assert lpips.family.perceptual.path == str(base.parent / "weights")
    latent = load(str(ROOT / "configs/digits/latent_diffusion.yaml"), [])
    assert latent.family.first_stage == str(base.parent / "runs/digits/autoencoder_kl")


def test_missing_keys_are_named(base: Path) -> None:
    base.write_text(BASE.replace("batch_size: 8, ", ""))
    with pytest.raises(ConfigError, match=r"^data\.batch_size: missing$"):
        load(str(base))
    base.write_text(BASE.replace("run: {dir: runs/x}", ""))
    with pytest.raises(ConfigError, match="^run: missing; a run's config needs it, its own or from"):
        load(str(base))


def test_files_that_are_no_configs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: no such config file"):
        load(str(tmp_path / "no.yaml"))
    (tmp_path / "bad.yaml").write_text("a: {b: -017}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: -017: YAML reads it as another number; write a number without"):
        load(str(tmp_path / "bad.yaml"))
    for text in ("- a\n- b\n", "a: [", "a: 1\na: 2\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.yaml: not a valid YAML config"):
            load(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.yaml: cannot be read"):
        load(str(tmp_path / "bad.yaml"))
    (tmp_path / "loop.yaml").write_text("base: loop.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load(str(tmp_path / "loop.yaml"))


def test_nothing_in_a_config_is_run(base: Path, tmp_path: Path) -> None:
    base.write_text(BASE.replace("name: base", f"name: !!python/object/apply:os.system ['touch {tmp_path}/owned']"))
    with pytest.raises(ConfigError, match="not a valid YAML config"):
        load(str(base))
    assert not (tmp_path / "owned").exists()


def test_a_mix_takes_the_place_of_one_data_set(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    mix = ["data.train=null", "data.mix.photos.train=s3://bucket/photos", "data.mix.photos.weight=3"]
    config = load(str(base), [*mix, "data.mix.glyphs.train=glyphs"])
    assert from_yaml(config.to_yaml(), "again") == config
    assert [(part.train, part.weight) for part in config.data.trained_on] == [
        ("s3://bucket/photos", 3),
        (f"{base.parent}/glyphs", 1),
    ]
    for settings, words in (
        (["data.train=null"], r"^data\.train: missing; must be a folder or an s3:// prefix, or data\.mix"),
        (["data.mix.photos.train=x"], r"^data\.train: 'data/x'; must be null beside data\.mix"),
        ([*mix, "data.mix.photos.wieght=2"], r"^data\.mix\.photos\.wieght: no such key; did you mean 'weight'\?"),
        ([*mix, "data.mix.photos.weight=0"], r"^data\.mix\.photos\.weight: 0; must be from 1 to"),
        ([*mix, "data.mix.photos.weight=0.5"], r"^data\.mix\.photos\.weight: Value '0\.5'"),
        ([*mix, "data.mix.other.weight=2"], r"^data\.mix\.other\.train: missing"),
        ([*mix, "data.mix.other.train=''"], r"^data\.mix\.other\.train: ''; must be a folder"),
        (["data.train=null", "data.mix=photos"], r"^data\.mix: "),
    ):
        with pytest.raises(ConfigError, match=words):
            load(str(base), settings)


def test_object_storage_is_set_in_the_config(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["data.s3.endpoint_url=http://minio:9000", "data.s3.addressing_style=path", "data.cache_dir=cache"]
    config = load(str(base), settings)
    assert from_yaml(config.to_yaml(), "again") == config
    assert config.data.s3.endpoint_url == "http://minio:9000"
    assert config.data.cache_dir == f"{tmp_path}/cache"
    for setting, words in (
        ("data.s3.addressing_style=host", "data.s3.addressing_style: 'host'; must be one of auto, path, virtual"),
        ("data.s3.endpoint_url=minio:9000", "data.s3.endpoint_url: 'minio:9000'; must begin with http"),
        ("data.s3.endpoint_url=minio:sesame@host:9000", "data.s3.endpoint_url: must not hold credentials; "),
        ("data.s3.endpoint_url=https://host?key=sesame", "data.s3.endpoint_url: must not hold credentials; "),
        ("run.dir=2024_01_05", "run.dir: 20240105; YAML reads it as a number: put it in quotes"),
        ("data.cache_dir=no", "data.cache_dir: False; YAML reads it as true or false: put it in quotes"),
        ("data.s3.endpoint=x", "data.s3.endpoint: no such key; did you mean 'endpoint_url'"),
        ("data.s3.timeout_s=0", "data.s3.timeout_s: 0"),
        ("data.s3.secret_key=x", "data.s3.secret_key: no such key"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(str(base), [setting])


def test_evaluation_is_set_in_the_config(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(str(base)).evaluation.metrics == ()  # training generates nothing for it unless it is asked to
    settings = ["evaluation.metrics=[fid,pr]", "evaluation.features=inception.pth", "evaluation.reference=s3://real/x"]
    config = load(str(base), settings)
    assert from_yaml(config.to_yaml(), "again") == config
    assert config.evaluation.metrics == ("fid", "pr")
    assert config.evaluation.features == f"{tmp_path}/inception.pth"
    for setting, words in (
        ("evaluation.metrics=[fid,is]", "evaluation.metrics: 'is'; must be of fid, kid, pr, each once"),
        ("evaluation.metric=[fid]", "evaluation.metric: no such key; did you mean 'metrics'"),
        ("evaluation.num_images=3", "evaluation.num_images: 3; must be at least 4"),
        ("evaluation.num_reference_images=0", "evaluation.num_reference_images: 0; must be at least 4"),
        ("evaluation.batch_size=0", "evaluation.batch_size: 0; must be at least 1"),
        ("evaluation.features=''", "evaluation.features: ''; must be a path"),
        ("evaluation.reference=gs://x", "gs://x: not a location that gmdist reads"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(str(base), [setting])


def test_best_metrics_that_nothing_measures_are_refused() -> None:
    digits = str(ROOT / "configs/digits/latent_diffusion.yaml")
    every = ["train.evaluate_every=100", "train.checkpoint_every=100"]
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: \['fid'\]; train.best_metric 'test/kid' needs kid"):
        load(digits, [*every, "train.best_metric=test/kid", "evaluation.metrics=[fid]"])
    load(digits, [*every, "train.best_metric=test/recall", "evaluation.metrics=[pr]"])


@pytest.mark.parametrize(
    "text",
    ["1e-4", "010", "127.0.0.1:6379", "1e3", "1_000", "0x10", "12:30", "08:30", ".5", "no", "null", "2024-01-05", "-"],
)
def test_texts_that_look_like_something_else_come_back(text: str) -> None:
    config = load(CONFIGS[0], [f"name='{text}'", "data.train=null", f"data.mix={{'{text}': {{train: here}}}}"])
    found = from_yaml(config.to_yaml(), "config")
    assert found.name == text
    assert list(found.data.mix) == [text]
