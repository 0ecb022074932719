"""Random networks through the exact rewrites: what they compute must stay the same.

    python tools/fuzz/rewrites.py --count 5000 --seed 1       # minutes
    python tools/fuzz/rewrites.py --count 60 --seed 1         # what the tests run

Each network is a handful of convolutions, norms, constant arithmetic, poolings, joins, sums, cuts, padding and
products, with shared weights, values that several read, and several outputs. It is imported, normalised and emitted;
the graph (in torch) and the emitted file (in ONNX Runtime) are compared with the drawn file in ONNX Runtime, at
batches that are not the example's. A difference, an error or a graph that does not settle is a finding.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hantc.dialect.emitter import emit  # noqa: E402
from hantc.dialect.importer import import_model  # noqa: E402
from hantc.dialect.rewrites.normalize import normalize  # noqa: E402

_TOLERANCE = 3e-4  # of the largest value, in FP32
_LEAST = 1e-3  # of a largest value: what is smaller is what cancelling leaves
_BATCHES = (1, 3)
_CHANNELS = 16  # of a value, at most

Shape = tuple[int, ...]  # without the batch


class Draft:
    """A network in the making. Every `add_…` appends nodes behind the value called `x`, or does nothing where they do
    not fit."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Any] = {}
        sides = [self.pick.randint(4, 9) for _ in range(2)]
        self.shapes: dict[str, Shape] = {"x": (self.pick.choice([1, 2, 4, 6]), *sides)}
        self._kept: dict[Any, str] = {}

    def weight(self, *shape: int) -> str:
        """A constant; now and then one that is there already."""
        if shape in self._kept and self.pick.random() < 0.25:
            return self._kept[shape]
        return self._kept.setdefault(shape, self.constant(0.5 * self.numbers.standard_normal(shape)))

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(value, kind)
        return name

    def add(self, op: str, inputs: Sequence[str], shape: Shape, **attrs: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attrs))
        self.shapes[name] = tuple(shape)
        return name

    def value(self) -> str:
        """The last value, or one of those before it."""
        names = list(self.shapes)
        return names[-1] if self.pick.random() < 0.75 else self.pick.choice(names[-5:])

    def add_conv(self, x: str) -> None:
        c, *sides = self.shapes[x]
        if len(sides) != 2:
            return
        kernel = [self.pick.choice([1, 1, 2, 3])] * 2
        groups = self.pick.choice([1, 1, c])
        stride = [self.pick.choice([1, 1, 2]) for _ in sides]
        same = self.pick.random() < 0.5
        pads = [(k - 1) // 2 for k in kernel] + [k // 2 for k in kernel] if same else self._pads(kernel)
        out = c if self.pick.random() < 0.4 else groups * self.pick.choice([1, 2, 3])
        made = [(s + pads[i] + pads[2 + i] - kernel[i]) // stride[i] + 1 for i, s in enumerate(sides)]
        if min(made) < 1 or out > _CHANNELS or out % groups:
            return
        inputs = [x, self.weight(out, c // groups, *kernel)] + [self.weight(out)] * self.pick.randint(0, 1)
        how = {"group": groups, "strides": stride, "pads": pads, "kernel_shape": kernel}
        y = self.add("Conv", inputs, (out, *made), **how)
        if self.shapes[y] == self.shapes[x] and self.pick.random() < 0.3:
            self.add("Add", self.pick.sample([x, y], 2), self.shapes[x])

    def _pads(self, kernel: Sequence[int]) -> list[int]:
        return [self.pick.randint(0, k - 1) for k in (*kernel, *kernel)]

    def add_norm(self, x: str) -> None:
        c = self.shapes[x][0]
        scale = self.numbers.standard_normal(c)
        parts = [abs(scale) + 0.1 if self.pick.random() < 0.5 else scale, *self.numbers.standard_normal((2, c))]
        if self.pick.random() < 0.3:
            parts[1:] = [np.zeros(c)] * 2
        names = [self.constant(p) for p in (*parts, abs(self.numbers.standard_normal(c)) + 0.2)]
        self.add("BatchNormalization", [x, *names], self.shapes[x])

    def add_arithmetic(self, x: str) -> None:
        shape = self.shapes[x]
        forms: Sequence[Shape] = [
            (),
            (shape[0], *[1] * (len(shape) - 1)),
            (1, shape[0], *[1] * (len(shape) - 1)),
            shape[-1:],
        ]
        value = self.numbers.standard_normal(self.pick.choice(forms)) + 0.05
        op, k = self.pick.choice(["Mul", "Add", "Sub", "Div"]), self.constant(value)
        self.add(op, [x, k] if op == "Div" else self.pick.sample([x, k], 2), shape)

    def add_pool(self, x: str) -> None:
        c, *sides = self.shapes[x]
        if len(sides) != 2:
            return
        if self.pick.random() < 0.2:
            self.add(self.pick.choice(["GlobalAveragePool", "GlobalMaxPool"]), [x], (c, 1, 1))
            return
        kernel, stride = ([self.pick.choice(k) for _ in sides] for k in ([1, 2, 3], [1, 2]))
        pads = self._pads(kernel) if self.pick.random() < 0.4 else [0] * 4
        made = [(s + pads[i] + pads[2 + i] - kernel[i]) // stride[i] + 1 for i, s in enumerate(sides)]
        if min(made) < 1:
            return
        op = self.pick.choice(["MaxPool", "AveragePool"])
        counted = {"count_include_pad": self.pick.randint(0, 1)} if op == "AveragePool" else {}
        self.add(op, [x], (c, *made), kernel_shape=kernel, strides=stride, pads=pads, **counted)

    def add_join(self, x: str) -> None:
        fitting = [n for n, s in self.shapes.items() if s[1:] == self.shapes[x][1:]]
        parts = [x, *(self.pick.choice(fitting) for _ in range(self.pick.randint(1, 2)))]
        total = sum(self.shapes[p][0] for p in parts)
        if total <= _CHANNELS:
            self.pick.shuffle(parts)
            self.add("Concat", parts, (total, *self.shapes[x][1:]), axis=self.pick.choice([1, -len(self.shapes[x])]))

    def add_sum(self, x: str) -> None:
        other = self.pick.choice([n for n, s in self.shapes.items() if s == self.shapes[x]])
        self.add("Add", self.pick.sample([x, other], 2), self.shapes[x])

    def add_cut(self, x: str) -> None:
        c, *sides = self.shapes[x]
        if len(sides) != 2:
            return
        start, step = self.pick.choice([0, 0, 1]), self.pick.choice([1, 2, 3])
        if start >= min(sides):
            return
        lists = ([start, start], [2**31 - 1] * 2, [2, 3], [step, step])
        inputs = [x, *(self.constant(v, np.int64) for v in lists)]
        self.add("Slice", inputs, (c, *(-((start - s) // step) for s in sides)))

    def add_pad(self, x: str) -> None:
        c, *sides = self.shapes[x]
        if len(sides) != 2:
            return
        pads = [self.pick.randint(0, 1) for _ in range(4)]
        made = [s + pads[i] + pads[2 + i] for i, s in enumerate(sides)]
        value = self.pick.choice([0.0, 0.0, float(np.finfo(np.float32).min)]) if min(made) > 1 else 0.0
        inputs = [x, self.constant([0, 0, *pads[:2], 0, 0, *pads[2:]], np.int64), self.constant(value)]
        y = self.add("Pad", inputs, (c, *made))
        if value:
            self.add("MaxPool", [y], (c, *(s - 1 for s in made)), kernel_shape=[2, 2])
            del self.shapes[y]  # nothing else takes such numbers

    def add_mean(self, x: str) -> None:
        shape = self.shapes[x]
        if len(shape) != 3:
            return
        count = self.constant(shape[1] * shape[2] if self.pick.random() < 0.7 else 5.0)
        total = self.add("ReduceSum", [x, self.constant([2, 3], np.int64)], (shape[0], 1, 1))
        self.add("Div", [total, count], (shape[0], 1, 1))

    def add_product(self, x: str) -> None:
        shape = self.shapes[x]
        if len(shape) == 3:
            x = self.add("Flatten", [x], (int(np.prod(shape)),))
        width, out = self.shapes[x][0], self.pick.choice([2, 5, 8])
        if self.pick.random() < 0.5:
            self.add("Gemm", [x, self.weight(out, width), self.weight(out)], (out,), transB=1)
        else:
            self.add("MatMul", [x, self.weight(width, out)], (out,))

    def add_activation(self, x: str) -> None:
        self.add(self.pick.choice(["Relu", "Sigmoid", "Tanh"]), [x], self.shapes[x])

    def model(self, length: int) -> ModelProto:
        """So many parts, and as outputs all that nothing reads, and now and then a value that something does."""
        ways: dict[Callable[[str], None], int] = {
            self.add_conv: 6,
            self.add_norm: 5,
            self.add_pool: 5,
            self.add_arithmetic: 3,
            self.add_join: 3,
            self.add_sum: 3,
            self.add_cut: 2,
            self.add_pad: 2,
            self.add_mean: 1,
            self.add_product: 1,
            self.add_activation: 1,
        }
        for _ in range(length):
            self.pick.choices(list(ways), list(ways.values()))[0](self.value())
        read = {i for node in self.nodes for i in node.input}
        outputs = [n for n in self.shapes if n not in read and n != "x"]
        outputs += [n for n in self.shapes if n in read and n != "x" and self.pick.random() < 0.05]
        if not outputs:
            outputs = [self.add("Relu", ["x"], self.shapes["x"])]
        batches: list[str | int | None] = ["N", "N", 1]
        shape = [self.pick.choice(batches), *self.shapes["x"]]
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def session(model: ModelProto) -> ort.InferenceSession:
    """ONNX Runtime without rewrites of its own."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def apart(wanted: Any, found: Any) -> str:
    """In what two outputs differ; "" if they do not."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return f"{found.dtype}{list(found.shape)} instead of {wanted.dtype}{list(wanted.shape)}"
    error = float(abs(wanted - found).max() / max(float(abs(wanted).max()), _LEAST)) if wanted.size else 0.0
    return "" if error <= _TOLERANCE else f"off by {error:.1e}"


def finding(model: ModelProto, seen: Counter[str]) -> str:
    """What is wrong with a network's rewritten form; "" if nothing is. `seen`: rewrites that were done."""
    reference = session(model)
    made, applied, _ = normalize(import_model(model))
    seen.update({a.rewrite for a in applied})
    emitted = session(emit(made).model)
    size = model.graph.input[0].type.tensor_type.shape.dim
    for batch in _BATCHES if size[0].dim_param else (1,):
        x = np.random.default_rng(batch).standard_normal((batch, *(d.dim_value for d in size[1:]))).astype(np.float32)
        wanted = reference.run(None, {"x": x})
        with torch.no_grad():
            result = made(torch.from_numpy(x))
        computed = [result] if isinstance(result, torch.Tensor) else list(result)
        for where, outputs in (("file", emitted.run(None, {"x": x})), ("graph", [v.numpy() for v in computed])):
            for k, (a, b) in enumerate(zip(wanted, outputs, strict=True)):
                if difference := apart(a, b):
                    return f"batch {batch}, the {where}'s output {k}: {difference} ({[a.rewrite for a in applied]})"
    return ""


def main(argv: Sequence[str]) -> int:
    """Draw and compare; 1 if there was a finding."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    seen: Counter[str] = Counter()
    bad = 0
    for k in range(args.seed * 1_000_000, args.seed * 1_000_000 + args.count):
        model = Draft(k).model(length=random.Random(k).randint(4, 12))
        try:
            found = finding(model, seen)
        except Exception as error:  # whatever it is, it is a finding
            found = f"{type(error).__name__}: {error}"
        if found:
            bad += 1
            print(f"network {k}: {found}", flush=True)
    print(f"{args.count} networks, {bad} findings; rewrites done in: {dict(seen.most_common())}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
