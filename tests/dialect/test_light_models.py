"""Real topologies: the models that come with the onnx package, whose weights are one number each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from hantc.dialect.importer import load_onnx
from hantc.dialect.rewrites.normalize import normalize
from hantc.passes.match import match_regions

if TYPE_CHECKING:
    from tests.dialect.conftest import Models

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_LARGE = {"bvlc_alexnet", "vgg19", "zfnet512"}  # hundreds of MB once their weights are made
_KINDS = {
    "densenet121": {"stem", "dense_layer", "dense_block", "plain_conv"},
    "inception_v1": {"stem", "plain_conv"},
    "inception_v2": {"stem", "plain_conv"},
    "resnet50": {"stem", "residual", "span"},
    "shufflenet": {"stem", "inverted_residual", "span"},
    "squeezenet": {"stem", "plain_conv"},
    "bvlc_alexnet": {"stem", "plain_conv"},
    "vgg19": {"stem", "plain_conv"},
    "zfnet512": {"stem", "plain_conv"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _LARGE else n for n in sorted(_KINDS)]
)
def test_round_trip_and_regions(models: Models, name: str) -> None:
    trip = models.trip(load_onnx(_FOLDER / f"light_{name}.onnx"), batch=1)
    assert not trip.opaque
    kinds = {r.kind for r in match_regions(normalize(trip.module)[0]).regions}
    assert _KINDS[name] <= kinds, kinds


def test_all_of_them() -> None:
    assert {f"light_{n}.onnx" for n in _KINDS} == {f.name for f in _FOLDER.glob("*.onnx")}
