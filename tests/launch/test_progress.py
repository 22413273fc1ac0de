"""What a person sees of a run."""

import pytest

from gmdist.launch.progress import Display
from gmdist.train.hooks import Progress


@pytest.mark.parametrize(("seconds", "words"), [(59.6, "00:01:00 left"), (30 * 3600.0 + 61.0, "30:01:01 left")])
def test_days_are_not_lost(seconds: float, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Display("run") as display:
        display.progress(Progress(100, 100, 50.0, 0.25, seconds))
    assert f"step 100/100, loss 0.2500, 50 images/s, {words}" in capsys.readouterr().out
