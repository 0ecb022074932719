"""timm's families through the front door: is the import equal, what can be replaced, does replacing work.

    /path/to/venv/bin/python tools/bench/timm_coverage.py [FAMILY=MODEL ...] [--json FILE]

Needs timm, with the torchvision that fits torch (`pip install timm` beside PyPI's CUDA build of torch), and hantc's
own requirements; random weights do. For each model: exported as `hantc timm:NAME@random` does it, imported, compared
with the module on random images at another batch; regions matched; the share of the convolutions' multiply-accumulates
that lies in some region; and its first large region replaced by a candidate, emitted, and run by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import fx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hantc.core.types import MatchResult, Region, Signature  # noqa: E402
from hantc.dialect.conv import Conv  # noqa: E402
from hantc.dialect.emitter import emit, opaque_leaves  # noqa: E402
from hantc.dialect.examples import example_inputs  # noqa: E402
from hantc.dialect.graph import count_macs, leaf_of, shapes_of  # noqa: E402
from hantc.dialect.importer import import_file  # noqa: E402
from hantc.dialect.rewrites.normalize import normalize  # noqa: E402
from hantc.integrations.zoo import export_named  # noqa: E402
from hantc.ops.registry import build, propose  # noqa: E402
from hantc.passes.match import match_regions  # noqa: E402
from hantc.passes.plug import replace_regions  # noqa: E402

FAMILIES = {
    "resnet": "resnet18",
    "resnet (bottleneck)": "resnet50",
    "wide_resnet": "wide_resnet50_2",
    "resnext": "resnext50_32x4d",
    "resnest": "resnest14d",
    "seresnet": "seresnet50",
    "tresnet": "tresnet_m",
    "ecaresnet": "ecaresnet26t",
    "densenet": "densenet121",
    "vgg": "vgg11_bn",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv3": "mobilenetv3_large_100",
    "mobilenetv4": "mobilenetv4_conv_small",
    "efficientnet": "efficientnet_b0",
    "efficientnet b2": "efficientnet_b2",
    "efficientnet v2": "efficientnetv2_rw_t",
    "efficientnet lite": "efficientnet_lite0",
    "mnasnet": "mnasnet_100",
    "mixnet": "mixnet_s",
    "regnetx": "regnetx_004",
    "regnety": "regnety_004",
    "repvgg": "repvgg_a0",
    "ghostnet": "ghostnet_100",
    "convnext": "convnext_atto",
    "shufflenet-like": "hardcorenas_a",
    "dla": "dla34",
    "dpn": "dpn48b",
    "hrnet": "hrnet_w18_small",
    "inception v3": "inception_v3",
    "inception v4": "inception_v4",
    "xception": "legacy_xception",
    "cspnet": "cspresnet50",
    "vit": "vit_tiny_patch16_224",
    "deit": "deit_tiny_patch16_224",
    "cait": "cait_xxs24_224",
    "pit": "pit_ti_224",
}


def covered(network: fx.GraphModule, found: MatchResult) -> float:
    """Share of the convolutions' multiply-accumulates that lie in the smallest regions."""
    shapes = shapes_of(network, example_inputs(network.meta["info"], 2))
    convs = {n.name for n in network.graph.nodes if isinstance(leaf_of(network, n), Conv)}
    inside = convs & {n for r in found.regions if len(r.atoms) == 1 for n in r.nodes}
    whole = count_macs(network, shapes, convs)
    return count_macs(network, shapes, inside) / whole if whole else math.nan


def replaceable(found: MatchResult) -> tuple[Region, Any] | None:
    """The largest region that a candidate from scratch fits, and one that does."""
    for region in sorted(found.regions, key=lambda r: -r.macs):
        if len(region.atoms) == 1:
            specs = [s for s in propose(Signature.of(region)) if s.family in ("cb_stack", "efn", "conv_cs", "mixer")]
            if specs:
                return region, specs[0]
    return None


def rewritten(network: fx.GraphModule, found: MatchResult) -> str:
    """ "yes" if the network with one region replaced computes in ONNX Runtime what it does in torch."""
    chosen = replaceable(found)
    if chosen is None:
        return "no region for a candidate"
    region, spec = chosen
    torch.manual_seed(0)
    student = replace_regions(network, [(region, build(spec, Signature.of(region)))]).eval()
    inputs = example_inputs(network.meta["info"], 2)
    with torch.no_grad():
        wanted = student(*inputs)
    session = ort.InferenceSession(emit(student).model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})[0]
    return "yes" if close(wanted.numpy(), got) else "differs"


def close(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Equal up to float32's rounding over a deep network of random weights, which magnifies it: ONNX Runtime and torch
    themselves are 6e-4 apart on EfficientNetV2."""
    return bool(np.abs(a - b).max() <= 3e-3 * max(1e-3, float(np.abs(a).max())))


def judge(name: str) -> dict[str, Any]:
    """One model's row; exceptions become its error."""
    import timm  # type: ignore[import-not-found]

    began = time.monotonic()
    try:
        torch.manual_seed(0)
        module = timm.create_model(name, pretrained=False).eval()
        with TemporaryDirectory() as folder:
            network = import_file(export_named(f"timm:{name}@random", Path(folder)))
        shape = network.meta["info"].inputs[0].shape[1:]
        x = torch.randn(3, *shape)
        with torch.no_grad():
            equal = close(module(x).numpy(), network(x).numpy())
        network = normalize(network)[0]
        at = time.monotonic()
        found = match_regions(network)
        return {
            "equal": equal,
            "opaque": sorted({leaf.proto.op_type for _, leaf in opaque_leaves(network)}),
            "regions": found.n_atoms,
            "kinds": sorted({r.kind for r in found.regions}),
            "covered": covered(network, found),
            "rewrite": rewritten(network, found),
            "matching_s": time.monotonic() - at,
            "seconds": time.monotonic() - began,
        }
    except Exception as error:  # the table is to name every failure
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:150], "seconds": time.monotonic() - began}


def main() -> int:
    """Print the table; 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="FAMILY=MODEL")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        import timm  # noqa: F401
    except Exception as error:  # torchvision's import fails in many ways beside a CPU build of torch
        print(f"timm_coverage.py: timm cannot be imported ({error}); --help says what it takes", file=sys.stderr)
        return 0
    warnings.simplefilter("ignore")
    models = dict(m.split("=", 1) for m in options.models) or FAMILIES
    print("| family | model | forward equal | regions | conv MACs in regions | rewrite works |")
    print("|---|---|---|---|---|---|")
    rows, failed = {}, 0
    for family, name in models.items():
        row = rows[name] = judge(name)
        if "error" in row:
            print(f"| {family} | {name} | {row['error']} | | | |", flush=True)
            failed += 1
            continue
        share = "–" if math.isnan(row["covered"]) else f"{100 * row['covered']:.0f} %"
        equal = "yes" if row["equal"] else "no"
        note = f" (ONNX Runtime runs {', '.join(row['opaque'])})" if row["opaque"] else ""
        print(f"| {family} | {name} | {equal}{note} | {row['regions']} | {share} | {row['rewrite']} |", flush=True)
        failed += not row["equal"] or row["rewrite"] != "yes" or row["covered"] < 0.9
    print(f"\n{len(rows)} models, {failed} with a cell that failed")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
