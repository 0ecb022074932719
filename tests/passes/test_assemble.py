"""Selections as networks and as files: INT8 exactly where it was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx

from hantc.core.backend_api import BuildSpec
from hantc.core.types import CandidateSpec, Choice
from hantc.dialect.fakequant import ActivationQuant, observing
from hantc.dialect.qdq import QuantSpec
from hantc.passes import assemble
from hantc.passes.assemble import Blueprint, build_student, calibration_feeds, rounded_view, to_onnx
from hantc.passes.state import Context, State

if TYPE_CHECKING:
    from tests.passes.conftest import Lab

STACK = CandidateSpec.make("cb_stack", k=3, w=0.5).name
NAMES = ("r00", "r01", "r02", "r03")


def picks(**chosen: tuple[str, str]) -> Blueprint:
    """Every block as the teacher has it in FP32, but for those given."""
    return Blueprint(tuple((name, *chosen.get(name, ("teacher", "fp32"))) for name in NAMES))


def student_of(lab: Lab, blueprint: Blueprint) -> fx.GraphModule:
    return build_student(lab.scored, blueprint, {p.spec.name: p.spec for p in lab.scored.proposals or ()})


def images(lab: Lab, n: int = 40) -> Tensor:
    return lab.labelled.val.batch(list(range(n)))[0]


def run(module: torch.nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = module(x)
    return out


def run_file(lab: Lab, model: onnx.ModelProto, x: Tensor) -> Tensor:
    artefact = lab.ort.build(model, BuildSpec())
    return torch.from_numpy(lab.ort.run(artefact, {"x": x.numpy()})[0])


def emitted(lab: Lab, blueprint: Blueprint, ctx: Context) -> onnx.ModelProto:
    student = student_of(lab, blueprint)
    assert ctx.data is not None
    return to_onnx(student, blueprint, ctx, calibration_feeds(student, ctx.data, 64, 16))


def int8_products(model: onnx.ModelProto) -> set[str]:
    """Names of the convolutions and matrix products whose input and weight both come out of DequantizeLinear."""
    makers = {o: n.op_type for n in model.graph.node for o in n.output}
    return {
        n.name
        for n in model.graph.node
        if n.op_type in ("Conv", "Gemm", "MatMul") and {makers.get(i) for i in n.input[:2]} == {"DequantizeLinear"}
    }


def test_a_blueprint_says_which_regions_are_int8() -> None:
    choices = [
        Choice(n, "residual", "teacher", p, 0.0, 1.0, 1.0) for n, p in (("a", "int8"), ("b", "fp32"), ("c", "int8"))
    ]
    blueprint = Blueprint.of(choices)
    assert blueprint.picks == (("a", "teacher", "int8"), ("b", "teacher", "fp32"), ("c", "teacher", "int8"))
    assert blueprint.int8 == ("a", "c")


def test_the_teacher_alone_is_left_as_it_is(lab: Lab) -> None:
    network = lab.scored.network
    assert network is not None
    student = student_of(lab, picks())
    assert [n.name for n in student.graph.nodes] == [n.name for n in network.graph.nodes]
    assert torch.equal(run(student, images(lab)), run(network, images(lab)))


def test_int8_makes_a_region_a_part_of_its_own_with_the_same_values(lab: Lab) -> None:
    network = lab.scored.network
    assert network is not None
    student = student_of(lab, picks(r01=("teacher", "int8"), r02=("teacher", "int8")))
    assert isinstance(student.get_submodule("r01"), fx.GraphModule)
    assert isinstance(student.get_submodule("r02"), fx.GraphModule)
    assert torch.allclose(run(student, images(lab)), run(network, images(lab)), atol=1e-5)


def test_candidates_come_with_their_trained_weights(lab: Lab) -> None:
    assert lab.scored.weights is not None
    student = student_of(lab, picks(r03=(STACK, "fp32")))
    part = student.get_submodule("r03")
    # folded: the weights are others, their number is less by the norms
    trained = sum(v.numel() for k, v in lab.scored.weights["r03", STACK].items() if k.endswith("conv.weight"))
    assert sum(p.numel() for n, p in part.named_parameters() if p.dim() == 4) == trained
    assert not torch.allclose(run(student, images(lab)), run(student_of(lab, picks()), images(lab)), atol=1e-3)


BLUEPRINTS: Mapping[str, Blueprint] = {
    "one": picks(r02=("teacher", "int8")),
    "first and last": picks(r00=("teacher", "int8"), r03=("teacher", "int8")),
    "neighbours, one a candidate": picks(r02=("teacher", "int8"), r03=(STACK, "int8")),
    "beside a candidate in FP32": picks(r01=(STACK, "fp32"), r02=("teacher", "int8")),
    "a span": Blueprint((("r00", "teacher", "fp32"), ("r01", "teacher", "fp32"), ("r02_r03", STACK, "int8"))),
}


@pytest.mark.parametrize("case", BLUEPRINTS)
def test_int8_nodes_stand_only_in_int8_regions(lab: Lab, case: str) -> None:
    blueprint, ctx = BLUEPRINTS[case], lab.fresh()
    model = emitted(lab, blueprint, ctx)
    onnx.checker.check_model(model, full_check=True)
    products = {n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    inside = {n for n in products if n.split("/")[0] in blueprint.int8}
    assert inside, "the regions' nodes can be told by name"
    assert int8_products(model) == inside
    # whatever else runs in INT8 belongs to these regions too
    makers = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            sources = [makers[i].op_type for i in node.input if i in makers]
            if sources and all(op == "DequantizeLinear" for op in sources) and node.name not in products:
                assert node.name.split("/")[0] in (*blueprint.int8, "globalaveragepool_0"), node.name


def views(lab: Lab, blueprint: Blueprint, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the student, of its rounded view and of its file, on the same ranges."""
    student, x = student_of(lab, blueprint), images(lab)
    view = rounded_view(student, blueprint, ctx.quant)
    order = np.random.default_rng(0).permutation(len(lab.labelled.train))[:64].tolist()
    with observing(view):
        run(view, lab.labelled.train.batch(order)[0])
    return run(student, x), run(view, x), run_file(lab, emitted(lab, blueprint, ctx), x)


