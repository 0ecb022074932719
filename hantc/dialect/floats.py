"""What an engine computes floats in, where the file's own types leave it open: a mark in the model's metadata.

Weights and activations of a BF16 network are float32 in its file, so that any ONNX runtime reads it; engines that
round them to bfloat16 on the way into the matrix units (OpenVINO on CPUs with AMX or AVX512-BF16) do so by an option.
The mark says which option the file's figures were measured with.
"""

from __future__ import annotations

from typing import Literal

import onnx

KEY = "hantc.floats"

Floats = Literal["fp32", "bf16"]


def in_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that is marked to run in BF16 where the engine can."""
    made = onnx.ModelProto()
    made.CopyFrom(unmarked(model))
    made.metadata_props.append(onnx.StringStringEntryProto(key=KEY, value="bf16"))
    return made


def unmarked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or where it is marked a copy that is not: an earlier student as the teacher of the next."""
    if not any(p.key == KEY for p in model.metadata_props):
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.metadata_props[:]
    made.metadata_props.extend(p for p in model.metadata_props if p.key != KEY)
    return made


def floats_of(model: onnx.ModelProto) -> Floats:
    """What the model is marked to run in; fp32 if it is not marked."""
    return "bf16" if any(p.key == KEY and p.value == "bf16" for p in model.metadata_props) else "fp32"
