"""Learning rates and optimizers by name."""

import dataclasses

import pytest
import torch

from gmdist.errors import ConfigError
from gmdist.families.family import Phase
from gmdist.train.optim import (
    OptimConfig,
    lazily,
    learning_rate,
    make_optimizer,
    materialize_state,
    num_updates,
    parameter_groups,
    step_unless,
)


def test_warm_up_then_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr=0.2)
    assert [learning_rate(config, step, 14) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 4, 14) == 1.0
    assert learning_rate(config, 9, 14) == pytest.approx(0.6)
    assert learning_rate(config, 14, 14) == pytest.approx(0.2)
    linear = OptimConfig(lr=1.0, schedule="linear")
    assert learning_rate(linear, 25, 100) == pytest.approx(0.75)
    assert learning_rate(OptimConfig(lr=0.3), 10**6, 100) == 0.3
    falling = OptimConfig(lr=1.0, schedule="inverse_sqrt", warmup_steps=4)
    assert [learning_rate(falling, step, 100) for step in (1, 3, 4, 15, 63)] == pytest.approx(
        [0.5, 1.0, (4 / 5) ** 0.5, 0.5, 0.25]
    )


def test_lazy_phases_share_out_a_step() -> None:
    # StyleGAN2's: R1 at every 16th step, path lengths at every 4th (Karras 2020, App. B): k / (k + 1).
    main = Phase("d", "d", lambda batch, seen: (torch.zeros(()), {}))
    lazy = dataclasses.replace(main, name="d_r1", every=16)
    adam = OptimConfig("adam", 0.002, (0.0, 0.99), final_lr=0.001)
    found = lazily(adam, [main, lazy])
    assert (found.lr, found.final_lr) == pytest.approx((0.002 * 16 / 17, 0.001 * 16 / 17))
    assert found.betas == pytest.approx((0.0, 0.99 ** (16 / 17)))
    assert lazily(adam, [main]) == adam
    sgd = OptimConfig("sgd", 0.1)
    assert lazily(sgd, [main, lazy]) == sgd


NAMES = ["adamw", "adam", "adamax", "sgd"]


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_torch(name: str) -> None:
    """Against the textbook's optimizers of torch, unfused, in fp64."""
    config = OptimConfig(name=name, lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, momentum=0.7)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "sgd": torch.optim.SGD}
    own = {"momentum": 0.7} if name == "sgd" else {"betas": (0.8, 0.95), "eps": 1e-3}
    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, vector = (torch.nn.Parameter(row.float()) for row in start)
    theirs = [torch.nn.Parameter(row.clone()) for row in start]
    ours = make_optimizer(config, [(True, [matrix]), (False, [vector])])
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, (0.1, 0.0), strict=True)]
    reference = kind[name](groups, lr=0.05, foreach=False, **own)
    for _ in range(20):
        for parameter in (matrix, vector, *theirs):
            parameter.grad = parameter.data.sin() + 0.1
        step_unless(ours, torch.tensor(False))
        reference.step()
    for parameter, expected in zip((matrix, vector), theirs, strict=True):
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_is_left_out_leaves_no_trace(name: str) -> None:
    results = []
    for bad in ([], [1, 2]):
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make_optimizer(OptimConfig(name=name, lr=0.1, weight_decay=0.01), [(True, [parameter])])
        materialize_state(optimizer)
        for step in range(6):
            is_bad = step in bad
            if step in (1, 2) and not is_bad:
                continue
            parameter.grad = torch.full((2,), torch.nan) if is_bad else parameter.data.clone()
            step_unless(optimizer, torch.tensor(is_bad))
        results.append((parameter.data.clone(), num_updates(optimizer)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == (0 if name == "sgd" else 4)


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(2, 2), torch.nn.GroupNorm(1, 2)
            self.table = torch.nn.Embedding(3, 2)
            self.position_embedding = torch.nn.Parameter(torch.zeros(4, 2))
            self.kernel = torch.nn.Parameter(torch.zeros(4, 2))

    groups = parameter_groups(Network(), "net")
    assert [(group.decays, sorted(name for name, _ in group.named)) for group in groups] == [
        (True, ["net.kernel", "net.linear.weight"]),
        (
            False,
            ["net.linear.bias", "net.norm.bias", "net.norm.weight", "net.position_embedding", "net.table.weight"],
        ),
    ]
    assert [group.decays for group in parameter_groups(torch.nn.LayerNorm(3), "net")] == [False]


@pytest.mark.parametrize("name", NAMES)
def test_state_made_ahead_changes_no_update(name: str) -> None:
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.01)
    results = []
    for ahead in (False, True):
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make_optimizer(config, [(True, [parameter])])
        if ahead:
            materialize_state(optimizer)
            assert torch.equal(parameter.data, torch.tensor([1.0, -2.0]))
        for _ in range(3):
            parameter.grad = parameter.data.clone()
            optimizer.step()
        results.append(parameter.data.clone())
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "adamx"}, "optim.net.name: 'adamx'"),
        ({"schedule": "step"}, "optim.net.schedule: 'step'"),
        ({"lr": 0.0}, "optim.net.lr: 0.0"),
        ({"eps": 0.0}, "optim.net.eps: 0.0; must be a number above 0"),
        ({"clip_norm": -1.0}, "optim.net.clip_norm: -1.0"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        OptimConfig(**changes).validate("optim.net")
