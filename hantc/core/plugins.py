"""What installed packages add, by entry points."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

from hantc.core.errors import HantcError


def load_point(point: EntryPoint, what: str, make: Callable[[Any], object] = lambda found: found) -> Any:
    """What `make` makes of the object that `point` names. HantcError, in which `what` says what it should have been,
    if it does not load: leaving it out silently would change results."""
    try:
        return make(point.load())
    except Exception as e:  # a third party's code may raise anything
        raise HantcError(
            f"the {what} {point.name!r} ({point.value}) does not load: {e}", hint="reinstall or remove its package"
        ) from e
