"""Building small ONNX models and checking that they survive ONNX → fx → ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx

from hantc.dialect.emitter import emit, opaque_leaves
from hantc.dialect.importer import import_model

Array = np.ndarray[Any, Any]
Dims = Sequence[int | str | None]


def run_ort(model: ModelProto, feeds: Mapping[str, Array]) -> list[Any]:
    """What ONNX Runtime makes of a model."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: list[Any] = session.run(None, dict(feeds))
    return result


def error(wanted: Array, got: Array) -> float:
    """Largest absolute difference over the largest value; infinite for other shapes or dtypes."""
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    if wanted.size == 0:
        return 0.0
    difference = np.abs(wanted.astype(np.float64) - got.astype(np.float64)).max()
    return float(difference / max(np.abs(wanted.astype(np.float64)).max(), 1e-6))


@dataclass(frozen=True)
class Trip:
    """A finished round trip."""

    module: fx.GraphModule
    emitted: ModelProto

    @property
    def opaque(self) -> list[str]:
        """Op types of the opaque leaves."""
        return [leaf.proto.op_type for _, leaf in opaque_leaves(self.module)]

    @property
    def ops(self) -> list[str]:
        """Op types of the emitted nodes."""
        return [n.op_type for n in self.emitted.graph.node]


class Models:
    """What the tests build models with, as the fixture `models`."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def weight(self, *shape: int, dtype: Any = np.float32) -> Array:
        """Random values of a size that keeps deep products tame."""
        return (self.rng.standard_normal(shape) * 0.5).astype(dtype)

    def make(
        self,
        nodes: Sequence[NodeProto],
        inputs: Mapping[str, Dims],
        outputs: Mapping[str, Dims | None] | Sequence[str],
        constants: Mapping[str, Any] | None = None,
        *,
        opset: int = 17,
        dtype: int = TensorProto.FLOAT,
        out_dtype: int | None = None,
        domains: Mapping[str, int] | None = None,
        functions: Sequence[onnx.FunctionProto] = (),
    ) -> ModelProto:
        """A model; outputs named without a shape get none declared."""
        shapes = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs)
        graph = helper.make_graph(
            list(nodes),
            "small",
            [helper.make_tensor_value_info(n, dtype, d) for n, d in inputs.items()],
            [helper.make_tensor_value_info(n, out_dtype or dtype, d) for n, d in shapes.items()],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
        )
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
        ir = 4 if opset < 11 else 8 if opset < 19 else 10
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir, functions=list(functions))
        model.producer_name = "tests"
        model.metadata_props.add(key="author", value="someone")
        return model

    def feeds(self, model: ModelProto, batch: int = 2, **given: Array) -> dict[str, Array]:
        """Random inputs; open dims are `batch` (first) or 5."""
        weights = {i.name for i in model.graph.initializer}
        made: dict[str, Array] = {}
        for value in model.graph.input:
            if value.name in weights:
                continue
            dims = value.type.tensor_type.shape.dim
            shape = [d.dim_value if d.HasField("dim_value") else (5 if i else batch) for i, d in enumerate(dims)]
            kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            made[value.name] = (self.rng.standard_normal(shape) * 2).astype(kind)
        return made | given

    def forward(self, module: fx.GraphModule, feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs of the fx graph."""
        xs = [torch.from_numpy(feeds[s.name]) for s in module.meta["info"].inputs]
        with torch.no_grad():
            result = module(*xs)
        return [r.numpy() for r in ([result] if isinstance(result, Tensor) else result)]

    def trip(self, model: ModelProto, tolerance: float = 1e-4, batch: int = 2, **given: Array) -> Trip:
        """Import, run, emit, run; assert that all three agree and that nothing around the nodes is lost."""
        module = import_model(model)
        emitted = emit(module).model
        feeds = self.feeds(model, batch, **given)
        wanted = run_ort(model, feeds)
        assert len(wanted) == len(model.graph.output)
        for kind, results in (("emitted", run_ort(emitted, feeds)), ("fx", self.forward(module, feeds))):
            for spec, w, g in zip(model.graph.output, wanted, results, strict=True):
                assert error(w, g) <= tolerance, f"{kind}: {spec.name} {w.shape} {w.dtype} {g.shape} {g.dtype}"
        self.same_frame(model, emitted)
        return Trip(module, emitted)

    def same_frame(self, model: ModelProto, emitted: ModelProto) -> None:
        """Names, dtypes, shapes, metadata and opsets agree."""
        if all(i.domain in ("", "ai.onnx") for i in emitted.opset_import):
            onnx.checker.check_model(emitted)
        weights = {i.name for i in model.graph.initializer}
        inputs = [i for i in model.graph.input if i.name not in weights]
        for old, new in ((inputs, emitted.graph.input), (model.graph.output, emitted.graph.output)):
            assert [v.name for v in new] == [v.name for v in old]
            for a, b in zip(old, new, strict=True):
                assert a.type.tensor_type.elem_type == b.type.tensor_type.elem_type
                if a.type.tensor_type.HasField("shape"):
                    assert a.type.tensor_type.shape.dim == b.type.tensor_type.shape.dim
        assert [(p.key, p.value) for p in emitted.metadata_props] == [(p.key, p.value) for p in model.metadata_props]
        versions = {o.domain: o.version for o in emitted.opset_import}
        assert all(versions[o.domain] == o.version for o in model.opset_import)


@pytest.fixture
def models() -> Models:
    """A fresh model builder with a fixed seed."""
    return Models()
