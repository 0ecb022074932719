"""Compiling in a process of its own what OpenVINO is known to crash on.

OpenVINO 2026.4 ends the process (SIGSEGV) while it lowers some quantised networks that concatenate: there is no
exception to catch. A file of that kind is compiled elsewhere first.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

_TIMEOUT_S = 120.0
_PROGRAM = """
import json, sys
import openvino as ov
shapes, options = json.loads(sys.argv[2]), json.loads(sys.argv[3])
core = ov.Core()
model = core.read_model(sys.argv[1])
model.reshape({name: list(shape) for name, shape in shapes})
core.compile_model(model, "CPU", options)
"""


def doubtful(model: onnx.ModelProto) -> bool:
    """Whether `model` is of the kind: INT8 values that are concatenated."""
    ops = {n.op_type for n in model.graph.node}
    return {"Concat", "DequantizeLinear"} <= ops


def flaw(data: bytes, shapes: Sequence[tuple[str, tuple[int, ...]]], options: Mapping[str, Any]) -> str:
    """What is wrong if compiling `data` ends the process, or does not come to an end; else "". Errors that it reports
    are none."""
    with tempfile.TemporaryDirectory(prefix="hantc-openvino-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        argv = [sys.executable, "-P", "-c", _PROGRAM, str(path), json.dumps(list(shapes)), json.dumps(dict(options))]
        try:
            done = subprocess.run(argv, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"it is still compiling after {_TIMEOUT_S:g} s"
    return f"it crashes on it ({signal.Signals(-done.returncode).name})" if done.returncode < 0 else ""
