"""timm's models by name, `timm:efficientnet_b0`: exported once to a file, which then takes the usual road.

timm is not a dependency (it imports torchvision, which PyPI has for CUDA builds of torch alone); where it is installed
it is used. The file's preprocessing is written beside it, from timm's own record of how the model was trained.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file
from torch import nn

from hantc.core.atomic import write_bytes, write_json
from hantc.core.errors import HantcError, ModelError, UsageError
from hantc.dialect.torch_export import export_module

PREFIX = "timm:"
_SOURCE = "hantc_source"  # metadata key of an exported file: what it was exported from


@dataclass(frozen=True)
class Wanted:
    """`timm:NAME`, with the weights that timm has for it, `timm:NAME@random`, or `timm:NAME@FILE.safetensors`."""

    name: str
    weights: str = ""

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """UsageError for an empty name, or weights in another form (pickled ones could run anything)."""
        name, _, weights = text.removeprefix(PREFIX).partition("@")
        if not name:
            raise UsageError("names no model", where=text, hint="such as timm:efficientnet_b0")
        if weights not in ("", "random") and not weights.endswith(".safetensors"):
            raise UsageError(
                f"weights {weights!r} are no .safetensors file",
                where=text,
                hint="safetensors.torch.save_file writes one",
            )
        return cls(name, weights)


def export_named(text: str, folder: Path) -> Path:
    """The model that `text` names as `folder`/NAME.onnx, with NAME.preprocess.json beside it; what is there of an
    earlier export of the same is taken. UsageError or ModelError where timm is missing or cannot make it."""
    wanted = Wanted.parse(text)
    stem = wanted.name.replace("/", "_").replace(":", "_")
    path = folder / f"{stem}.onnx"
    beside, source = folder / f"{stem}.preprocess.json", _source(wanted, text)
    if beside.is_file() and _exported_from(path) == source:
        return path
    timm = _timm(text)
    module = _made(timm, wanted, text)
    facts = timm.data.resolve_model_data_config(module)
    proto = export_module(module, torch.zeros(1, *facts["input_size"]))
    proto.metadata_props.add(key=_SOURCE, value=source)
    write_json(beside, preprocessing(facts))
    write_bytes(path, proto.SerializeToString())
    return path


def _source(wanted: Wanted, text: str) -> str:
    """What an export is known by: the name, and the content of a file of weights."""
    if wanted.weights in ("", "random"):
        return text
    try:
        return f"{text} {hashlib.sha256(Path(wanted.weights).read_bytes()).hexdigest()}"
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=text) from error


def preprocessing(facts: dict[str, Any]) -> dict[str, Any]:
    """timm's data configuration in the keys of a preprocess.json."""
    _, height, width = facts["input_size"]
    share = facts["crop_pct"] or 1.0
    squash = facts.get("crop_mode", "center") == "squash"  # the aspect is given up, else the shorter side leads
    whole = [math.floor(height / share), math.floor(width / share)]
    return {
        "layout": "NCHW",
        "color": "RGB",
        "resize": whole if squash else min(whole),
        "interpolation": facts["interpolation"],
        "crop": [height, width],
        "scale": 1 / 255,
        "mean": list(facts["mean"]),
        "std": list(facts["std"]),
    }


def _exported_from(path: Path) -> str:
    """What a file says that it was exported from; "" where there is none, or none whole."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # missing, or cut off: protobuf and onnx raise unrelated types
        return ""
    return next((str(p.value) for p in model.metadata_props if p.key == _SOURCE), "")


def _timm(text: str) -> Any:
    try:
        return importlib.import_module("timm")
    except Exception as error:  # torchvision's import fails in many ways beside a CPU build of torch
        raise UsageError(
            f"timm cannot be imported: {error}",
            where=text,
            hint="pip install timm, with the torchvision that fits your torch; or export the model to an .onnx file",
        ) from error


def _made(timm: Any, wanted: Wanted, text: str) -> nn.Module:
    """The module in evaluation mode, with its weights."""
    if not timm.is_model(wanted.name):
        near = timm.list_models(f"*{wanted.name}*")[:5]
        raise UsageError("timm has no such model", where=text, hint=f"near: {', '.join(near)}" if near else "")
    try:
        if wanted.weights in ("", "random"):
            torch.manual_seed(0)
            module: nn.Module = timm.create_model(wanted.name, pretrained=not wanted.weights)
            return module.eval()
        weights = load_file(wanted.weights)
        head = timm.get_pretrained_cfg_value(wanted.name, "classifier")
        classes = next((v.shape[0] for k, v in weights.items() if k == f"{head}.weight"), None)
        module = timm.create_model(wanted.name, pretrained=False, **({"num_classes": classes} if classes else {}))
        module.load_state_dict(weights)
        return module.eval()
    except HantcError:
        raise
    except Exception as error:  # the network, the hub, a file of another model: all raise types of their own
        raise ModelError(
            f"timm cannot make it: {error}".splitlines()[0],
            where=text,
            hint=f"give weights as {PREFIX}{wanted.name}@FILE.safetensors, or none as {PREFIX}{wanted.name}@random",
        ) from error
