"""What a pass is: `requires` fields of the state, does one thing, `ensures` others.

The state is a frozen dataclass; a pass returns a new one. The pipeline checks both lists, writes the
timings and the graph dumps, so a pass holds only its rules.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeVar

S = TypeVar("S")
C = TypeVar("C", contravariant=True)


class Pass(Protocol[S, C]):
    """One step of the compiler; the class docstring's first line reads `X -> Y`."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    ensures: ClassVar[tuple[str, ...]]

    def call(self, state: S, ctx: C) -> S:
        """Return the state with the ensured fields set."""
        ...
