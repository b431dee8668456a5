"""An accelerator for machines without one: tensors that compute on the CPU, say that they lie elsewhere, and count what
is sent between there and the host.

    with CountedDevice() as device:
        end = solve(field, None, device.put(noise), time_grid(7))
    device.to_host, device.to_device

Every transfer makes the host and a real accelerator wait for each other: reading a value (`float`, `bool`, `tolist`,
`cpu`), and what has to know values to make its result (`nonzero`); sending a tensor, and a number as `torch.tensor`.
Filling (`torch.full`) and numbers within arithmetic are no transfers. Mixing both sides in an operation is an error, as
on a real one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# The name under which torch lets a tensor lie elsewhere than its values do.
ELSEWHERE = torch.device("meta")
HOST = torch.device("cpu")
COPIES = ("_to_copy", "copy_", "to")
READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim")


class Elsewhere(Tensor):
    """A tensor whose values lie in `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=ELSEWHERE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} was called on a tensor of a CountedDevice outside of it.")


class _Numbers(TorchFunctionMode):
    """Sees numbers become tensors of the device, which torch makes without a dispatch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None:
            return function(*args, **kwargs)
        goal = torch.device(kwargs.pop("device"))
        return function(*args, **kwargs).to(goal)


class CountedDevice(TorchDispatchMode):
    """See the module's docstring.

    Args:
        float64: whether the device has double precision, which Apple's GPUs have not.

    Attributes:
        to_host, to_device: transfers so far.
    """

    def __init__(self, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.to_host = self.to_device = 0
        self.numbers = _Numbers()

    def __enter__(self) -> CountedDevice:
        self.numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.numbers.__exit__(*error)

    def put(self, value: Tensor) -> Tensor:
        """A tensor on the device, without counting; so are a network's parameters put with `put_module`."""
        return value if isinstance(value, Elsewhere) else Elsewhere(value.detach())

    def put_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """A network with its parameters and buffers on the device."""
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = torch.nn.Parameter(self.put(value), requires_grad=False)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else self.put(buffer)
        return module

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = dict(kwargs or {}), tree_flatten((args, kwargs))[0]
        leaves = [leaf for leaf in given if isinstance(leaf, Tensor)]
        there = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
        goal = next((leaf for leaf in given if isinstance(leaf, torch.device)), None)
        if not there and goal != ELSEWHERE:
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name == "to" and len(leaves) == 2:  # as another tensor; inference mode leaves such functions whole
            goal = leaves[1].device
        held_args, held_kwargs = tree_map(_held, (args, kwargs))
        result = function(*held_args, **held_kwargs)
        if name in READS or (name == "index" and any(leaf.dtype == torch.bool for leaf in leaves[1:])):
            self.to_host += 1
            return self._wrapped(result)
        if name in COPIES and leaves:
            return self._copied(name, leaves, goal, args, result)
        if name == "index":
            self.to_device += sum(not isinstance(leaf, Elsewhere) for leaf in leaves[1:])
        elif there and any(leaf.ndim for leaf in leaves if not isinstance(leaf, Elsewhere)):
            raise RuntimeError(f"{function} was given tensors of the host and of the device.")
        if function._schema.is_mutable:
            return args[0] if name.endswith("_") else kwargs.get("out", result)
        return self._wrapped(result)

    def _copied(self, name: str, leaves: list[Tensor], goal: torch.device | None, args: Any, result: Tensor) -> Tensor:
        """Count a copy, where it changes sides."""
        source = leaves[1] if name == "copy_" else leaves[0]
        from_device = isinstance(source, Elsewhere)
        if name == "copy_":
            to_device = isinstance(leaves[0], Elsewhere)
        else:
            to_device = from_device if goal is None else goal == ELSEWHERE
        self.to_host += from_device and not to_device
        self.to_device += to_device and not from_device
        if name == "copy_":
            return args[0]
        return self._wrapped(result) if to_device else result

    def _wrapped(self, result: Any) -> Any:
        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, Elsewhere):
                return value
            if value.dtype == torch.float64 and not self.float64:
                raise TypeError("This device has no float64.")
            return Elsewhere(value)

        return tree_map(wrap, result)


def _held(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.held
    return HOST if isinstance(value, torch.device) else value
