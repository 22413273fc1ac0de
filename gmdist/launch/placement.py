"""The workers' placement group, which stays behind when Ray Train's controller is killed; imports no torch.

Ray Train has an actor of its own against that. It takes a second of every start, and the dashboard another two.
"""

from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util.placement_group import remove_placement_group


class PlacementCallback(WorkerGroupCallback):
    """In the controller: tells the mailbox which placement group the workers are in."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Called by Ray Train."""
        state = worker_group.get_worker_group_state()
        ray.get(self._mailbox.keep_placement.remote(state.placement_group_handle.placement_group))


def remove_placement(mailbox: Any) -> None:
    """Remove what the controller has told of, if it is still there."""
    placement_group = ray.get(mailbox.placement.remote())
    if placement_group is not None:
        remove_placement_group(placement_group)
