"""The torch front door: a module is exported to ONNX once, and then takes the same road as a file."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from onnx import ModelProto
from torch import Tensor, nn

from hantc.core.errors import ModelError, UsageError


def export_module(module: nn.Module, example: Tensor) -> ModelProto:
    """Export a module in evaluation mode with a dynamic batch; ModelError with torch's reason otherwise,
    UsageError where onnxscript is not installed.

    `example`: (1, …), float. The module's mode is restored.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise UsageError(
            "torch modules need the package onnxscript, which torch.onnx.export is written with",
            where=type(module).__name__,
            hint="pip install onnxscript, or export the module to an .onnx file elsewhere",
        )
    training = module.training
    module.eval()
    pair = example.repeat(2, *(1,) * (example.dim() - 1))  # torch.export takes a batch of 1 for a constant
    try:
        program = torch.onnx.export(
            module,
            (pair,),
            input_names=["input"],
            output_names=["output"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
            optimize=False,  # its rewrites fold norms into convolutions, whose weights change by that
        )
        assert program is not None
        importlib.import_module("onnxscript.optimizer").fold_constants(program.model)
        exported: ModelProto = program.model_proto
        return exported
    except Exception as error:  # the exporter raises many unrelated types
        raise ModelError(f"torch.onnx.export cannot export it: {error}", where=type(module).__name__) from error
    finally:
        module.train(training)