@pytest.mark.parametrize("case", BLUEPRINTS)
def test_rounding_costs_little(lab: Lab, case: str) -> None:
    plain, rounded, file = views(lab, BLUEPRINTS[case], lab.fresh(backend=lab.ort))
    assert not torch.equal(rounded, plain)
    assert not torch.equal(file, plain)
    for other in (rounded, file):
        assert float((other - plain).abs().mean()) < 0.05 * float(plain.std())


@pytest.mark.parametrize("case", BLUEPRINTS)
def test_the_file_computes_what_the_rounded_view_does(lab: Lab, case: str) -> None:
    """Scores and fine-tuning see the view; what is deployed is the file. At 7 bits, which every CPU computes right."""
    ctx = lab.fresh(backend=lab.ort)
    ctx = replace(ctx, capabilities=replace(ctx.capabilities, reduce_range=True))
    plain, rounded, file = views(lab, BLUEPRINTS[case], ctx)
    # what the view does not foresee (the rounding of results that nothing quantised reads) is the lesser part
    assert float((file - rounded).abs().mean()) < 0.6 * float((file - plain).abs().mean())


def test_without_int8_the_file_keeps_its_opset_and_needs_no_feeds(lab: Lab) -> None:
    ctx = lab.fresh()
    blueprint = picks(r03=(STACK, "fp32"))
    model = to_onnx(student_of(lab, blueprint), blueprint, ctx, [])
    assert {o.domain: o.version for o in model.opset_import}[""] == 17
    assert not int8_products(model)
    assert torch.allclose(run_file(lab, model, images(lab)), run(student_of(lab, blueprint), images(lab)), atol=1e-4)


