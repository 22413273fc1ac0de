"""Small families, in each of which is a pattern that is hard to train on several workers."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from gmdist import rng
from gmdist.families.family import Batch, Family, Phase
from gmdist.workers import all_mean

BATCH = 8  # samples a step, over all workers


def flat(batch: Batch) -> Tensor:
    return batch["image"].flatten(1)


class TwoNetworks(Family):
    """A generator and a critic that judge each other, with a lazy gradient penalty."""

    averaged = ("generator",)
    local = False  # whether a loss is not a mean over samples: then its value depends on how a batch is cut

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.generator = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 256))
        self.critic = nn.Sequential(nn.Linear(256, 64), nn.Softplus(), nn.Linear(64, 1))

    def phases(self) -> list[Phase]:
        return [
            Phase("g", "generator", self.g_loss),
            Phase("d", "critic", self.d_loss),
            Phase("d_r1", "critic", self.r1, every=2, higher_order=True),
        ]

    def fake(self, batch):
        return self.generator(flat(batch)[:, :4])

    def g_loss(self, batch, seen):
        loss = softplus(-self.critic(self.fake(batch))).mean()
        return loss, {"loss": loss.detach()}

    def d_loss(self, batch, seen):
        real, fake = self.critic(flat(batch)), self.critic(self.fake(batch).detach())
        loss = (softplus(-real) + softplus(fake)).mean()
        return loss, {"loss": loss.detach()}

    def r1(self, batch, seen):
        image = flat(batch).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.critic(image).sum(), image, create_graph=True)
        loss = gradient.square().sum(1).mean()
        return loss, {"penalty": loss.detach()}


class PathLength(TwoNetworks):
    """Path length regularisation, whose running mean is a buffer (Karras 2020, Eq. 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_length", torch.zeros(()))
        self.register_buffer("lengths", torch.zeros(2))  # sum and number in this step

    def phases(self) -> list[Phase]:
        return [*super().phases(), Phase("g_pl", "generator", self.path_length, every=2, higher_order=True)]

    def path_length(self, batch, seen):
        latent = flat(batch)[:, :4].requires_grad_(True)
        image = self.generator(latent)
        noise = rng.normal(1, "path", batch["key"], image.shape[1:]).to(image.dtype)
        (gradient,) = torch.autograd.grad((image * noise).sum(), latent, create_graph=True)
        length = gradient.square().sum(1).sqrt()
        self.lengths += torch.stack([length.detach().sum(), torch.tensor(float(len(length)))])
        loss = 0.1 * (length - self.mean_length).square().mean()
        return loss, {"loss": loss.detach()}

    def after_step(self, seen):
        total, count = all_mean(self.lengths)
        if count > 0:
            self.mean_length.lerp_(total / count, 0.3)
        self.lengths.zero_()
        return {"mean_length": self.mean_length.clone()}


class AdaptiveWeight(Family):
    """An autoencoder with VQGAN's weight of the adversarial loss (Esser 2021, Eq. 7), through a frozen network."""

    local = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.autoencoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=4, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(8, 8, 4, stride=4),
            nn.SiLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )
        self.critic = nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), nn.SiLU(), nn.Conv2d(8, 1, 1))
        self.perceptual = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.Tanh())

    def phases(self) -> list[Phase]:
        return [
            Phase("ae", "autoencoder", self.ae_loss, revisits=True),
            Phase("d", "critic", self.d_loss),
        ]

    def ae_loss(self, batch, seen):
        image = batch["image"]
        out = self.autoencoder(image)
        error = (out - image).abs().mean() + (self.perceptual(out) - self.perceptual(image)).square().mean()
        judged = -self.critic(out).mean()
        last = self.autoencoder[-1].weight
        (a,) = torch.autograd.grad(error, last, retain_graph=True)
        (b,) = torch.autograd.grad(judged, last, retain_graph=True)
        weight = (a.norm() / (b.norm() + 1e-4)).clamp(max=1e4).detach()
        return error + weight * judged, {"weight": weight}

    def d_loss(self, batch, seen):
        image = batch["image"]
        loss = (1.0 - self.critic(image)).relu().mean() + (
            1.0 + self.critic(self.autoencoder(image).detach())
        ).relu().mean()
        return loss, {"loss": loss.detach()}


class Cycle(Family):
    """Two generators of one optimizer, which form a cycle, and two critics of another."""

    averaged = ("generators",)
    local = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.generators = nn.ModuleDict({name: self.mapping(128, 32, 128) for name in ("there", "back")})
        self.critics = nn.ModuleDict({name: self.mapping(128, 32, 1) for name in ("there", "back")})

    @staticmethod
    def mapping(size, hidden, out):
        return nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, out))

    def phases(self) -> list[Phase]:
        return [Phase("g", "generators", self.g_loss), Phase("d", "critics", self.d_loss)]

    def g_loss(self, batch, seen):
        a, b = flat(batch).chunk(2, dim=1)
        there, back = self.generators["there"], self.generators["back"]
        cycle = (back(there(a)) - a).square().mean() + (there(back(b)) - b).square().mean()
        judged = (self.critics["there"](there(a)) - 1).square().mean() + (
            self.critics["back"](back(b)) - 1
        ).square().mean()
        return 10 * cycle + judged, {"cycle": cycle.detach()}

    def d_loss(self, batch, seen):
        a, b = flat(batch).chunk(2, dim=1)
        loss = torch.zeros((), dtype=a.dtype)
        for name, source, target in (("there", a, b), ("back", b, a)):
            critic, made = self.critics[name], self.generators[name](source).detach()
            loss = loss + (critic(target) - 1).square().mean() + critic(made).square().mean()
        return loss, {"loss": loss.detach()}


