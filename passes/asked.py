"""Regions that the user asks for by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import fx

from hantc.core.errors import UsageError

Ends = tuple[str, str]


def asked_for(texts: Sequence[str], module: fx.GraphModule, chain: Sequence[Ends]) -> list[tuple[int, int]]:
    """Where in `chain`, the (entry, exit) of each element of the main line, the regions "FROM:TO" begin and end, in
    order, the end exclusive.

    FROM is the node whose value the region reads, TO the one whose value it gives; both as `hantc regions --json`
    names them, or as the file names its nodes. UsageError where a name is unknown, where not every path from input to
    output passes it, where TO does not come after FROM, or two regions overlap.
    """
    names = {str(n.meta["onnx_name"]): n.name for n in module.graph.nodes if n.meta.get("onnx_name")}
    names |= {n.name: n.name for n in module.graph.nodes}
    begins = {entry: i for i, (entry, _) in enumerate(chain)}
    ends = {exit_: i + 1 for i, (_, exit_) in enumerate(chain)}
    found: list[tuple[int, int]] = []
    for text in texts:
        parts = text.split(":")
        if len(parts) < 2:
            raise UsageError("is not FROM:TO", where=f"--region {text}", hint="hantc regions --json names the nodes")
        cuts = [(":".join(parts[:k]), ":".join(parts[k:])) for k in range(1, len(parts))]  # names may hold colons
        first, last = next((c for c in cuts if c[0] in names and c[1] in names), cuts[0])
        begin = _place(first, names, begins, text)
        end = _place(last, names, ends, text)
        if begin >= end:
            raise UsageError(f"{last!r} does not come after {first!r}", where=f"--region {text}")
        if any(begin < e and b < end for b, e in found):
            raise UsageError("overlaps with another --region", where=f"--region {text}")
        found.append((begin, end))
    return sorted(found)


def _place(name: str, names: dict[str, str], places: dict[str, int], text: str) -> int:
    where = f"--region {text}"
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"near: {', '.join(near)}" if near else "hantc regions --json names the nodes"
        raise UsageError(f"the network has no node {name!r}", where=where, hint=hint)
    if names[name] not in places:
        nearest = [n for n in places if n in names][:8]
        raise UsageError(
            f"not every path from input to output passes {name!r}, so that no region can end there",
            where=where,
            hint=f"every path passes {', '.join(nearest)}, ...",
        )
    return places[names[name]]
