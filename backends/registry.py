"""Finds backends by name: the built-in ones, and third parties' through the entry point group `hantc.backends`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from hantc.core.backend_api import Backend, Capabilities
from hantc.core.errors import HantcError, UsageError
from hantc.core.types import Device

GROUP = "hantc.backends"

# Named here too, not by entry points alone: a source tree that nobody installed has no entry points.
BUILTIN: Mapping[str, str] = MappingProxyType(
    {
        "onnxruntime": "hantc.backends.onnxruntime.backend:OnnxRuntimeBackend",
        "openvino": "hantc.backends.openvino.backend:OpenVinoBackend",
        "roofline": "hantc.backends.roofline.backend:RooflineBackend",
        "tensorrt": "hantc.backends.tensorrt.backend:TensorRTBackend",
    }
)


def names() -> tuple[str, ...]:
    """All known backends' names, the built-in ones first."""
    return tuple(_loaders())


def get_backend(name: str) -> Backend:
    """The backend called `name`. UsageError if there is none, HantcError if a third party's fails to load."""
    loaders = _loaders()
    if name not in loaders:
        raise UsageError(f"unknown backend {name!r}", hint="one of: " + ", ".join(loaders))
    try:
        backend = loaders[name]()
    except Exception as e:  # a third party's code may raise anything
        raise HantcError(f"the backend {name!r} does not load: {e}", hint="reinstall or remove its package") from e
    if not isinstance(backend, Backend):
        raise HantcError(f"the backend {name!r} does not implement hantc.core.backend_api.Backend")
    if backend.name != name:  # runs are verified, and their rows kept, under its own
        raise HantcError(f"the backend {name!r} calls itself {backend.name!r}", hint="its entry point needs that name")
    return backend


def available() -> dict[str, Capabilities]:
    """What every known backend can do here; one that does not load is unavailable, with the reason."""
    found: dict[str, Capabilities] = {}
    for name in names():
        try:
            found[name] = get_backend(name).capabilities()
        except Exception as e:  # a third party's code may raise anything
            found[name] = Capabilities(False, str(e), (), Device("", (), 0, ()), measures=False)
    return found


def _loaders() -> dict[str, Callable[[], Backend]]:
    loaders: dict[str, Callable[[], Backend]] = {}
    for name, target in BUILTIN.items():
        loaders[name] = _builtin(target)
    for point in entry_points(group=GROUP):
        loaders.setdefault(point.name, _external(point))  # built-in names cannot be taken over
    return loaders


def _builtin(target: str) -> Callable[[], Backend]:
    def load() -> Backend:
        module, _, attribute = target.partition(":")
        backend: Backend = getattr(import_module(module), attribute)()
        return backend

    return load


def _external(point: EntryPoint) -> Callable[[], Backend]:
    def load() -> Backend:
        backend: Backend = point.load()()
        return backend

    return load
