"""Broken and hostile model files against the importer: every one gives a network or a clear error, in bounded memory.

    python tools/fuzz/models.py --count 20000 --seed 1        # minutes to hours
    python tools/fuzz/models.py --count 200 --seed 1          # what the tests run

Small models of every operator family are mutated: bytes flipped, cut off and inserted; in the graph, tensors renamed
(so that cycles, doubles and gaps appear), weights dropped, sizes blown up, shapes made up, attributes and operators
swapped. Each is read as a file is, imported, emitted, and where ONNX Runtime runs it too, run, and compared. Anything
but success or a `HantcError` is a finding: it is written to --keep with its traceback. The process gives itself a
memory limit, and each file a minute.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hantc.core.errors import HantcError  # noqa: E402
from hantc.dialect.emitter import emit  # noqa: E402
from hantc.dialect.examples import example_inputs  # noqa: E402
from hantc.dialect.guard import check_survives  # noqa: E402
from hantc.dialect.importer import import_file  # noqa: E402
from hantc.dialect.leaf import array  # noqa: E402

_SECONDS = 60  # for one file; they are tiny, but a probe of ONNX Runtime is a process of its own
_SMALL = 1 << 16  # elements of an input that is run


class Slow(BaseException):
    """A file took too long; no `except Exception` may swallow it."""


def _weights(rng: np.random.Generator, **shapes: tuple[int, ...]) -> list[TensorProto]:
    return [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), k) for k, s in shapes.items()]


def _ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _branch(name: str, op: str) -> onnx.GraphProto:
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, ["a"], [name])], name, [], [out])


def seeds() -> list[ModelProto]:
    """The models that are mutated."""
    rng = np.random.default_rng(0)
    n = helper.make_node
    graphs: list[tuple[list[onnx.NodeProto], list[TensorProto]]] = [
        (
            [
                n("Conv", ["x", "w", "b"], ["a"], pads=[1, 1, 1, 1], name="first"),
                n("BatchNormalization", ["a", "s", "t", "m", "v"], ["c"]),
                n("Relu", ["c"], ["d"]),
                n("GlobalAveragePool", ["d"], ["e"]),
                n("Flatten", ["e"], ["f"]),
                n("Gemm", ["f", "g"], ["y"]),
            ],
            _weights(rng, w=(4, 3, 3, 3), b=(4,), s=(4,), t=(4,), m=(4,), v=(4,), g=(4, 5)),
        ),
        (
            [
                n("Shape", ["x"], ["s"], start=0, end=1),
                n("Concat", ["s", "r"], ["t"], axis=0),
                n("Reshape", ["x", "t"], ["a"]),
                n("Slice", ["a", "z", "k", "z1"], ["b"]),
                n("Softmax", ["b"], ["y"], axis=-1),
            ],
            [_ints("r", 3, -1), _ints("z", 0), _ints("k", 9), _ints("z1", 2)],
        ),
        (
            [
                n("Resize", ["x", "", "scales"], ["a"], mode="linear"),
                n("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
                n("Pad", ["b", "p"], ["c"], mode="reflect"),
                n("Split", ["c", "q"], ["d", "e"], axis=1),
                n("Gather", ["d", "i"], ["y"], axis=1),
            ],
            [
                numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
                _ints("p", 0, 0, 1, 1, 0, 0, 1, 1), _ints("q", 2, 1), _ints("i", 0, 1, 1),
            ],
        ),
        (
            [
                n("ConstantOfShape", ["k"], ["o"]),
                n("Expand", ["o", "k2"], ["o2"]),
                n("Tile", ["o2", "r"], ["o3"]),
                n("ReduceSum", ["o3"], ["t"], keepdims=0),
                n("Add", ["x", "t"], ["a"]),
                n("ReduceMax", ["a"], ["top"], keepdims=0),
                n("Greater", ["top", "t"], ["c"]),
                n("If", ["c"], ["y"], then_branch=_branch("then", "Exp"), else_branch=_branch("else", "Neg")),
            ],
            [_ints("k", 2, 2), _ints("k2", 3, 2, 2), _ints("r", 1, 2, 1)],
        ),
        (
            [
                n("QuantizeLinear", ["x", "sc", "zp"], ["q"]),
                n("DequantizeLinear", ["q", "sc", "zp"], ["d"]),
                n("Transpose", ["d"], ["t"], perm=[0, 2, 3, 1]),
                n("LayerNormalization", ["t", "s", "b"], ["l"], axis=-1),
                n("Einsum", ["l"], ["y"], equation="nhwc->nc"),
            ],
            [*_weights(rng, s=(3,), b=(3,)), numpy_helper.from_array(np.array(0.1, np.float32), "sc"),
             numpy_helper.from_array(np.array(128, np.uint8), "zp")],
        ),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 17)]
    return [
        helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=opsets, ir_version=8)
        for nodes, weights in graphs
    ]


def _bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, a part cut out or doubled, the end cut off."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(raw))
        how = rng.randrange(5)
        if how < 2:
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            raw[at] = rng.choice([0, 1, 127, 128, 255])
        elif how == 3:
            raw[at : at + rng.randrange(1, 9)] = bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
        else:
            del raw[max(1, at) :]
        if not raw:
            break
    return bytes(raw)


def _renamed(rng: random.Random, m: ModelProto) -> None:
    names = [o for n in m.graph.node for o in n.output] + ["x", "y", "", "nowhere"]
    node = rng.choice(m.graph.node)
    ends = rng.choice([node.input, node.output])
    if ends:
        ends[rng.randrange(len(ends))] = rng.choice(names)


def _dropped(rng: random.Random, m: ModelProto) -> None:
    part: Any = rng.choice([m.graph.initializer, m.graph.node, m.graph.output, m.graph.input])
    if part:
        del part[rng.randrange(len(part))]


def _inflated(rng: random.Random, m: ModelProto) -> None:
    huge = rng.choice([-1, 0, 1 << 10, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)])
    weight = rng.choice(m.graph.initializer)
    if rng.random() < 0.4:
        weight.dims[:] = [huge] * rng.randrange(0, 5)
    elif weight.data_type == TensorProto.INT64:
        values = np.full(rng.randrange(0, 5), huge, np.int64)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    else:
        dim = rng.choice(m.graph.input[0].type.tensor_type.shape.dim) if m.graph.input else None
        if dim is not None:
            dim.dim_value = huge


def _swapped(rng: random.Random, m: ModelProto) -> None:
    node = rng.choice(m.graph.node)
    if rng.random() < 0.5 or not node.attribute:
        ops = [s.name for s in onnx.defs.get_all_schemas() if s.domain == ""]
        node.op_type = rng.choice(ops)
        return
    attribute = rng.choice(node.attribute)
    name = attribute.name
    attribute.CopyFrom(
        helper.make_attribute(name, rng.choice([-1, 0, 7, 1 << 40, 0.5, "linear", [1, 2], [], [-(1 << 40)] * 4, [0.5]]))
        if rng.random() < 0.9
        else onnx.AttributeProto(name=name)
    ) if name else None


def _typed(rng: random.Random, m: ModelProto) -> None:
    how = rng.randrange(3)
    if how == 0 and m.graph.initializer:
        rng.choice(m.graph.initializer).data_type = rng.randrange(0, 30)
    elif how == 1 and m.graph.input:
        m.graph.input[0].type.tensor_type.elem_type = rng.randrange(0, 30)
    else:
        m.opset_import[0].version = rng.choice([0, 1, 6, 7, 11, 13, 22, 99, -5])


def _claimed(rng: random.Random, m: ModelProto) -> None:
    """A shape that may not be the tensor's."""
    name = rng.choice([o for n in m.graph.node for o in n.output if o])
    sizes: list[str | int | None] = ["N", 1, 2, 3, 4, 5, 6, 7, 12]
    dims = [rng.choice(sizes) for _ in range(rng.randrange(0, 5))]
    kind = rng.choice([TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64])
    claim = helper.make_tensor_value_info(name, kind, dims)
    if name == "y":
        m.graph.output[0].CopyFrom(claim)
    else:
        m.graph.value_info.append(claim)


