"""The compiler, whole: an ordered list of passes from an ONNX model to a verified faster one.

Each pass takes the state and returns a new one. The runner below checks what passes require and ensure,
times them, lints and dumps graphs, and knows nothing of what they do.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from hantc.core.atomic import write_text
from hantc.core.errors import HantcError, UsageError
from hantc.core.pass_api import Pass
from hantc.passes.cost import Cost
from hantc.passes.deploy import Deploy
from hantc.passes.distill import Distill
from hantc.passes.emit import Emit
from hantc.passes.finetune import Finetune
from hantc.passes.load import Load
from hantc.passes.match import Match
from hantc.passes.normalize import Normalize
from hantc.passes.place import CPU
from hantc.passes.propose import Propose
from hantc.passes.redistil import Redistil
from hantc.passes.rewrite import Rewrite
from hantc.passes.score import Score
from hantc.passes.select import Select
from hantc.passes.state import Context, State
from hantc.passes.verify import Verify

Passes = Sequence[Pass[State, Context]]

PROFILE: Passes = (
    Load(),  # ONNX model -> imported teacher
    Normalize(),  # imported teacher -> canonical network, exactly equal
    Match(),  # network -> regions
    Propose(),  # regions -> candidate operations
    Cost(),  # candidates -> latency table
)

COMPILE: Passes = (
    *PROFILE,
    Distill(),  # latency table -> trained candidates
    Score(),  # trained candidates -> scores
    Select(),  # scores and costs -> plan
    Rewrite(),  # plan -> student
    Redistil(),  # student -> student whose regions undo each other's errors
    Finetune(),  # student -> student trained as a whole
    Emit(),  # student -> ONNX model
    Verify(),  # ONNX model -> summary
    Deploy(),  # ONNX model -> the target's own file, where it has one
)


def run_passes(passes: Passes, state: State, ctx: Context) -> tuple[State, Mapping[str, float]]:
    """Run passes in order; returns the last state and the seconds each took."""
    timings: dict[str, float] = {}
    for i, step in enumerate(passes):
        _demand(state, step.requires, f"{step.name} requires")
        ctx.reporter.event("begin", stage=step.name)
        started = time.monotonic()
        before = state
        try:
            state, ctx = _call(step, state, ctx)
        except HantcError as error:
            error.where = error.where or step.name
            raise
        timings[step.name] = time.monotonic() - started
        ctx.reporter.event("end", stage=step.name, seconds=timings[step.name])
        _demand(state, step.ensures, f"{step.name} promised")
        _dump(f"{i:02d}_{step.name}", before, state, ctx)
    return state, timings


def _call(step: Pass[State, Context], state: State, ctx: Context) -> tuple[State, Context]:
    """What a pass makes of the state, and the context of the passes behind it: where a GPU's memory does not suffice,
    and it was not asked for, candidates and students learn on the CPU from there on."""
    # fine-tuning trains the student in place
    given = state if ctx.device == CPU else replace(state, student=copy.deepcopy(state.student))
    full = f"the GPU's memory is full ({step.name})"
    try:
        return step.call(state, ctx), ctx
    except torch.OutOfMemoryError as error:
        if ctx.device == CPU or ctx.config.train_device != "auto":
            hint = "--train-device cpu; what was finished is not done again"
            raise UsageError(full, where="--train-device", hint=hint) from error
    torch.cuda.empty_cache()  # of what the error's own frames held until here
    ctx.note(f"{full}: candidates and students learnt on the CPU from there on")
    ctx = replace(ctx, device=CPU, mixed=ctx.mixed_on_cpu)
    return step.call(given, ctx), ctx


def _demand(state: State, fields: Sequence[str], who: str) -> None:
    for field in fields:
        if getattr(state, field) is None:
            raise HantcError(f"{who} {field!r}, which is missing", where="pipeline")


def _dump(name: str, before: State, after: State, ctx: Context) -> None:
    """Lint every graph that a pass made and write it as readable text."""
    for field in ("teacher", "network", "student"):
        graph: Any = getattr(after, field)
        if isinstance(graph, fx.GraphModule) and graph is not getattr(before, field):
            graph.graph.lint()
            folder = ctx.out / "graphs"
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / f"{name}_{field}.txt", describe(graph))


def describe(module: fx.GraphModule) -> str:
    """A graph as text: one line a node, with its module and the modules of nested graphs indented."""
    lines: list[str] = []

    def walk(graph: fx.GraphModule, indent: str) -> None:
        for node in graph.graph.nodes:
            inputs = ", ".join(n.name for n in node.all_input_nodes)
            if node.op != "call_module":
                lines.append(f"{indent}{node.name} = {node.op}({inputs})")
                continue
            leaf = graph.get_submodule(str(node.target))
            if isinstance(leaf, fx.GraphModule):
                lines.append(f"{indent}{node.name} = region({inputs}):")
                walk(leaf, indent + "    ")
            else:
                shape = [tuple(p.shape) for p in leaf.parameters(recurse=False)]
                lines.append(
                    f"{indent}{node.name} = {type(leaf).__name__}({inputs}) {leaf.extra_repr()} {shape or ''}".rstrip()
                )

    walk(module, "")
    return "\n".join(lines) + "\n"
