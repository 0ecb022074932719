"""Select: scores and costs -> a plan, by integer programming, corrected by measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch

from hantc.core.errors import BudgetError
from hantc.core.types import Choice, Correction, Fetching, Plan, digest
from hantc.dialect.examples import example_inputs
from hantc.dialect.fakequant import observing
from hantc.ops.registry import is_exact
from hantc.passes.assemble import Blueprint, build_student, rounded_view
from hantc.passes.bench import Bench
from hantc.passes.distill import wanted_ms
from hantc.passes.engine import Judge, fast_layout, output_kind
from hantc.passes.limits import Allowance, allowances, check_reachable
from hantc.passes.program import footprint, inside_ms, make_problem, specs_of, teachers_cost, teachers_footprint
from hantc.passes.state import Context, Evaluated, State
from hantc.passes.trials import Trial, corrected, measure_students, trials
from hantc.search.explore import explore
from hantc.search.ilp import solve, solve_diverse
from hantc.search.pareto import reachable, solve_for_score
from hantc.search.problem import Problem, Solution

_GAP = 0.005
_FINALISTS = 4  # of the explored students that are timed and judged
_SOLVER_S = 30.0
_ROUNDS = 3  # of measuring some students and correcting the table
_PROBES = 4  # students in each
_CORRECTING = 0.08  # of the time limit: no further round begins behind it
_CLOSE = 0.03
_AIM = 0.97  # of the budget is planned for: what is verified at the end differs by some percent either way
_DOUBT = 1.1  # times the budget: what costs no more is tried, and verified, not refused
_MARGIN = 1.05  # of the nearest reachable budget, so that it is met when everything is measured again
_VERSION = 21
_CLEARLY = 0.95  # of the teacher's time: less than this is a gain, and no chance

_Known = dict[tuple[int, ...], Evaluated]  # by the solution's items


class Select:
    """Scores and costs -> the plan: K diverse solutions, measured, corrected, evaluated, the best kept."""

    name: ClassVar[str] = "select"
    requires: ClassVar[tuple[str, ...]] = ("network", "match", "costs", "scores", "weights")
    ensures: ClassVar[tuple[str, ...]] = ("plan", "costs")

    def call(self, state: State, ctx: Context) -> State:
        """Solve, measure, correct, solve again; then judge the real students."""
        assert state.costs is not None and state.match is not None
        started = time.monotonic()
        key = self._key(state, ctx)
        stored = ctx.store.get_json("plan", key)
        if stored is not None and stored["limit"] >= ctx.clock.limit_s:  # a shorter run times students in haste
            return self._restore(state, stored)
        if ctx.data is None or state.match.n_atoms == 0:
            return replace(state, plan=self._exact(state, ctx))
        budget, bounds = self._budget(state, ctx), allowances(state, ctx)
        check_reachable(state, bounds)
        state, known = self._corrected(state, ctx, budget, bounds)
        problem = make_problem(state, self._aim(state, budget, bounds), bounds)
        solutions = self._solved(state, ctx, problem, ctx.effort.solutions)
        new = [s for s in solutions if s.items not in known]
        known |= {s.items: e for s, e in zip(new, measure_students(state, ctx, problem, new), strict=True)}
        evaluated = self._judge(state, ctx, [known[s.items] for s in solutions])
        if ctx.config.max_drop is None:
            evaluated += self._explore(state, ctx, budget, bounds)
        best = self._best(evaluated, budget, ctx)
        assert state.costs is not None
        correction, fetching = asdict(state.costs.correction), asdict(state.costs.fetching)
        solver = {
            "k": len(evaluated),
            "seconds": time.monotonic() - started,
            "correction": correction,
        }
        plan = replace(best.plan, budget_ms=budget, solver={**best.plan.solver, **solver})
        evaluated = [replace(e, chosen=e is best) for e in evaluated]
        answer = {
            "plan": asdict(plan),
            "correction": correction,
            "fetching": fetching,
            "evaluated": [asdict(e) for e in evaluated],
            "limit": ctx.clock.limit_s,
        }
        stored = ctx.store.get_json("plan", key)
        if stored is None or stored["limit"] <= answer["limit"]:  # a longer run may have come to its own meanwhile
            ctx.store.put_json("plan", key, answer)
        return replace(state, plan=plan, evaluated=tuple(evaluated))

    def _corrected(
        self, state: State, ctx: Context, budget: float, bounds: Sequence[Allowance]
    ) -> tuple[State, _Known]:
        """The state with costs corrected until whole students take what the table says; and those measured last."""
        seen: list[Trial] = []
        first, started = state, time.monotonic()
        for _ in range(_ROUNDS):
            assert state.costs is not None
            problem = make_problem(state, self._aim(state, budget, bounds), bounds)
            probes = self._solved(state, ctx, problem, min(_PROBES, ctx.effort.solutions))
            new = measure_students(state, ctx, problem, probes)
            ratio = sorted(e.measured_ms / e.plan.predicted_latency_ms for e in new)[len(new) // 2]
            if abs(ratio - 1) <= _CLOSE:
                return state, {s.items: e for s, e in zip(probes, new, strict=True)}
            seen += trials(state, new)
            state = replace(state, costs=corrected(first, seen))
            if time.monotonic() - started > _CORRECTING * ctx.clock.limit_s:
                break
        return state, {}

    def _solved(self, state: State, ctx: Context, problem: Problem, k: int) -> list[Solution]:
        try:
            return self._solve(problem, ctx, k)
        except BudgetError as error:
            raise self._nearest(state, ctx, problem) from error

    def _key(self, state: State, ctx: Context) -> str:
        assert state.costs is not None and state.scores is not None
        config = ctx.config
        return digest(
            {
                "version": _VERSION,
                "model": state.model_hash,
                "costs": [asdict(r) for r in state.costs.rows],
                "teacher_ms": [state.costs.teacher_ms, state.costs.reference_ms],
                "between": [state.costs.glue_ms, state.costs.scale, state.costs.transitions],
                "fetching": [asdict(state.costs.fetching), asdict(state.costs.correction)],
                "scores": [asdict(s) for s in state.scores],
                "options": [
                    [asdict(b) if b else None for b in (config.budget, *config.caps)],
                    config.max_drop,
                    config.effort,
                    config.seed,
                    ctx.from_table,  # students that nobody timed are no answer to those who can
                ],
            }
        )

    @staticmethod
    def _restore(state: State, stored: Mapping[str, Any]) -> State:
        assert state.costs is not None
        evaluated = tuple(Evaluated(**{**e, "plan": _plan(e["plan"])}) for e in stored["evaluated"])
        correction, fetching = Correction(**stored["correction"]), Fetching(**stored["fetching"])
        costs = replace(state.costs, correction=correction, fetching=fetching)
        return replace(state, plan=_plan(stored["plan"]), evaluated=evaluated, costs=costs)

    @staticmethod
    def _exact(state: State, ctx: Context) -> Plan:
        """Without data: of each region's exact forms the fastest, where it is clearly faster than the teacher's own."""
        assert state.costs is not None and state.match is not None and state.weights is not None
        costs, specs = state.costs.by_key(), specs_of(state)
        choices = []
        for r in (r for r in state.match.regions if len(r.atoms) == 1):
            own = costs[r.name, "teacher", ctx.base]
            equal = [c for name, c in state.weights if name == r.name and is_exact(specs[c])]
            offers = [costs[r.name, c, ctx.base] for c in equal]
            best = min(offers, key=state.costs.marginal_ms, default=own)
            if state.costs.marginal_ms(best) > _CLEARLY * state.costs.marginal_ms(own):
                best = own
            new, old = (inside_ms(state.costs, o.candidate, ctx.base, o.latency_ms) for o in (best, own))
            choices.append(Choice(r.name, r.kind, best.candidate, ctx.base, 0.0, new, old))
        saved = sum(c.teacher_cost_ms - c.cost_ms for c in choices)
        fetching = state.costs.fetching
        plan = Plan(tuple(choices), 0.0, 0.0, 0.0)
        before, after = teachers_footprint(state.match, state.costs), footprint(state.match, state.costs, plan)
        less = fetching.ms(fetching.load_mb(*before)) - fetching.ms(fetching.load_mb(*after))
        saved += state.costs.correction.fetching * less
        budget = wanted_ms(state.costs, ctx) if ctx.config.budget else state.costs.teacher_ms
        method = {"method": "exact rewrites only (no --data)"}
        return Plan(tuple(choices), state.costs.teacher_ms - saved, budget, 0.0, method)

    @staticmethod
    def _budget(state: State, ctx: Context) -> float:
        assert state.costs is not None
        return state.costs.teacher_ms if ctx.config.max_drop is not None else wanted_ms(state.costs, ctx)

    @staticmethod
    def _aim(state: State, budget: float, bounds: Sequence[Allowance]) -> float:
        """What to plan for: a little below the budget, unless nothing reaches that; what is nearest to it where that
        is above it by no more than measuring can be wrong."""
        assert state.costs is not None
        problem = make_problem(state, budget, bounds)
        least = 1.001 * reachable(problem)[0]
        if budget >= state.costs.teacher_ms and not bounds:
            # the teacher itself fits, whatever the corrected table says
            return max(budget, least, 1.001 * teachers_cost(problem))
        return max(_AIM * budget, least) if least <= _DOUBT * budget else budget

    @staticmethod
    def _solve(problem: Problem, ctx: Context, k: int) -> list[Solution]:
        limit = min(_SOLVER_S * k / 6, 0.08 * ctx.clock.limit_s)
        if ctx.config.max_drop is not None:
            # the accuracy-constrained mode: one solution each at a ladder of allowed losses
            top = solve(replace(problem, budget=reachable(problem)[0] * 1.001), gap=_GAP).score
            ladder = [top * 2.0**-i for i in range(k)]
            return _unique([solve_for_score(problem, s, gap=_GAP, time_limit=limit / k) for s in ladder])
        return solve_diverse(problem, k, gap=_GAP, time_limit=limit)

    def _nearest(self, state: State, ctx: Context, problem: Problem) -> BudgetError:
        """The answer to a budget that is too small: what the fastest student takes, measured."""
        assert state.costs is not None
        fastest = solve(replace(problem, budget=1.001 * reachable(problem)[0]), gap=_GAP)
        found = measure_students(state, ctx, problem, [fastest])[0]
        teacher_ms, pace = state.costs.reference_ms, state.costs.pace
        ms = max(found.measured_ms, found.plan.predicted_latency_ms)
        share = math.ceil(100 * _MARGIN * ms / _AIM / teacher_ms) / 100
        return BudgetError(
            f"the budget of {pace * problem.budget:.3f} ms ({problem.budget / teacher_ms:.3f} of the teacher's "
            f"{pace * teacher_ms:.3f} ms) cannot be met; the fastest student takes {pace * ms:.3f} ms",
            nearest=share,
            where="--budget",
            hint=f"--budget {min(share, 1.0):g}, or --effort thorough for more candidates",
        )

    def _explore(self, state: State, ctx: Context, budget: float, bounds: Sequence[Allowance]) -> list[Evaluated]:
        """More selections, proposed by what whole students turned out to lose; the best few timed and judged."""
        assert ctx.data is not None
        problem = make_problem(state, self._aim(state, budget, bounds), bounds)
        bench = Bench(state, ctx, ctx.data)
        with ctx.reporter.bar("searching among whole students", ctx.effort.explored) as bar:
            trials = explore(
                problem,
                lambda s: bench.loss([problem.items[i] for i in s.items]),
                rounds=ctx.effort.explored,
                seconds=ctx.effort.explore_share * ctx.clock.limit_s,
                seed=ctx.config.seed,
                progress=bar.advance,
            )
        ctx.reporter.event("explore", losses=[t.loss for t in trials])
        best = [t.solution for t in trials[:_FINALISTS]]
        return self._judge(state, ctx, measure_students(state, ctx, problem, best))

    def _judge(self, state: State, ctx: Context, evaluated: Sequence[Evaluated]) -> list[Evaluated]:
        """Divergence and accuracy of every student on the search split, rounded as it will run."""
        assert state.network is not None and ctx.data is not None
        network, data = state.network, ctx.data
        kind = output_kind(network, example_inputs(network.meta["info"], 2)[0], data.num_classes)
        judge = Judge(network, data.search, kind, limit=ctx.effort.score_images, blend=True)
        judged = []
        with ctx.reporter.bar(f"evaluating {len(evaluated)} students", len(evaluated)) as bar:
            for e in evaluated:
                blueprint = Blueprint.of(e.plan.choices)
                student = build_student(state, blueprint, specs_of(state))
                view = rounded_view(student, blueprint, ctx.quant)
                n = min(64, len(data.train))
                with observing(view, n), torch.no_grad():
                    view(fast_layout(data.train.batch(list(range(n)))[0]))
                found = judge(view)
                accuracy = 100 * found["agreement"] if math.isnan(found["accuracy"]) else found["accuracy"]
                judged.append(replace(e, loss=found["kl"], accuracy=accuracy))
                bar.advance()
        return judged

    @staticmethod
    def _best(evaluated: Sequence[Evaluated], budget: float, ctx: Context) -> Evaluated:
        if ctx.config.max_drop is not None:
            # fine-tuning wins most of an untuned student's loss back: allow five times the drop before it
            top = max(e.accuracy or 0.0 for e in evaluated)
            fine = [e for e in evaluated if (e.accuracy or 0.0) >= top - 5 * ctx.config.max_drop]
            return min(fine, key=lambda e: e.measured_ms)
        fits = [e for e in evaluated if e.measured_ms <= budget]
        if not fits:  # the fastest is the nearest to it
            return min(evaluated, key=lambda e: e.measured_ms)
        return min(fits, key=lambda e: e.loss if e.loss is not None and math.isfinite(e.loss) else math.inf)


def _unique(solutions: Sequence[Solution]) -> list[Solution]:
    return list({s.items: s for s in solutions}.values())


def _plan(stored: Mapping[str, Any]) -> Plan:
    return Plan(**{**stored, "choices": tuple(Choice(**c) for c in stored["choices"])})
