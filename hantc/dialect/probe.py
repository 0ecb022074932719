"""Load a model in ONNX Runtime and run it once, as a program of its own: `python probe.py MODEL BYTES`.

Either may crash, want all the memory there is (BYTES is what it gets) or never end. Imports nothing of hantc, to start
quickly."""

from __future__ import annotations

import sys
from typing import Any

NO_MEMORY = 77  # the exit status where BYTES were not enough
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


def _input(value: Any) -> Any:
    """An input like an image, in [0, 1), or of ones, at batch 1. ValueError where its shape or type leaves open what to
    feed."""
    import numpy as np

    shape = [1 if k == 0 and not isinstance(d, int) else d for k, d in enumerate(value.shape)]
    if value.type not in _TYPES or not all(isinstance(d, int) for d in shape):
        raise ValueError(value.name)
    kind = np.dtype(_TYPES[value.type])
    return (np.random.default_rng(0).random(shape) if kind.kind == "f" else np.ones(shape)).astype(kind)


def main(path: str, limit: int) -> int:
    """The exit status; ONNX Runtime's own refusals are for the backend to report."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, ValueError, OSError):  # Windows; a limit that is lower already
        pass
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session.run(None, {i.name: _input(i) for i in session.get_inputs()})
    except MemoryError:
        return NO_MEMORY
    except Exception as error:  # onnxruntime raises many types
        return NO_MEMORY if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
