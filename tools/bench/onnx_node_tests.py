"""How much of ONNX the dialect speaks: onnx's own node tests, through import, forward, emission and ONNX Runtime.

    python tools/bench/onnx_node_tests.py                 # both counts
    python tools/bench/onnx_node_tests.py --ops Resize,Einsum --list
    PYTHONPATH=/tmp/peer python tools/bench/onnx_node_tests.py --peer   # pip install --target /tmp/peer onnx2torch

A case is *native* if torch alone computes it (gradients pass, training goes through it), *opaque* if ONNX Runtime
does a part. Either way its outputs must be those that onnx states or that ONNX Runtime gives, and the emitted file's
those that ONNX Runtime gives for the case itself.
Cases that ONNX Runtime cannot run as they stand are judged by the first half, and by onnx's checker.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hantc.core.errors import HantcError  # noqa: E402
from hantc.dialect.emitter import emit, opaque_leaves  # noqa: E402
from hantc.dialect.importer import import_model  # noqa: E402
from hantc.dialect.leaf import array, has_torch_type, tensor  # noqa: E402

VISION = frozenset(
    """Conv ConvTranspose MaxPool AveragePool GlobalAveragePool GlobalMaxPool LpPool Resize Upsample GridSample
    DepthToSpace SpaceToDepth BatchNormalization InstanceNormalization LayerNormalization GroupNormalization LRN
    RMSNormalization LpNormalization Relu LeakyRelu PRelu Elu Selu Celu ThresholdedRelu Gelu Mish HardSwish HardSigmoid
    Sigmoid Tanh Softplus Softsign Erf Exp Log Sqrt Abs Neg Clip Softmax LogSoftmax Add Sub Mul Div Pow Max Min Sum Mean
    Equal Greater GreaterOrEqual Less LessOrEqual And Or Not Where ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare ArgMax ArgMin Reshape Flatten Transpose Squeeze
    Unsqueeze Concat Split Slice Gather GatherElements GatherND Expand Tile Pad MatMul Gemm Einsum Attention
    QuantizeLinear DequantizeLinear QLinearConv QLinearMatMul""".split()  # noqa: SIM905
)
RTOL, ATOL = 1e-3, 1e-5


def cases() -> list[tuple[str, str, Any]]:
    """(operator, name, case) of every node test; a function's expanded form counts for its operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found: list[Any] = collect_testcases(None)
    single = {c.name: c.model.graph.node[0].op_type for c in found if len(c.model.graph.node) == 1}
    return [(single.get(re.sub(r"_expanded.*", "", c.name), "(several)"), c.name, c) for c in found]


def same(wanted: Any, got: Any, rtol: float) -> bool:
    """Whether two results agree in kind, shape and value."""
    if wanted is None:
        return got is None
    if isinstance(wanted, list):
        alike = isinstance(got, list) and len(wanted) == len(got)
        return alike and all(same(w, g, rtol) for w, g in zip(wanted, got, strict=True))
    wanted, got = np.asarray(wanted), np.asarray(got)
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    if wanted.dtype.kind in "OSU" or wanted.dtype.kind == "b":
        return bool((wanted == got).all())
    if wanted.dtype.kind in "iu":  # quantised values may fall to either side of a half
        return int(np.abs(wanted.astype(np.int64) - got.astype(np.int64)).max(initial=0)) <= int(
            wanted.dtype.itemsize == 1
        )
    if wanted.dtype.kind == "c":
        return bool(np.allclose(wanted, got, rtol, ATOL))
    loose = 1e-2 if wanted.dtype.itemsize < 4 else rtol
    return bool(
        np.allclose(wanted.astype(np.float64), got.astype(np.float64), loose, max(ATOL, loose / 10), equal_nan=True)
    )


def plain(value: Any) -> Any:
    """A data set's value as what a runtime takes."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list):
        return [plain(v) for v in value]
    return np.asarray(value) if isinstance(value, np.generic) else value


def given(value: Any) -> Any:
    """A value as a module takes it."""
    if isinstance(value, list):
        return [given(v) for v in value]
    return tensor(value) if isinstance(value, np.ndarray) and has_torch_type(value) else value


def run_file(model: onnx.ModelProto, feeds: Sequence[Any]) -> list[Any]:
    """The outputs of a model in ONNX Runtime; its exceptions pass."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = dict(zip((i.name for i in session.get_inputs()), feeds, strict=True))
    out: list[Any] = session.run(None, given)
    return out


