"""A GPU that is not there: tensors stay in this machine's memory but know where they would be, and what torch refuses
on a real one (mixing devices, arrays of what is not on the CPU) is refused here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_MARK = "_emulated_gpu"
_MOVES = {"torch.Tensor.to", "torch.Tensor.cpu", "torch.Tensor.cuda"}
# what takes tensors of both, on a real one too
_ACROSS = {
    *(f"torch.Tensor.{n}" for n in ("copy_", "__getitem__", "__setitem__", "__deepcopy__")),
    "_has_compatible_shallow_copy_type",
}
# what wants even single numbers in the same place
_STRICT = {
    "torch.fake_quantize_per_tensor_affine",
    "torch.fake_quantize_per_channel_affine",
    "torch.cat",
    "torch.stack",
}


def on_gpu(t: Tensor) -> bool:
    """Whether a tensor would be on the GPU."""
    return bool(t.__dict__.get(_MARK, False))


class EmulatedGpu(TorchFunctionMode):
    """Inside, `.to("cuda")` works. `ran`: how many operations had operands on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = 0

    def __enter__(self) -> EmulatedGpu:
        make = torch.Tensor._make_subclass

        def made(cls: Any, data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Tensor:
            return _marked(
                make(cls, data, requires_grad, **kwargs), on_gpu(data)
            )  # parameters are made of tensors unseen

        torch.Tensor._make_subclass = staticmethod(made)  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        del torch.Tensor._make_subclass

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        if name == "torch.Tensor.device.__get__":
            return GPU if on_gpu(args[0]) else torch.device("cpu")
        if name in _MOVES:
            return self._moved(name, func, args, kwargs)
        if name in ("torch.Tensor.data.__set__", "torch.Tensor.grad.__set__"):
            func(*args, **kwargs)
            if isinstance(args[1], Tensor) and "data" in name:
                setattr(args[0], _MARK, on_gpu(args[1]))
            return None
        if name in ("torch.Tensor.numpy", "torch.Tensor.__array__") and on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = None if torch.device(wanted).type == "cuda" else wanted
        here = self._together(name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        self.ran += here
        made = func(*args, **kwargs)
        there = torch.device(wanted).type == "cuda" if wanted is not None else here
        return tree_map(lambda t: _marked(t, there) if isinstance(t, Tensor) else t, made)

    @staticmethod
    def _together(name: str, tensors: list[Tensor]) -> bool:
        """Whether an operation runs on the GPU; RuntimeError where its operands are apart."""
        if name in _ACROSS:
            return bool(tensors) and on_gpu(tensors[0])
        # single numbers of the CPU go with anything, those of the GPU do not
        places = {on_gpu(t) for t in tensors if t.dim() or on_gpu(t) or name in _STRICT}
        if len(places) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu, in {name}")
        return True in places

    @staticmethod
    def _moved(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`.to`, whose device may be an argument of either kind, or a tensor's."""
        there = on_gpu(args[0])
        if any(isinstance(a, (str, torch.device)) and torch.device(a).type == "meta" for a in args[1:]):
            return func(*args, **kwargs)
        places = [*args[1:], kwargs.pop("device", None)]
        rest = []
        for place in places:
            if isinstance(place, (str, torch.device)):
                there = torch.device(place).type == "cuda"
            elif place is not None and not isinstance(place, bool):  # whether it may block, or copies
                rest.append(place)
        there = {"torch.Tensor.cpu": False, "torch.Tensor.cuda": True}.get(name, there)
        moved = there != on_gpu(args[0])
        made = func(args[0], *rest, **kwargs) if rest or kwargs else args[0]
        if made is args[0] and moved:
            made = made.clone() if made.requires_grad else made.detach().clone()
        return _marked(made, there) if moved or made is not args[0] else made


def _marked(t: Tensor, there: bool) -> Tensor:
    if there or _MARK in t.__dict__:
        setattr(t, _MARK, there)
    return t


def _name(func: Callable[..., Any]) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", ""))
