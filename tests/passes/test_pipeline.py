"""The runner: what passes require and promise, graph dumps, timings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from torch import fx

from hantc.core.errors import DataError, HantcError, UsageError
from hantc.core.types import Plan
from hantc.passes.load import Load
from hantc.passes.match import Match
from hantc.passes.normalize import Normalize
from hantc.passes.plug import replace_regions, teacher_part
from hantc.passes.state import Context, State
from hantc.pipeline import COMPILE, PROFILE, Passes, describe, run_passes

if TYPE_CHECKING:
    from tests.passes.conftest import Lab, Recorder


class Noop:
    """State -> the same state."""

    name: ClassVar[str] = "noop"
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.called = 0

    def call(self, state: State, ctx: Context) -> State:
        """Count."""
        self.called += 1
        return state


class NeedsPlan(Noop):
    """Plan -> nothing."""

    name: ClassVar[str] = "needs_plan"
    requires: ClassVar[tuple[str, ...]] = ("model", "plan")


class PromisesPlan(Noop):
    """Nothing -> a plan, if asked to keep its promise."""

    name: ClassVar[str] = "promises_plan"
    ensures: ClassVar[tuple[str, ...]] = ("plan",)

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps

    def call(self, state: State, ctx: Context) -> State:
        """Keep it or not."""
        return replace(state, plan=Plan((), 1.0, 1.0, 0.0)) if self.keeps else state


class Fails(Noop):
    """Anything -> an error."""

    name: ClassVar[str] = "fails"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def call(self, state: State, ctx: Context) -> State:
        """Raise."""
        raise self.error


class BreaksGraph(Noop):
    """Network -> a network that uses a value before it is made."""

    name: ClassVar[str] = "breaks"

    def call(self, state: State, ctx: Context) -> State:
        """Move the last operation to the front."""
        assert state.network is not None
        broken = fx.GraphModule(state.network, fx.Graph())
        broken.graph.graph_copy(state.network.graph, {})
        nodes = list(broken.graph.nodes)
        nodes[0].prepend(nodes[-1])
        return replace(state, network=broken)


def test_what_a_pass_requires_must_be_there(lab: Lab) -> None:
    step, after = NeedsPlan(), Noop()
    with pytest.raises(HantcError) as failure:
        run_passes((step, after), lab.begin(), lab.context())
    assert "needs_plan requires 'plan'" in failure.value.message
    assert failure.value.where == "pipeline"
    assert step.called == after.called == 0


def test_what_a_pass_promises_must_be_there(lab: Lab) -> None:
    after = Noop()
    with pytest.raises(HantcError, match="promises_plan promised 'plan'"):
        run_passes((PromisesPlan(keeps=False), after), lab.begin(), lab.context())
    assert after.called == 0
    state, timings = run_passes((PromisesPlan(keeps=True), NeedsPlan()), lab.begin(), lab.context())
    assert state.plan is not None
    assert list(timings) == ["promises_plan", "needs_plan"]
    assert all(s >= 0 for s in timings.values())


def test_what_is_empty_is_there_all_the_same(lab: Lab) -> None:
    class Takes(Noop):
        requires: ClassVar[tuple[str, ...]] = ("proposals", "weights")

    step = Takes()
    run_passes((step,), replace(lab.begin(), proposals=(), weights={}), lab.context())
    assert step.called == 1


def test_errors_name_the_pass_unless_they_name_a_place_themselves(lab: Lab) -> None:
    with pytest.raises(HantcError) as failure:
        run_passes((Fails(HantcError("no")),), lab.begin(), lab.context())
    assert failure.value.where == "fails"
    with pytest.raises(DataError) as failure:
        run_passes((Fails(DataError("no", where="images.npz")),), lab.begin(), lab.context())
    assert failure.value.where == "images.npz"
    with pytest.raises(ZeroDivisionError):
        run_passes((Fails(ZeroDivisionError()),), lab.begin(), lab.context())
    with pytest.raises(KeyboardInterrupt):
        run_passes((Fails(KeyboardInterrupt()),), lab.begin(), lab.context())  # type: ignore[arg-type]


def test_graphs_are_dumped_where_a_pass_made_one(lab: Lab) -> None:
    ctx = lab.context()
    state, _ = run_passes((Load(), Normalize(), Match()), lab.begin(), ctx)
    dumps = {p.name: p.read_text() for p in (ctx.out / "graphs").iterdir()}
    assert sorted(dumps) == ["00_import_teacher.txt", "01_normalize_network.txt"]
    before, after = dumps["00_import_teacher.txt"], dumps["01_normalize_network.txt"]
    assert before.count("BatchNorm") == 6
    assert "BatchNorm" not in after
    assert state.network is not None
    lines = after.splitlines()
    assert [line.split(" = ")[0] for line in lines] == [n.name for n in state.network.graph.nodes]
    first = next(line for line in lines if " = Conv(" in line)
    assert "(x)" in first
    assert "[(16, 3, 3, 3), (16,)]" in first


def test_passes_that_make_no_graph_leave_no_folder(lab: Lab) -> None:
    ctx = lab.context()
    run_passes((Noop(), Match()), lab.matched, ctx)
    assert not (ctx.out / "graphs").exists()


def test_a_broken_graph_is_found_at_once(lab: Lab) -> None:
    after = Noop()
    with pytest.raises(RuntimeError):
        run_passes((BreaksGraph(), after), lab.matched, lab.context())
    assert after.called == 0


def test_begin_and_end_are_events(lab: Lab) -> None:
    ctx = lab.context()
    run_passes((Noop(), PromisesPlan(keeps=True)), lab.begin(), ctx)
    recorder: Recorder = ctx.reporter  # type: ignore[assignment]
    assert [(kind, fields["stage"]) for kind, fields in recorder.events] == [
        ("begin", "noop"),
        ("end", "noop"),
        ("begin", "promises_plan"),
        ("end", "promises_plan"),
    ]


def test_parts_are_described_indented_under_their_region(lab: Lab) -> None:
    network, match = lab.matched.network, lab.matched.match
    assert network is not None and match is not None
    region = match.region("r03")
    text = describe(replace_regions(network, [(region, teacher_part(network, region))]))
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("r03 = region("))
    inside = lines[at + 1 : at + 1 + len(region.nodes)]
    assert all(line.startswith("    ") for line in inside)
    assert text.endswith("\n")


@pytest.mark.parametrize("passes", [PROFILE, COMPILE], ids=["profile", "compile"])
def test_the_list_of_passes_fits_together(passes: Passes) -> None:
    """Each field that a pass requires is given, or promised by a pass before it."""
    there = {"model"}
    names = []
    for step in passes:
        assert set(step.requires) <= there, step.name
        assert set(step.ensures) <= set(State.__dataclass_fields__), step.name
        there |= set(step.ensures)
        names.append(step.name)
        doc = (type(step).__doc__ or "").splitlines()[0]
        assert " -> " in doc, step.name
    assert len(set(names)) == len(names)


def test_a_full_gpu_is_told(lab: Lab) -> None:
    class Full(Noop):
        name: ClassVar[str] = "full"

        def call(self, state: State, ctx: Context) -> State:
            raise torch.OutOfMemoryError("CUDA out of memory")

    ctx = lab.fresh(device=torch.device("cuda"), train_device="cuda")
    with pytest.raises(UsageError, match=r"memory is full \(full\)") as error:
        run_passes((Full(),), lab.scored, ctx)
    assert error.value.where == "--train-device" and "--train-device cpu" in (error.value.hint or "")


def test_where_a_gpu_fills_up_the_cpu_goes_on(lab: Lab) -> None:
    """With the student as the pass had got it, and in the CPU's precision; the passes behind it stay there."""
    seen: list[tuple[torch.device, bool, float]] = []

    class Full(Noop):
        name: ClassVar[str] = "full"

        def call(self, state: State, ctx: Context) -> State:
            assert state.student is not None
            weight = next(state.student.parameters())
            seen.append((ctx.device, ctx.mixed, float(weight.detach().sum())))
            with torch.no_grad():
                weight.add_(1.0)
            if ctx.device.type == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return state

    ctx = lab.fresh(device=torch.device("cuda"), mixed=True)
    state, timings = run_passes((Full(), Noop()), lab.rewritten(), ctx)
    assert [(d.type, mixed) for d, mixed, _ in seen] == [("cuda", True), ("cpu", False)]
    assert seen[0][2] == seen[1][2], "not as the attempt had left it"
    assert ctx.notes == ["the GPU's memory is full (full): candidates and students learnt on the CPU from there on"]
    assert state.student is not None and list(timings) == ["full", "noop"]
    after = run_passes((Full(), Full()), lab.rewritten(), lab.fresh(device=torch.device("cuda")))
    assert after and [d.type for d, _, _ in seen[2:]] == ["cuda", "cpu", "cpu"]