class Energy(Family):
    """An energy, whose negative samples a few steps of Langevin dynamics make (Du 2019)."""

    local = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.energy = nn.Sequential(nn.Linear(256, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def phases(self) -> list[Phase]:
        return [Phase("e", "energy", self.loss, higher_order=True)]

    def loss(self, batch, seen):
        image = flat(batch)
        sample = rng.normal(2, "start", batch["key"], image.shape[1:]).to(image.dtype)
        for step in range(3):
            sample.requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.energy(sample).sum(), sample)
            noise = rng.normal(2, f"noise/{step}", batch["key"], image.shape[1:]).to(image.dtype)
            sample = (sample - 0.5 * gradient + 0.1 * noise).detach()
        real, fake = self.energy(image), self.energy(sample)
        loss = (real - fake + 0.1 * (real.square() + fake.square())).mean()
        return loss, {"loss": loss.detach()}


class Parts(Family):
    """Two phases train one child in a step, and each reaches a part of it, which changes from step to step."""

    averaged = ("network",)
    local = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        layers = {"body": nn.Linear(256, 32), "a": nn.Linear(32, 4), "b": nn.Linear(32, 4), "c": nn.Linear(32, 4)}
        self.network = nn.ModuleDict(layers)

    def phases(self) -> list[Phase]:
        return [Phase("a", "network", self.a_loss), Phase("b", "network", self.b_loss, every=2)]

    def a_loss(self, batch, seen):
        head = self.network["c" if seen // BATCH % 3 == 1 else "a"]
        loss = (head(self.network["body"](flat(batch)).tanh()) - flat(batch)[:, :4]).square().mean()
        return loss, {"loss": loss.detach()}

    def b_loss(self, batch, seen):
        hidden = self.network["body"](flat(batch)).tanh()
        loss = (self.network["b"](hidden.detach()) - flat(batch)[:, 4:8]).square().mean()  # not the body
        return loss, {"loss": loss.detach()}


class Poisoned(Parts):
    """A sample of the second step makes its loss NaN."""

    def a_loss(self, batch, seen):
        loss, metrics = super().a_loss(batch, seen)
        return torch.where((batch["key"] == BATCH + 1).any(), torch.nan, loss), metrics


class Scalar(Family):
    """A child with a scalar and a matrix that is not contiguous."""

    averaged = ("network",)
    local = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.network = nn.Linear(256, 4)
        self.network.scale = nn.Parameter(torch.tensor(1.3))
        self.network.mixing = nn.Parameter(torch.randn(4, 6).t())

    def phases(self) -> list[Phase]:
        return [Phase("net", "network", self.loss)]

    def loss(self, batch, seen):
        out = (self.network(flat(batch)) * self.network.scale.exp()) @ self.network.mixing.t()
        loss = (out - flat(batch)[:, :6]).square().mean()
        return loss, {"loss": loss.detach()}


class Normed(Family):
    """A child with batch norm: each worker norms with its own samples."""

    averaged = ("network",)
    local = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.network = nn.Sequential(
            nn.Conv2d(1, 8, 4, 4, bias=False), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 1, 4)
        )

    def phases(self) -> list[Phase]:
        return [Phase("net", "network", self.loss)]

    def loss(self, batch, seen):
        target = batch["image"].mean(dim=(1, 2, 3))
        loss = (self.network(batch["image"]).flatten() - target).square().mean()
        return loss, {"loss": loss.detach()}


class Branching(Family):
    """A graph that depends on the data: a layer each for odd and for even samples, so that workers differ."""

    local = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.network = nn.ModuleDict({"odd": nn.Linear(256, 32), "even": nn.Linear(256, 32), "out": nn.Linear(32, 4)})

    def phases(self) -> list[Phase]:
        return [Phase("net", "network", self.loss, higher_order=True)]

    def loss(self, batch, seen):
        loss = flat(batch).new_zeros(())
        is_odd = batch["key"] % 2 == 1
        for name, chosen in (("odd", is_odd), ("even", ~is_odd)):
            if chosen.any():
                image = flat(batch)[chosen]
                out = self.network["out"](self.network[name](image).tanh())
                loss = loss + (out - image[:, :4]).square().sum() / (4 * len(is_odd))
        return loss, {"loss": loss.detach()}


FAMILIES = [TwoNetworks, PathLength, AdaptiveWeight, Cycle, Energy, Parts, Scalar, Normed]