def outputs_of(result: Any) -> list[Any]:
    """What a module returned, as arrays."""
    many = list(result) if isinstance(result, tuple) else [result]
    return [
        array(r) if isinstance(r, torch.Tensor) else outputs_of(tuple(r)) if isinstance(r, list) else r for r in many
    ]


def verdict(case: Any) -> tuple[str, str]:
    """("native" | "opaque" | "wrong" | "fails", why)."""
    rtol = max(case.rtol, RTOL)
    try:
        module = import_model(case.model)
        for feeds, wanted in case.data_sets:
            feeds, wanted = [plain(f) for f in feeds], [plain(w) for w in wanted]
            try:  # what it makes of the case itself, which is not always what onnx states
                before = run_file(case.model, feeds)
            except Exception:  # no kernel, a newer opset: nothing to compare the file with
                before = None
            got = outputs_of(module(*map(given, feeds)))
            stated = all(same(w, g, rtol) for w, g in zip(wanted, got, strict=True))
            if not stated and not (before and all(same(b, g, rtol) for b, g in zip(before, got, strict=True))):
                return "wrong", "in torch"
            emitted = emit(module).model
            if before is None:
                onnx.checker.check_model(emitted)
            elif not all(same(b, a, rtol) for b, a in zip(before, run_file(emitted, feeds), strict=True)):
                return "wrong", "emitted"
    except HantcError as error:
        return "fails", str(error).splitlines()[0][:160]
    except Exception as error:  # whatever the case runs into is what is counted here
        return "fails", f"{type(error).__name__}: {error}".splitlines()[0][:160]
    foreign = opaque_leaves(module)
    return (
        ("opaque", "; ".join(f"{leaf.proto.op_type}: {leaf.reason}"[:160] for _, leaf in foreign))
        if foreign
        else ("native", "")
    )


def peer(case: Any) -> bool:
    """Whether onnx2torch converts the case and computes it right."""
    from onnx2torch import convert  # type: ignore[import-not-found]

    try:
        module = convert(case.model)
        for feeds, wanted in case.data_sets:
            got = outputs_of(module(*(given(plain(f)) for f in feeds)))
            if not all(same(plain(w), g, max(case.rtol, RTOL)) for w, g in zip(wanted, got, strict=True)):
                return False
    except Exception:  # it raises whatever it runs into
        return False
    return True


def runs(case: Any) -> bool:
    """Whether ONNX Runtime computes the case right."""
    try:
        for feeds, wanted in case.data_sets:
            got = run_file(case.model, [plain(f) for f in feeds])
            if not all(same(plain(w), g, max(case.rtol, RTOL)) for w, g in zip(wanted, got, strict=True)):
                return False
    except Exception:  # onnxruntime raises several unrelated types
        return False
    return True


def main() -> int:
    """Print the counts; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="only these operators, separated by commas")
    parser.add_argument("--vision", action="store_true", help="only the vision operators")
    parser.add_argument("--list", action="store_true", help="name the cases that are not native")
    parser.add_argument("--peer", action="store_true", help="also onnx2torch, which must be importable")
    parser.add_argument("--json", type=Path, help="write every verdict to a file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ort.set_default_logger_severity(4)
    torch.set_num_threads(1)
    only = set(filter(None, options.ops.split(",")))
    chosen = [c for c in cases() if (not only or c[0] in only) and (not options.vision or c[0] in VISION)]
    vision, others = Counter[str](), Counter[str]()
    rows = []
    for op, name, case in chosen:
        kind, why = verdict(case)
        theirs = peer(case) if options.peer and op in VISION else None
        runnable = op in VISION or runs(case)
        rows.append([op, name, kind, why, theirs, runnable])
        if op in VISION:
            vision[kind] += 1
            vision["peer"] += bool(theirs)
        elif runnable:
            others[kind] += 1
        if options.list and kind != "native" and (op in VISION or kind != "opaque"):
            print(f"{kind:7} {'' if runnable else '(not by ORT either) '}{op} {name}: {why}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    n, m = len([r for r in rows if r[0] in VISION]), sum(others.values())
    print(
        f"vision operators ({len(VISION)}): {vision['native']} of {n} natively, {vision['opaque']} opaque and right, "
        f"{n - vision['native'] - vision['opaque']} not"
    )
    if options.peer:
        print(f"  onnx2torch: {vision['peer']} of {n}")
    if m:
        print(
            f"others that ONNX Runtime passes: {others['native'] + others['opaque']} of {m} right, "
            f"{others['native']} of them natively"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
