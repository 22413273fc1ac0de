"""The report draws what a run has logged."""

from gmdist.report.page import _curves


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
