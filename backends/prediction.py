"""The roofline itself: FLOPs and bytes of every ONNX node, and the time that a machine's ceilings allow.

Williams, Waterman, Patterson, "Roofline" (CACM 2009): time = max(FLOPs / peak, bytes / bandwidth), here per
node, plus what starting a kernel costs. Fusions that every engine does are free: an activation or a norm that
alone follows a convolution, and Q/DQ pairs around nodes that run in INT8.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import onnx
from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass as checked

from hantc.backends.feeds import feed_shapes
from hantc.core.errors import ModelError


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Machine:
    """A machine's ceilings, as one core of a server CPU with AVX-512 VNNI reaches them in practice (fitted to
    ResNet-50 and MobileNetV2 under ONNX Runtime), not as its data sheet gives them."""

    name: str = "server core, AVX-512 VNNI"
    peak_fp32: PositiveFloat = 80e9  # FLOP/s per core (a multiply-add is two)
    peak_int8: PositiveFloat = 260e9
    peak_fp16: PositiveFloat | None = None  # None: FP16 gains in bytes alone
    bandwidth: PositiveFloat = 20e9  # bytes/s per core; mid-size activations stay in cache
    bandwidth_max: PositiveFloat = 120e9  # bytes/s, all cores
    op_overhead_s: NonNegativeFloat = 3e-6
    parallel_efficiency: float = Field(default=0.9, gt=0, le=1)  # of every core after the first


@dataclass(frozen=True)
class Prediction:
    """Whole-model figures at one batch. `peak_bytes`: largest sum of activations alive at once."""

    latency_ms: float
    flops: int
    bytes_moved: int
    peak_bytes: int


VERSION = 2  # of the arithmetic: what other versions predicted does not mix with it
_FREE = {"Constant", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Shape", "Dropout"}
_FUSED = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh", "BatchNormalization"}
_ELEMENT_FLOPS = {"Sigmoid": 8, "Tanh": 8, "Exp": 8, "Erf": 10, "Gelu": 12, "Softmax": 12, "HardSwish": 4}
_HEAVY = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_FEW = 64  # elements of a constant that shapes might follow from


def predict(model: onnx.ModelProto, machine: Machine, batch: int, threads: int) -> Prediction:
    """Predicted latency of one run. ModelError if the model is invalid or a shape cannot be inferred."""
    graph = _Graph(model, batch)
    cores = 1 + (threads - 1) * machine.parallel_efficiency
    bandwidth = min(machine.bandwidth * cores, machine.bandwidth_max)
    seconds, flops, moved = 0.0, 0, 0
    for node in graph.nodes:
        if graph.is_free(node):
            continue
        node_flops, node_bytes = graph.flops(node), graph.bytes_moved(node)
        peak = machine.peak_fp32
        if graph.in_int8(node):
            peak = machine.peak_int8
        elif graph.in_fp16(node):
            peak = machine.peak_fp16 or machine.peak_fp32
        seconds += max(node_flops / (peak * cores), node_bytes / bandwidth) + machine.op_overhead_s
        flops, moved = flops + node_flops, moved + node_bytes
    return Prediction(max(seconds, machine.op_overhead_s) * 1e3, flops, moved, graph.peak_bytes())


class _Graph:
    """The model with all shapes known, and who makes and reads each tensor."""

    def __init__(self, model: onnx.ModelProto, batch: int) -> None:
        inferred = _infer(model, batch)
        self.nodes = list(inferred.graph.node)
        self.outputs = {o.name for o in inferred.graph.output}
        self.constants = {i.name for i in model.graph.initializer}
        self.size: dict[str, int] = {}  # elements
        self.shape: dict[str, tuple[int, ...]] = {}
        self.width: dict[str, int] = {}  # bytes per element
        for init in model.graph.initializer:
            self._note(init.name, tuple(init.dims), init.data_type)
        for v in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
            dims = v.type.tensor_type.shape.dim
            if v.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                self._note(v.name, tuple(d.dim_value for d in dims), v.type.tensor_type.elem_type)
        self.maker = {o: n for n in self.nodes for o in n.output if o}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for n in self.nodes:
            for i in n.input:
                self.readers[i].append(n)
            missing = [o for o in n.output if o and o not in self.size and n.op_type not in _FREE]
            if missing:
                raise ModelError(f"the shape of {missing[0]!r} (node {n.name!r}, {n.op_type}) cannot be inferred")

    def _note(self, name: str, shape: tuple[int, ...], elem_type: int) -> None:
        self.shape[name], self.size[name] = shape, math.prod(shape)
        self.width[name] = onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize

    def _op(self, tensor: str) -> str:
        return self.maker[tensor].op_type if tensor in self.maker else ""

    def in_int8(self, node: onnx.NodeProto) -> bool:
        """All its activations come through DequantizeLinear, and leave through QuantizeLinear (or it is heavy,
        for which engines have kernels with a float result)."""
        return self._reads_int8(node) and (node.op_type in _HEAVY or self._gives_int8(node))

    def _reads_int8(self, node: onnx.NodeProto) -> bool:
        """Through DequantizeLinear, or straight from a product that is computed with it."""
        sources = [i for i in node.input if i and i not in self.constants and self._op(i) != "Constant"]
        if node.op_type in _HEAVY and node.input[1] in self.constants and self.width[node.input[1]] > 1:
            return False  # a float weight behind an INT8 neighbour
        return bool(sources) and all(
            self._op(i) == "DequantizeLinear" or (self._in_kernel(node, i) and self._reads_int8(self.maker[i]))
            for i in sources
        )

    def _gives_int8(self, node: onnx.NodeProto) -> bool:
        """To QuantizeLinear, or to an activation in its kernel that does."""
        readers = self.readers[node.output[0]]
        if len(readers) == 1 and self._in_kernel(readers[0], node.output[0]):
            return self._gives_int8(readers[0])
        return bool(readers) and all(r.op_type == "QuantizeLinear" for r in readers)

    def _in_kernel(self, node: onnx.NodeProto, source: str) -> bool:
        """Whether engines compute `node` in the kernel of what makes `source`: a sum or an activation behind a product
        that nothing else reads, or an activation behind such a sum."""
        if len(self.readers[source]) != 1 or source in self.outputs:
            return False
        makers = {*_HEAVY, "Add"} if node.op_type in _FUSED else _HEAVY if node.op_type == "Add" else set()
        return self._op(source) in makers

    def in_fp16(self, node: onnx.NodeProto) -> bool:
        """A product of 16-bit numbers."""
        return node.op_type in _HEAVY and all(self.width.get(i, 4) == 2 for i in node.input[:2])

    def is_free(self, node: onnx.NodeProto) -> bool:
        """Costs nothing: a view, a constant's conversion, or fused into a neighbour."""
        source = node.input[0] if node.input else ""
        if node.op_type in _FREE or source in self.constants:
            return node.op_type in _FREE or node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if node.op_type == "QuantizeLinear":
            return source in self.maker and self.in_int8(self.maker[source])
        readers = self.readers[node.output[0]] if node.output else []
        if node.op_type == "DequantizeLinear":
            return bool(readers) and all(self.in_int8(r) for r in readers)
        alone = len(self.readers[source]) == 1
        return node.op_type in _FUSED and alone and self._op(source) in {"Conv", "BatchNormalization"}

    def flops(self, node: onnx.NodeProto) -> int:
        """Floating-point operations, a multiply-add being two."""
        out = self.size[node.output[0]]
        if node.op_type == "Conv":  # 2 · outputs · (C_in / groups) · kernel
            return 2 * out * math.prod(self.shape[node.input[1]][1:])
        if node.op_type == "ConvTranspose":  # every input element meets (C_out / groups) · kernel weights
            return 2 * self.size[node.input[0]] * math.prod(self.shape[node.input[1]][1:])
        if node.op_type in ("Gemm", "MatMul"):
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            return 2 * out * self.shape[node.input[0]][-2 if transposed else -1]
        read = max([out, *(self.size.get(i, 0) for i in node.input)])
        return read * _ELEMENT_FLOPS.get(node.op_type, 1)

    def bytes_moved(self, node: onnx.NodeProto) -> int:
        """Every input read once and every output written once: the memory access cost."""
        read = sum(self.size.get(i, 0) * self._stored_width(i) for i in node.input if i)
        return read + sum(self.size[o] * self._stored_width(o) for o in node.output if o)

    def _stored_width(self, tensor: str) -> int:
        """Bytes per element as an engine keeps it: 1 between the Q and the DQ of INT8 nodes."""
        readers = self.readers[tensor]
        maker = self.maker.get(tensor)
        if len(readers) == 1 and self._in_kernel(readers[0], tensor) and self.in_int8(readers[0]):
            return 1
        if maker is not None and maker.op_type == "DequantizeLinear" and self.is_free(maker):
            return self.width.get(maker.input[0], 1)
        if readers and all(r.op_type == "QuantizeLinear" and self.is_free(r) for r in readers):
            return 1
        return self.width.get(tensor, 4)

    def peak_bytes(self) -> int:
        """Largest total of activations alive at once, in the file's node order."""
        last = {t: k for k, n in enumerate(self.nodes) for t in n.input}
        alive: dict[str, int] = {}
        peak = 0
        for k, node in enumerate(self.nodes):
            for t in [*node.input, *node.output]:
                if t and t not in self.constants:
                    alive[t] = self.size.get(t, 0) * self._stored_width(t)
            peak = max(peak, sum(alive.values()))
            alive = {t: b for t, b in alive.items() if last.get(t, -1) > k or t in self.outputs}
        return peak


