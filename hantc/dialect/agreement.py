"""Whether the imported graph computes what ONNX Runtime makes of its file."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime as ort
import torch
from onnx import ModelProto
from torch import Tensor, fx

from hantc.dialect.examples import example_inputs
from hantc.dialect.leaf import Array, array
from hantc.dialect.opaque import stopped

_LONGEST = 120.0  # seconds for two images
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def disagreement(model: ModelProto, network: fx.GraphModule) -> float:
    """The largest difference of a float output on random input, over its largest value; infinite for another shape;
    or where torch does not run it; nan where it cannot be told (ONNX Runtime does not run it on random input, no output
    is of floats, some operator draws numbers)."""
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    if any(n.op_type in _RANDOM or (n.op_type == "Dropout" and len(n.input) > 2) for n in nodes):
        return math.nan
    info = network.meta["info"]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        inputs = example_inputs(info, 2)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {spec.name: array(x) for spec, x in zip(info.inputs, inputs, strict=True)}
        with stopped(_LONGEST) as run_options:
            wanted = session.run(None, feeds, run_options)
    except Exception:  # it raises many types
        return math.nan
    try:
        with torch.no_grad():
            result = network(*inputs)
    except Exception:  # so does torch
        return math.inf
    found = [array(r) if isinstance(r, Tensor) else r for r in (result if isinstance(result, tuple) else (result,))]
    pairs = zip(wanted, found, strict=True)
    shares = [_share(w, f) for w, f in pairs if isinstance(w, np.ndarray) and w.dtype.kind == "f"]
    return max(shares, default=math.nan)


def _share(wanted: Array, found: object) -> float:
    if not isinstance(found, np.ndarray) or wanted.shape != found.shape:
        return math.inf
    one, two = wanted.astype(np.float64), found.astype(np.float64)
    both = np.isfinite(one)
    if not np.array_equal(both, np.isfinite(two)):
        return math.inf
    if not both.any():
        return 0.0
    return float(np.abs(one - two)[both].max() / max(np.abs(one[both]).max(), 1e-6))
