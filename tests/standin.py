"""A GPU's stand-in: tensors that say they are on `cuda`, are computed on the CPU, and do not mix with the host's.

As on a GPU, an operation on tensors of both fails, and what makes the host wait for the device is noted; as with NCCL,
the group of all workers takes no tensor of the host. What differs: autocast does nothing, all is done at once whatever
its stream, and no kernel of a GPU is run.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
# What a processor without CUDA has in its place: tensors of it take any operation, and autograd knows it.
_META = torch.device("meta")
_COPIES = (aten.copy_.default, aten._to_copy.default)
# What gives numbers to the host, or tensors whose shape only the device knows.
_WAITS = (
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default),
    *(aten._unique2.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default),
)
_INDEXES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class _OnDevice(Tensor):
    """A tensor of the device: `values` are its numbers, on the CPU."""

    values: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def record_stream(self, stream: object) -> None:
        """Nothing: there is one."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "_OnDevice":
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=_META)
        tensor = torch.Tensor._make_subclass(cls, shape, dispatch_device=True, device_for_backend_keys=DEVICE)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{operation} of a stand-in's tensor, without the stand-in")


class _Functions(TorchFunctionMode):
    """Takes `cuda` where torch was built without it."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _known(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if function is Tensor.to:
            args = tuple(_known(value) for value in args)
        if function is Tensor.tolist and isinstance(args[0], _OnDevice):
            self.waits.append("tolist")
            return args[0].values.tolist()
        if function is Tensor.pin_memory:
            args[0].is_page_locked = True
            return args[0]
        if function == Tensor.data.__set__ and isinstance(args[0], _OnDevice):
            args[0].values = args[1].values
        if function is Tensor.new_tensor and isinstance(args[0], _OnDevice):
            function, args, kwargs = torch.tensor, args[1:], {"device": _META} | kwargs
        if function is torch.tensor and kwargs.get("device") == _META:
            return torch.tensor(*args, **(kwargs | {"device": None})).to(_META)
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Computes on the CPU what is asked of the device."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation is torch.ops.prim.device.default:
            return _META
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
        on_host = [tensor for tensor in tensors if not isinstance(tensor, _OnDevice)]
        if here and operation is aten._fused_sdp_choice.default:
            return 0  # what is made of plain operations
        indices = [] if operation not in _INDEXES else [index for index in args[1] if index is not None]
        if here and operation not in _COPIES and any(tensor.ndim for tensor in on_host if not _is_in(tensor, indices)):
            shapes = [(tuple(tensor.shape), tensor.device.type) for tensor in tensors]
            raise RuntimeError(f"{operation} of tensors on the device and on the host: {shapes}")
        if on_host and operation.namespace == "c10d" and any(map(_is_default, tree_leaves(args))):
            raise RuntimeError(f"{operation} of tensors on the host, by all workers' own group")
        target = kwargs.get("device")
        if operation is aten.copy_.default:
            is_here = isinstance(args[0], _OnDevice)
        else:
            is_here = bool(here) if target is None else target in (_META, DEVICE)
        shaped_by = any(_is_in(index, on_host) or index.dtype == torch.bool for index in indices)
        if here and (operation in _WAITS or shaped_by):
            self.waits.append(str(operation))
        elif operation in _COPIES and bool(on_host if is_here else here):
            is_free = not is_here or getattr(on_host[0], "is_page_locked", False)
            if not (kwargs.get("non_blocking") and is_free):
                self.waits.append(str(operation))
        if target is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        args, kwargs = tree_map_only(_OnDevice, lambda tensor: tensor.values, (args, kwargs))
        found = operation(*args, **kwargs)
        if not is_here:
            return found
        known = {id(tensor.values): tensor for tensor in here}  # an operation in place gives what it was given
        return tree_map_only(Tensor, lambda one: known[id(one)] if id(one) in known else _OnDevice(one), found)


def _is_in(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is one for one in tensors)


def _known(value: object) -> object:
    """`meta` for what names a CUDA device."""
    is_device = isinstance(value, str | torch.device)
    return _META if is_device and str(value).partition(":")[0] == "cuda" else value


def _unpinned(make: Any) -> Any:
    """The function that makes tensors, without memory that a GPU reads."""
    return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)


def _is_default(argument: object) -> bool:
    """Whether an operation's argument is the group of workers that every job has."""
    is_group = isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
    return is_group and dist.ProcessGroup.unbox(argument).group_name == dist.group.WORLD.group_name


def _of_objects(group: dist.ProcessGroup | None) -> str:
    """What holds objects that workers exchange: the device with NCCL, the host in groups of gloo."""
    return "cuda" if group in (None, dist.group.WORLD) else "cpu"


@contextmanager
def standing_in() -> Iterator[list[str]]:
    """Let `cuda` be the stand-in; gives the operations, as they come, for which the host waits."""
    waits: list[str] = []
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot become one of another class
    try:
        with ExitStack() as stack:
            for name in ("_lazy_init", "Stream", "Event", "current_stream", "stream", "synchronize"):
                stack.enter_context(mock.patch(f"torch.cuda.{name}"))
            for name, said in (("max_memory_allocated", 0), ("get_device_name", ""), ("get_device_capability", (8, 0))):
                stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=said))
            stack.enter_context(mock.patch("torch.zeros", _unpinned(torch.zeros)))  # also in threads
            stack.enter_context(mock.patch("torch.distributed.distributed_c10d._get_object_coll_device", _of_objects))
            stack.enter_context(_Operations(waits))
            stack.enter_context(_Functions(waits))
            yield waits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