MUTATIONS: list[Callable[[random.Random, ModelProto], None]] = [
    _renamed, _dropped, _inflated, _swapped, _typed, _claimed,
]  # fmt: skip


def mutated(rng: random.Random, models: list[ModelProto]) -> bytes:
    """A broken file."""
    model = ModelProto()
    model.CopyFrom(rng.choice(models))
    if rng.random() < 0.35:
        return _bytes(rng, model.SerializeToString())
    for _ in range(rng.choice([1, 1, 2, 3])):
        try:
            rng.choice(MUTATIONS)(rng, model)
        except (IndexError, ValueError, TypeError):  # nothing left to mutate; a value that protobuf refuses
            continue
    whole: bytes = model.SerializeToString()
    return whole


def by_onnxruntime(path: Path, feeds: dict[str, Any]) -> list[Any] | None:
    """What ONNX Runtime makes of the file; None where it refuses."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        results: list[Any] = session.run(None, feeds)
    except Exception:  # onnxruntime raises several unrelated types
        return None
    return results


def agree(a: Any, b: Any) -> bool:
    """Same shape, and where both are finite the same value, integers up to a rounding step."""
    if not isinstance(a, np.ndarray) or a.dtype.kind not in "biuf":
        return True
    b = np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.astype(np.float64), b.astype(np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    return bool(np.allclose(x[both], y[both], 1e-2, 1.0 if a.dtype.kind in "iu" else 1e-3))


def attempt(path: Path) -> str:
    """What becomes of a file: the class of the error, or "network", if ONNX Runtime runs it then with the same result.
    AssertionError if not."""
    try:
        module = import_file(path)
        emit(module)
        check_survives(onnx.load(path))
    except HantcError as error:
        assert error.message
        return type(error).__name__
    info = module.meta["info"]
    if any(np.prod([d for d in s.shape if isinstance(d, int)] or [1], dtype=np.float64) > _SMALL for s in info.inputs):
        return "network, large"
    inputs = example_inputs(info, 2)
    theirs = by_onnxruntime(path, {s.name: array(x) for s, x in zip(info.inputs, inputs, strict=True)})
    if theirs is None or any("Random" in type(m).__name__ or "Random" in repr(m) for m in module.modules()):
        return "network, not compared"
    with torch.no_grad():
        ours = module(*inputs)
    results = [array(r) if isinstance(r, torch.Tensor) else r for r in (ours if isinstance(ours, tuple) else (ours,))]
    assert all(agree(t, o) for t, o in zip(theirs, results, strict=True)), "ONNX Runtime computes something else"
    return "network"


def main() -> int:
    """1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of address space beyond what is there at first")
    parser.add_argument("--keep", type=Path, default=None, help="where findings are written")
    options = parser.parse_args()
    ort.set_default_logger_severity(4)
    torch.set_num_threads(1)
    with open("/proc/self/statm") as f:
        there = int(f.read().split()[0]) * resource.getpagesize()
    limit = there + int(options.memory * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def late(signum: int, frame: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, late)
    counts, findings, models = Counter[str](), 0, seeds()
    with tempfile.TemporaryDirectory(prefix="hantc-fuzz-") as folder:
        path = Path(folder) / "model.onnx"
        for k in range(options.count):
            path.write_bytes(mutated(random.Random(f"{options.seed}/{k}"), models))
            signal.alarm(_SECONDS)
            try:
                counts[attempt(path)] += 1
            except BaseException as error:  # whatever it is, it is what is looked for
                signal.alarm(0)
                if isinstance(error, KeyboardInterrupt):
                    raise
                findings += 1
                print(f"file {k}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    (options.keep / f"{options.seed}_{k}.onnx").write_bytes(path.read_bytes())
                    (options.keep / f"{options.seed}_{k}.txt").write_text(traceback.format_exc())
            finally:
                signal.alarm(0)
    print(f"{options.count} files: {dict(sorted(counts.items()))}, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
