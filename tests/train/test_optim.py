"""Learning rates and optimizers by name."""

import pytest
import torch

from gmdist.errors import ConfigError
from gmdist.train.optim import OptimConfig, learning_rate, make_optimizer, materialize_state


def test_warm_up_then_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr=0.2)
    assert [learning_rate(config, step, 14) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 4, 14) == 1.0
    assert learning_rate(config, 9, 14) == pytest.approx(0.6)
    assert learning_rate(config, 14, 14) == pytest.approx(0.2)
    linear = OptimConfig(lr=1.0, schedule="linear")
    assert learning_rate(linear, 25, 100) == pytest.approx(0.75)
    assert learning_rate(OptimConfig(lr=0.3), 10**6, 100) == 0.3


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_state_made_ahead_changes_no_update(name: str) -> None:
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.01)
    results = []
    for ahead in (False, True):
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make_optimizer(config, [parameter])
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
        ({"clip_norm": -1.0}, "optim.net.clip_norm: -1.0"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        OptimConfig(**changes).validate("optim.net")