def _infer(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    shapes = feed_shapes(model, batch)
    fixed = _weightless(model)
    for v in fixed.graph.input:
        for dim, size in zip(v.type.tensor_type.shape.dim, shapes.get(v.name, ()), strict=False):
            dim.dim_value = size
    try:
        onnx.checker.check_model(fixed)
        del fixed.graph.value_info[:]  # may hold another batch
        for v in fixed.graph.output:
            if v.type.HasField("tensor_type"):
                v.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True)
        return inferred if _complete(inferred) else _infer_through_shape_ops(inferred)
    except Exception as e:  # checker and inference raise various classes
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ModelError(f"the model is not valid ONNX, or its shapes cannot be followed: {reason}") from e


def _weightless(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose weights are inputs: the checker and shape inference copy all that they are given, and that was
    most of a prediction's time. What shapes may follow from (integers, a few numbers) stays."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    for field in ("node", "input", "output", "sparse_initializer"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    declared = {v.name for v in model.graph.input}
    for weight in model.graph.initializer:
        if math.prod(weight.dims) <= _FEW or weight.data_type == onnx.TensorProto.INT64:
            light.graph.initializer.append(weight)
        elif weight.name not in declared:
            light.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    return light


def _complete(model: onnx.ModelProto) -> bool:
    known = {
        v.name
        for v in [*model.graph.value_info, *model.graph.output]
        if v.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in v.type.tensor_type.shape.dim)
    }
    return all(o in known for n in model.graph.node for o in n.output if o)


def _infer_through_shape_ops(model: onnx.ModelProto) -> onnx.ModelProto:
    """Follows values through Shape, Gather, Concat… chains, which ONNX's own inference does only in part."""
    try:
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
    except ImportError:  # needs sympy
        return model
    found: onnx.ModelProto = SymbolicShapeInference.infer_shapes(model, auto_merge=True)
    return found
