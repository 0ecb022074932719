"""What a student may have beside its latency: sums and peaks, counted as the roofline counts them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx
import pytest
import torch
from torch import fx, nn

from hantc.backends.prediction import Machine, predict
from hantc.core.config import Cap
from hantc.core.errors import BudgetError, UsageError
from hantc.core.types import ScoreRow, Signature
from hantc.dialect.emitter import emit
from hantc.dialect.graph import count_macs, count_params, peak_activations, shapes_of
from hantc.dialect.importer import import_model
from hantc.ops import registry
from hantc.passes.limits import activation_bytes, allowances, check_reachable
from hantc.passes.program import make_problem
from hantc.search.ilp import solve
from tests.passes.conftest import BOTTLE, STACK

if TYPE_CHECKING:
    from hantc.passes.limits import Allowance
    from hantc.passes.state import State
    from tests.passes.conftest import Lab


def asked(lab: Lab, state: State, **caps: Cap) -> tuple[Allowance, ...]:
    ctx = lab.fresh()
    return allowances(state, replace(ctx, config=ctx.config.model_copy(update=caps)))


@pytest.mark.parametrize(
    ("text", "option", "cap"),
    [
        ("0.5", "--budget-params", Cap(fraction=0.5)),
        ("50%", "--budget-macs", Cap(fraction=0.5)),
        ("5M", "--budget-params", Cap(amount=5e6)),
        ("1.5G", "--budget-macs", Cap(amount=1.5e9)),
        ("4000", "--budget-params", Cap(amount=4000)),
        ("2MiB", "--budget-memory", Cap(amount=2 * 1024**2)),
        ("2m", "--budget-memory", Cap(amount=2 * 1024**2)),
    ],
)
def test_amounts(text: str, option: str, cap: Cap) -> None:
    assert Cap.parse(text, option) == cap
    assert cap.of(8.0) == (4.0 if cap.fraction else cap.amount)


@pytest.mark.parametrize("text", ["", "half", "-1", "0", "5X", "200%"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(UsageError, match="--budget-macs"):
        Cap.parse(text, "--budget-macs")


def test_sums_are_the_networks_own(lab: Lab) -> None:
    state = lab.costed
    params, macs = asked(lab, state, budget_params=Cap(fraction=0.5), budget_macs=Cap(amount=1e5))
    assert state.network is not None and state.match is not None
    shapes = shapes_of(state.network, [torch.zeros(1, 3, 12, 12)])
    assert params.teacher == count_params(state.network) and params.most == params.teacher / 2
    assert macs.teacher == count_macs(state.network, shapes) and macs.most == 1e5
    for bound in (params, macs):
        atoms = [r.name for r in state.match.regions if len(r.atoms) == 1]
        assert bound.fixed + sum(bound.uses[r, "teacher"] for r in atoms) == bound.teacher
        assert bound.strain("r03", "teacher") == pytest.approx(bound.teacher / bound.most)


def test_peaks_are_those_of_the_roofline(lab: Lab) -> None:
    state = lab.costed
    (memory,) = asked(lab, state, budget_memory=Cap(fraction=1.0))
    assert state.network is not None and state.match is not None
    whole = predict(emit(state.network).model, Machine(), batch=1, threads=1)
    assert memory.teacher == whole.peak_bytes
    for spec in (STACK, BOTTLE):
        region = state.match.region("r03")
        module = registry.build(spec, Signature.of(region))
        want = predict(emit(module.eval()).model, Machine(), batch=1, threads=1).peak_bytes
        shapes = shapes_of(module, [torch.zeros(1, *region.in_shape)])
        assert memory.uses["r03", spec.name] == 4 * peak_activations(module, shapes) == want


def test_a_student_takes_what_its_parts_were_counted_for(lab: Lab) -> None:
    """Replaced parts and those in INT8 are graphs inside the student's."""
    state = lab.rewritten()
    (memory,) = asked(lab, state, budget_memory=Cap(fraction=1.0))
    assert state.student is not None and state.network is not None and state.plan is not None
    ctx = lab.fresh()
    assert activation_bytes(state.network, ctx) == memory.teacher
    uses = [memory.uses[c.region, c.candidate] for c in state.plan.choices]
    assert activation_bytes(state.student, ctx) == max(memory.fixed, *uses)


def test_what_is_alive_inside_a_part_counts() -> None:
    wide = fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 40, 1), nn.ReLU(), nn.Conv2d(40, 2, 1)))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("part", (graph.call_function(torch.neg, (x,)),)))
    whole = fx.GraphModule({"part": wide}, graph)
    shapes = shapes_of(whole, [torch.zeros(1, 2, 3, 3)])
    assert peak_activations(whole, shapes) == peak_activations(wide, shapes_of(wide, [torch.zeros(1, 2, 3, 3)])) == 720


def test_a_batch_that_the_file_fixes_counts_once(lab: Lab) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(lab.model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    network, ctx = import_model(fixed), lab.fresh(batch=4)
    assert ctx.config.batch == 4
    assert activation_bytes(network, ctx) == activation_bytes(import_model(lab.model), ctx)


def test_a_selection_keeps_within_its_weights(lab: Lab) -> None:
    state = scored(lab)
    free = solve(make_problem(state, 1e9))
    assert free.score == 0
    for share in (0.9, 0.7):
        (bound,) = asked(lab, state, budget_params=Cap(fraction=share))
        check_reachable(state, (bound,))
        problem = make_problem(state, 1e9, (bound,))
        picked = [problem.items[i] for i in solve(problem).items]
        assert bound.fixed + sum(i.uses[0] for i in picked) <= bound.most
        assert any(i.candidate != "teacher" for i in picked)


def test_what_needs_too_much_memory_is_no_choice(lab: Lab) -> None:
    state = scored(lab)
    (bound,) = asked(lab, state, budget_memory=Cap(fraction=0.9))
    small = {(r, c) for (r, c), use in bound.uses.items() if use <= bound.most}
    items = make_problem(state, 1e9, (bound,)).items
    assert {(i.region, i.candidate) for i in items} <= small
    assert len(items) < len(make_problem(state, 1e9).items)


@pytest.mark.parametrize("name", ["budget_params", "budget_macs", "budget_memory"])
def test_too_little_names_the_nearest(lab: Lab, name: str) -> None:
    state = scored(lab)
    (bound,) = asked(lab, state, **{name: Cap(fraction=1e-4)})
    with pytest.raises(BudgetError, match="least reachable") as caught:
        check_reachable(state, (bound,))
    assert caught.value.where == "--" + name.replace("_", "-")
    (enough,) = asked(lab, state, **{name: Cap(fraction=caught.value.nearest)})
    check_reachable(state, (enough,))


def scored(lab: Lab) -> State:
    """Costs of all offers, and scores that grow with what is saved."""
    state = lab.costed
    assert state.costs is not None
    rows = [r for r in state.costs.rows if r.precision == "fp32"]
    values = [0.0 if r.candidate == "teacher" else 1.0 / (1 + r.params) for r in rows]
    scores = [ScoreRow(r.region, r.candidate, "fp32", v, 0.0, 0.0, 1.0, 0.0) for r, v in zip(rows, values, strict=True)]
    return replace(state, scores=tuple(scores))
