"""The workers' placement group, which stays behind when Ray Train's controller is killed; imports no torch.

Ray Train has an actor of its own against that. It takes a second of every start, the dashboard that it needs another
two, and it does not know of a group whose workers are still starting.
"""

from typing import Any

import ray
from ray.core.generated import gcs_pb2
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group


class ControllerNote(ControllerCallback):
    """In the controller: tells the mailbox which actor it is, before it asks for any room."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called by Ray Train."""
        ray.get(self._mailbox.keep_controller.remote(ray.get_runtime_context().get_actor_id()))


def remove_placements(mailbox: Any) -> None:
    """Remove the placement groups that the controller has made and not removed."""
    controller = ray.get(mailbox.controller.remote())
    if controller is None:
        return
    for entry in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        is_there = group.state != gcs_pb2.PlacementGroupTableData.REMOVED
        if is_there and group.creator_actor_id.hex() == controller:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
