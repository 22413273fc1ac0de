"""The Inception of the Frechet distance beside pytorch-fid's 0.3.0, with random weights."""

import pytest
import torch

from gmdist.nets.inception import Inception

# torchvision describes operators of its own, which are missing where its wheel was built for another torch. They are
# not needed here.
_declared = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
peer = pytest.importorskip("pytorch_fid.inception")

pytestmark = pytest.mark.parity


def randomize(module: torch.nn.Module) -> None:
    """Weights that keep signals alive, and statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.ndim == 4:
                tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(0.0, 0.1)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_pytorch_fid(channels: int) -> None:
    # What pytorch_fid.fid_inception_v3 builds, before it fetches its weights.
    theirs = peer._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    theirs.Mixed_5b = peer.FIDInceptionA(192, pool_features=32)
    theirs.Mixed_5c = peer.FIDInceptionA(256, pool_features=64)
    theirs.Mixed_5d = peer.FIDInceptionA(288, pool_features=64)
    theirs.Mixed_6b = peer.FIDInceptionC(768, channels_7x7=128)
    theirs.Mixed_6c = peer.FIDInceptionC(768, channels_7x7=160)
    theirs.Mixed_6d = peer.FIDInceptionC(768, channels_7x7=160)
    theirs.Mixed_6e = peer.FIDInceptionC(768, channels_7x7=192)
    theirs.Mixed_7b = peer.FIDInceptionE_1(1280)
    theirs.Mixed_7c = peer.FIDInceptionE_2(2048)
    randomize(theirs)
    theirs = theirs.eval()
    ours = Inception().eval()
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(weights)

    images = torch.rand(2, channels, 40, 40, generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0
    peer.fid_inception_v3 = lambda: theirs
    whole = peer.InceptionV3([3]).eval()
    with torch.no_grad():
        expected = whole((images.expand(-1, 3, -1, -1) + 1.0) / 2.0)[0][:, :, 0, 0]
        found = ours(images)
    assert expected.std() > 0.0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
