"""Ray Train's trainer without what costs seconds of every start; imports no torch before Ray Train does.

Its controller runs in the command's own process: as an actor it would import Ray Train once more before any worker
could be asked for, and its death would leave the workers' placement group behind. Left out are the actors that it has
for data sets, for placement groups and for sharing an autoscaler with Ray Data: gmdist starts as many workers as there
is room for, and says so where there is none.
"""

import asyncio
import logging
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup


class Trainer(TorchTrainer):
    """Runs a function on workers once."""

    def _create_default_callbacks(self) -> list[Any]:
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, left_out)]

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # the command itself says what fails
        controller = _Controller(**options | {"scaling_policy": _Fixed(self.scaling_config)})
        asyncio.run(controller.run())
        return controller.get_result()


class _Fixed(FixedScalingPolicy):
    """So many workers; no autoscaler is told but by the placement group."""

    def after_controller_start(self, train_run_context: Any) -> None:
        return

    def _maybe_send_resource_request(self) -> None:
        return


class _WorkerGroup(WorkerGroup):
    """Workers that are not told of the controller's actor, as there is none."""

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: Any) -> None:
        starting = []
        for i, worker in enumerate(workers):
            own = {name: values[i] for name, values in train_context_args.items()}
            own |= {"distributed_context": worker.distributed_context, "synchronization_actor": sync_actor}
            own |= {"train_run_context": self._train_run_context, "storage_context": self._storage_context}
            own |= {"worker_callbacks": self._worker_callbacks_to_propagate, "controller_actor": None}
            starting.append(worker.actor.init_train_context.remote(**own))
        ray.get(starting)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup
