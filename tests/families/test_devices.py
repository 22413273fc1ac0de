"""That a family keeps to its device: found here on any machine, and not on the first GPU."""

import pytest
import torch

from gmdist.families.family import Family
from gmdist.train.engine import freeze_all_but
from tests import support
from tests.standin import DEVICE, standing_in
from tests.support import SMALL, MemorySource, small_family

every_family = pytest.mark.parametrize("name", sorted(SMALL))


@every_family
def test_a_loss_keeps_to_the_device_and_does_not_wait_for_it(name: str) -> None:
    with standing_in() as waits:
        batch = MemorySource(16, 8).first(8).batch_on(DEVICE)
        family = small_family(name).to(DEVICE)
        family.initialize(batch)
        for is_first in (True, False):
            for phase in family.phases():
                freeze_all_but(family, phase.trains)
                waits.clear()
                loss, metrics = phase.loss(batch, 0)
                loss.backward()
                assert {value.device for value in [loss, *metrics.values()]} == {DEVICE}
                # Tables are moved once; and a search looks again at the tokens whose nearest code rounding leaves open.
                assert is_first or not waits or ("vq" in name and set(waits) == {"aten.nonzero.default"})
            family.after_step(8)


def test_a_priors_loss_does_not_wait_for_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    with standing_in() as waits:
        batch = MemorySource(16, 8).first(8).batch_on(DEVICE)
        monkeypatch.setattr(support, "PatchMeans", lambda config, surroundings: small_family("vq_vae"))
        family = small_family("transformer_prior").to(DEVICE)
        family.coding.tokenizer.initialize(batch)
        family.initialize(batch)
        for _ in range(2):
            waits.clear()
            family.phases()[0].loss(batch, 0)[0].backward()
        assert set(waits) <= {"aten.nonzero.default"}


@every_family
def test_it_draws_and_measures_there(name: str) -> None:
    with standing_in(), torch.no_grad():
        batch = MemorySource(16, 8).first(8).batch_on(DEVICE)
        family = small_family(name).to(DEVICE)
        family.initialize(batch)
        family.eval()
        found = [family.preview(batch), *family.evaluate(batch).values(), *family.scores(batch).values()]
        found += family.encode(batch["image"]).values()
        if type(family).sample is not Family.sample:
            found.append(family.sample(batch["key"]))
        assert {tensor.device for tensor in found} == {DEVICE}


def test_the_stand_in_does_as_a_gpu_does() -> None:
    with standing_in() as waits:
        there = torch.arange(6.0, device=DEVICE).view(2, 3)
        assert (there @ there.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]
        assert there.add_(1.0) is there
        assert there[0, 0].item() == 1.0
        assert there.cpu().device.type == "cpu"
        assert waits == ["tolist", "aten._local_scalar_dense.default", "aten._to_copy.default"]
        with pytest.raises(RuntimeError, match="on the device and on the host"):
            there + torch.ones(2, 3)
        waits.clear()
        assert there[torch.tensor([0])].tolist() == [[1.0, 2.0, 3.0]]
        assert there[there > 5.0].tolist() == [6.0]
        torch.ones(3).to(DEVICE, non_blocking=True)
        torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        assert waits == ["aten.index.Tensor", "tolist"] * 2 + ["aten._to_copy.default"]
