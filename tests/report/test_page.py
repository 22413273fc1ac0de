"""The report draws what a run has logged."""

import math
from pathlib import Path

from gmdist.config import load
from gmdist.report.page import _curves, _section
from gmdist.train.metrics import MetricsLog

CONFIG = str(Path(__file__).parent.parent.parent / "configs/digits/autoencoder_kl.yaml")


def test_a_run_that_diverged_has_a_report(tmp_path: Path) -> None:
    log = MetricsLog(str(tmp_path), 0)
    for step, loss in enumerate((2.0, 1.0, math.nan, math.inf), start=1):
        log.write({"step": step, "images": 8 * step, "net/loss": loss, "order_digest": "0" * 16})
    log.write({"step": 4, "test/l1": math.nan, **{f"test/loss_noise_{i}": math.nan for i in range(8)}})
    log.close()
    section = _section(str(tmp_path), load(CONFIG, [f"run.dir={tmp_path}"]))
    assert "4 steps, 32 images" in section["summary"]
    assert "test/l1 not finite" in section["summary"]
    assert len(section["curves"]) == 1


def test_the_validation_loss_is_drawn_by_noise_level_and_not_bin_by_bin() -> None:
    lines = [
        {"step": step, **{f"test/loss_noise_{i}": (i + 1) / step for i in range(12)}, "test/loss": 1.0 / step}
        for step in (100, 200, 300)
    ]
    by_level, loss = _curves([*lines, {"step": 400, "denoiser/loss": 0.5}])
    for words in ("validation loss by noise level", "step 100", "step 200", "step 300"):
        assert words in by_level
    assert "step 400" not in by_level
    assert "test/loss" in loss


def test_a_run_without_such_a_loss_has_its_curves_only() -> None:
    assert len(_curves([{"step": 1, "a/loss": 2.0}, {"step": 2, "a/loss": 1.0, "test/loss_noise_0": 1.0}])) == 2


def test_the_kl_term_of_a_vae_is_one_figure() -> None:
    lines = [{"step": step, **{f"test/kl_nats_{i}": float(i) for i in range(16)}} for step in (100, 200)]
    curves = _curves([line | {"test/kl_nats": 120.0} for line in lines])
    assert len(curves) == 2
    assert "KL term by latent dimension" in curves[0]
