"""Where candidates and students learn: on the CPU, or on a GPU of this machine. The student's target is another matter.

What learns is moved as a whole, images batch by batch; results come back to the CPU. Least-squares fits and everything
that is measured stay there.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from hantc.dialect.opaque import Opaque

CPU = torch.device("cpu")
_M = TypeVar("_M", bound=nn.Module)


def place_of(device: torch.device, network: nn.Module) -> torch.device:
    """`device`, or the CPU for networks with parts that compute there only (ONNX operators as the file has them)."""
    return CPU if any(isinstance(m, Opaque) for m in network.modules()) else device


def room(device: torch.device, limit: int) -> int:
    """Bytes that learning may fill: `limit`, or all that a GPU has if that is less."""
    if device == CPU or not torch.cuda.is_available():
        return limit
    return min(limit, int(torch.cuda.mem_get_info(device)[1]))


def copied_to(device: torch.device, module: _M) -> _M:
    """A copy on a device; on the CPU the module itself."""
    return module if device == CPU else copy.deepcopy(module).to(device)
