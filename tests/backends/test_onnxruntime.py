"""ONNX Runtime backend: fingerprint, refusals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hantc.backends import device
from hantc.backends.feeds import random_feeds
from hantc.backends.onnxruntime.backend import OnnxRuntimeBackend
from hantc.core.backend_api import BuildSpec
from hantc.core.errors import HantcError, ModelError
from hantc.core.types import Device, Protocol


def cpuinfo(cores: int, threads: int, flags: str) -> str:
    """Text of /proc/cpuinfo for one socket with hyper-threads."""
    numbers = range(cores * threads)
    blocks = (
        f"processor\t: {n}\nmodel name\t: Test CPU  @ 2GHz\nphysical id\t: 0\n"
        f"core id\t: {n % cores}\nflags\t: {flags}\n"
        for n in numbers
    )
    return "\n".join(blocks)


def test_physical_cores_count_cores_not_threads_and_respect_the_affinity() -> None:
    text = cpuinfo(cores=4, threads=2, flags="avx2")
    assert len(device.parse_cpuinfo(text)) == 8
    for allowed, want in [(range(2), 2), ((1, 5), 1), ((0,), 1)]:
        # the machine that runs the test may itself have a CPU quota of fewer cores
        assert device.physical_cores(text, frozenset(allowed)) in range(1, want + 1)
    no_ids = "processor : 0\n\nprocessor : 1\n"
    assert device.physical_cores(no_ids, frozenset({0})) == 1
    assert device.physical_cores("", frozenset({3})) == 1


@pytest.mark.parametrize(
    ("threads", "allowed", "wanted"),
    [
        (1, range(8), (0,)),
        (2, range(8), (0, 1)),
        (2, (1, 2, 3, 6, 7), (2, 3)),  # the package that has a core for each
        (3, range(8), (0, 1, 2)),  # another package before a core's second thread
        (4, range(8), (0, 1, 2, 3)),
        (5, range(8), (0, 1, 2, 3, 4)),
        (2, (1, 5), (1, 5)),  # one core, both its threads
        (9, (1, 2), (1, 2)),  # what there is
    ],
)
def test_threads_are_pinned_to_cores_of_their_own(
    threads: int, allowed: Sequence[int], wanted: tuple[int, ...]
) -> None:
    """Two packages of two cores with two threads each: 0, 1, 4 and 5 are of the first."""
    places = [(n // 2 % 2, n % 2) for n in range(8)]
    text = "\n".join(f"processor : {n}\nphysical id : {p}\ncore id : {c}\n" for n, (p, c) in enumerate(places))
    assert device.pick_cores(threads, text, frozenset(allowed)) == wanted
    assert device.pick_cores(threads, "", frozenset(allowed)) == tuple(sorted(allowed)[:threads]), "nothing is told"


def test_fingerprint_keeps_the_flags_that_matter() -> None:
    found = device.fingerprint((("onnxruntime", "1"),), cpuinfo(2, 1, "fpu sse2 avx2 avx512f avx512_vnni amx_int8"))
    assert found.flags == ("amx_int8", "avx2", "avx512_vnni", "avx512f")
    assert found.cpu == "Test CPU @ 2GHz"
    assert device.has_vnni(found)
    assert not device.has_vnni(Device("x", ("avx2", "avx512f"), 1, ()))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("avx2 avx512f avx512_vnni", False),
        ("avx2 avx512f avx512_bf16", True),
        ("avx512f avx512_bf16 amx_bf16 amx_tile", False),
    ],
)
def test_training_in_bf16_where_it_was_tried(flags: str, wanted: bool) -> None:
    assert device.trains_in_bf16(cpuinfo(2, 1, flags)) == wanted


def test_capabilities_agree_with_the_flags() -> None:
    caps = OnnxRuntimeBackend().capabilities()
    assert caps.reduce_range == device.needs_reduced_range(caps.device)
    assert any(n.startswith("no VNNI: ") for n in caps.notes) == caps.reduce_range
    assert caps.channel_block == device.channel_block(caps.device)


@pytest.mark.parametrize(
    ("flags", "block"), [(("avx2",), 8), (("avx2", "avx512_vnni", "avx512f"), 16), (("asimddp",), 0), ((), 0)]
)
def test_blocks_are_as_wide_as_registers(flags: tuple[str, ...], block: int) -> None:
    assert device.channel_block(Device("x", flags, 1, ())) == block


def net(dims: list[int | str | None], elem_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = Identity(x) over the given dims."""
    x, y = (helper.make_tensor_value_info(n, elem_type, dims) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_feeds_by_type_and_symbol() -> None:
    assert random_feeds(net(["N", 3]), 4)["x"].shape == (4, 3)
    shared = random_feeds(net(["N", 3, "N"]), 2, seed=1)["x"]
    assert shared.shape == (2, 3, 2)
    ids = random_feeds(net([2, 5], TensorProto.INT64), 1)["x"]
    assert ids.dtype == np.int64 and set(ids.ravel()) <= {0, 1}
    assert random_feeds(net([], TensorProto.BOOL), 1)["x"].dtype == np.bool_
    with pytest.raises(ModelError, match="'H' at axis 2"):
        random_feeds(net(["N", 3, "H", "W"]), 1)
    with pytest.raises(ModelError, match="no test input"):
        random_feeds(net([1], TensorProto.STRING), 1)


def test_dynamic_resolution_runs_but_cannot_be_timed() -> None:
    backend = OnnxRuntimeBackend()
    artefact = backend.build(net(["N", 3, "H", "W"]), BuildSpec())
    x = np.ones((1, 3, 4, 5), dtype=np.float32)
    np.testing.assert_array_equal(backend.run(artefact, {"x": x})[0], x)
    with pytest.raises(ModelError, match=r"cannot be timed.*'H'"):
        backend.measure([artefact], Protocol(1))


def test_threads_must_agree() -> None:
    backend = OnnxRuntimeBackend()
    artefact = backend.build(net([1, 3]), BuildSpec(threads=1))
    with pytest.raises(HantcError, match=r"built for 1 thread\(s\)"):
        backend.measure([artefact], Protocol(threads=2))
