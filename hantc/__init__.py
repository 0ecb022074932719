"""hantc: a compiler that makes trained vision networks fast on the machine they will run on.

Importing this package loads nothing heavy; torch and onnxruntime are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hantc.run import Run as Run

__all__ = ["__version__", "compile", "load_run"]


def compile(model: Any, **options: Any) -> Run:  # noqa: A001 - the verb of the field (torch.compile)
    """Compile `model` (path of an ONNX file, or a torch module) for a target; see `hantc.run.compile`."""
    from hantc import run

    return run.compile(model, **options)


def load_run(folder: Any) -> Run:
    """Open a finished run folder."""
    from hantc import run

    return run.load_run(folder)