def test_the_range_of_weights_follows_the_machine(lab: Lab) -> None:
    """Without VNNI, weights keep to 7 bits."""
    blueprint, ctx = BLUEPRINTS["one"], lab.fresh()

    def largest(reduce_range: bool) -> int:
        at = replace(ctx, capabilities=replace(ctx.capabilities, reduce_range=reduce_range))
        weights = [onnx.numpy_helper.to_array(i) for i in emitted(lab, blueprint, at).graph.initializer]
        return max(int(np.abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8 and w.ndim == 4)

    assert largest(True) <= 64
    assert largest(False) in (127, 128)


def test_the_rounded_view_works_on_the_students_own_weights(lab: Lab) -> None:
    blueprint = picks(r02=("teacher", "int8"), r03=(STACK, "fp32"))
    student = student_of(lab, blueprint)
    view = rounded_view(student, blueprint, QuantSpec(reduce_range=False))
    assert {id(p) for p in view.parameters()} == {id(p) for p in student.parameters()}
    assert not any(isinstance(m, ActivationQuant) for m in student.modules())
    inside = {n.split(".")[0] for n, m in view.named_modules() if isinstance(m, ActivationQuant)}
    assert inside == {"r02"}


def feeds_of(lab: Lab, state: State, ctx: Context, images: int, batch: int) -> list[Mapping[str, np.ndarray]]:
    assert state.network is not None and ctx.data is not None
    return list(calibration_feeds(state.network, ctx.data, images, batch))


def test_calibration_feeds_are_training_images_in_batches(lab: Lab) -> None:
    feeds = feeds_of(lab, lab.matched, lab.fresh(), 40, 16)
    assert [f["x"].shape for f in feeds] == [(10, 3, 12, 12)] * 4  # all of them, in equal batches
    known = {row.tobytes() for row in lab.labelled.train.batch(list(range(96)))[0].numpy()}
    rows = [row.tobytes() for f in feeds for row in f["x"]]
    assert set(rows) <= known
    assert len(set(rows)) == 40
    again = feeds_of(lab, lab.matched, lab.fresh(), 40, 16)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(feeds, again, strict=True))


def test_large_images_come_in_smaller_batches(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    many = feeds_of(lab, lab.matched, lab.fresh(), 48, 16)
    monkeypatch.setattr(assemble, "_FEED_BYTES", 6 * 3 * 12 * 12 * 4 + 1)
    few = feeds_of(lab, lab.matched, lab.fresh(), 48, 16)
    assert [f["x"].shape for f in few] == [(6, 3, 12, 12)] * 8
    assert np.array_equal(np.concatenate([f["x"] for f in few]), np.concatenate([f["x"] for f in many]))
    monkeypatch.setattr(assemble, "_FEED_BYTES", 1)
    assert [f["x"].shape[0] for f in feeds_of(lab, lab.matched, lab.fresh(), 3, 16)] == [1, 1, 1]


def test_calibration_feeds_keep_to_a_fixed_batch(lab: Lab) -> None:
    network = lab.matched.network
    assert network is not None
    fixed = fx.GraphModule(network, network.graph)
    info = network.meta["info"]
    fixed.meta["info"] = replace(info, inputs=(replace(info.inputs[0], shape=(5, 3, 12, 12)),))
    feeds = calibration_feeds(fixed, lab.labelled, 12, 16)
    assert [f["x"].shape[0] for f in feeds] == [5, 5]


def test_a_fixed_batch_larger_than_what_is_asked_for_is_still_fed(lab: Lab) -> None:
    network = lab.matched.network
    assert network is not None
    fixed = fx.GraphModule(network, network.graph)
    info = network.meta["info"]
    fixed.meta["info"] = replace(info, inputs=(replace(info.inputs[0], shape=(32, 3, 12, 12)),))
    assert [f["x"].shape[0] for f in calibration_feeds(fixed, lab.labelled, 16, 16)] == [32]


def test_few_training_images_are_enough_to_calibrate_with(lab: Lab) -> None:
    few = replace(lab.labelled, train=lab.labelled.train.subset(range(10)))
    feeds = feeds_of(lab, lab.matched, lab.fresh(data=few), 256, 32)
    assert sum(len(f["x"]) for f in feeds) == 10
