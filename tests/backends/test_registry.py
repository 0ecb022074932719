"""The registry of backends."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from hantc.backends import registry
from hantc.backends.roofline.backend import RooflineBackend
from hantc.core.backend_api import Backend
from hantc.core.errors import HantcError, UsageError


def test_builtins_load() -> None:
    for name in registry.BUILTIN:
        backend = registry.get_backend(name)
        assert isinstance(backend, Backend) and backend.name == name
    assert set(registry.BUILTIN) <= set(registry.available())


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(UsageError, match="onnxruntime, openvino, roofline"):
        registry.get_backend("tpu")


class Mine(RooflineBackend):
    """A third party's."""

    name = "mine"


def test_third_party_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("broken", "no_such_module_at_all:X", registry.GROUP),
        EntryPoint("notabackend", "builtins:dict", registry.GROUP),
        EntryPoint("mine", "tests.backends.test_registry:Mine", registry.GROUP),
        EntryPoint("alias", registry.BUILTIN["roofline"], registry.GROUP),
        EntryPoint("onnxruntime", "builtins:dict", registry.GROUP),  # must not take over
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    assert registry.get_backend("mine").name == "mine"
    with pytest.raises(HantcError, match="calls itself 'roofline'"):
        registry.get_backend("alias")
    assert registry.get_backend("onnxruntime").name == "onnxruntime"
    with pytest.raises(HantcError, match="does not load"):
        registry.get_backend("broken")
    with pytest.raises(HantcError, match="does not implement"):
        registry.get_backend("notabackend")
    found = registry.available()
    assert not found["broken"].available and "no_such_module" in found["broken"].reason
    assert found["mine"].available
