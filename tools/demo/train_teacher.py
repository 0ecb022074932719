"""Trains the demo's teacher, an EfficientNet-style digit classifier, and exports it to ONNX.

    python tools/demo/train_teacher.py                 # 5 to 15 minutes on two cores

Writes `tools/demo/digits_efficientnet.onnx` and its `.preprocess.json`. Both are committed, so the demo
itself does not train: run this only to change the teacher. Needs the `demo` extra (scikit-learn, onnxscript).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from data import SIDE, make_digits
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
MEAN, STD = 0.2, 0.3  # brings pixels to about -0.7 … 2.7; part of the trained network, see the .preprocess.json

# expansion, channels, blocks, stride of the first block, kernel: EfficientNet-B0's proportions, cut to 64×64
STAGES = (
    (6, 32, 2, 1, 3),
    (6, 40, 3, 2, 5),
    (6, 64, 3, 2, 3),
    (6, 112, 2, 2, 5),
    (6, 128, 1, 1, 3),
)
STEM, HEAD = 24, 256


class SqueezeExcite(nn.Module):
    """Channel attention: global mean, two 1×1 convolutions, sigmoid gate."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        out: Tensor = x * gate.sigmoid()
        return out


def conv_bn(c_in: int, c_out: int, k: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, padded to keep the resolution, and batch norm."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out, momentum=0.05)
    )


class InvertedResidual(nn.Module):
    """MBConv: expand, depthwise, squeeze-and-excite, project; skip connection where shapes match."""

    def __init__(self, c_in: int, c_out: int, expansion: int, k: int, stride: int) -> None:
        super().__init__()
        mid = c_in * expansion
        self.skip = stride == 1 and c_in == c_out
        self.expand = conv_bn(c_in, mid, 1)
        self.depthwise = conv_bn(mid, mid, k, stride, groups=mid)
        self.se = SqueezeExcite(mid, max(4, c_in // 4))
        self.project = conv_bn(mid, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H/stride, W/stride)."""
        y = F.silu(self.expand(x))
        y = F.silu(self.depthwise(y))
        out: Tensor = self.project(self.se(y))
        return x + out if self.skip else out


class DigitsEfficientNet(nn.Module):
    """(B, 1, 64, 64) float32 → (B, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, STEM, 3, 2)
        blocks = []
        channels = STEM
        for expansion, width, count, stride, k in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(channels, width, expansion, k, stride if i == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(channels, HEAD, 1)
        self.classifier = nn.Linear(HEAD, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = F.silu(self.head(self.blocks(F.silu(self.stem(x)))))
        logits: Tensor = self.classifier(F.dropout(x.mean((2, 3)), 0.2, self.training))
        return logits


def to_input(images: Tensor) -> Tensor:
    """uint8 NHWC → normalised float32 NCHW, as `digits_efficientnet.preprocess.json` says."""
    return (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate by up to 12°, scale by up to 12 %, shift by up to 5 pixels; every image its own."""
    n = len(x)
    angle, scale, dx, dy = (torch.rand(4, n, generator=rng) * 2 - 1) * torch.tensor(
        [[math.radians(12)], [0.12], [10 / SIDE], [10 / SIDE]]
    )
    cos, sin = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def batches(n: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Shuffled index batches of exactly `size`; the remainder waits for the next epoch."""
    order = torch.randperm(n, generator=rng)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    with torch.no_grad():
        right: Tensor = model(x).argmax(1) == y
        return 100 * right.float().mean().item()


def train(epochs: int, seed: int, batch: int = 64, lr: float = 3e-3) -> tuple[DigitsEfficientNet, float]:
    """Train from scratch with AdamW, a warm-up and a cosine; returns the last weights and their accuracy.

    The weights are the last epoch's, never the best on validation: the figure stays honest.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    data = {name: torch.from_numpy(array) for name, array in make_digits().items()}
    x, x_val = to_input(data["x"]), to_input(data["x_val"])
    model = DigitsEfficientNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    start = time.time()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for index in batches(len(x), batch, rng):
            images = augment(x[index], rng).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), data["y"][index], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        top1 = accuracy(model, x_val, data["y_val"])
        loss_mean = total / (len(x) // batch)
        print(
            f"epoch {epoch + 1}/{epochs} loss {loss_mean:.3f} val {top1:.1f} % {time.time() - start:.0f} s", flush=True
        )
    return model.eval(), top1


def strip_metadata(path: Path) -> None:
    """Drop the exporter's notes on nodes and values: source lines and paths of this machine."""
    proto = onnx.load(path)
    graph = proto.graph
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        item.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("doc_string")
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def export(model: nn.Module, path: Path) -> None:
    """Write one self-contained ONNX file with a dynamic batch, and the preprocessing file beside it."""
    torch.onnx.export(
        model.to(memory_format=torch.contiguous_format).eval(),  # type: ignore[call-overload]
        (torch.zeros(2, 1, SIDE, SIDE),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=18,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    strip_metadata(path)
    preprocess = {
        "layout": "NCHW",
        "color": "GRAY",
        "resize": SIDE,
        "interpolation": "bicubic",
        "crop": None,
        "scale": 1 / 255,
        "mean": [MEAN],
        "std": [STD],
    }
    path.with_suffix(".preprocess.json").write_text(json.dumps(preprocess, indent=2) + "\n")


def main() -> None:
    """Command line: train, check the accuracy, export."""
    parser = argparse.ArgumentParser(description="Train and export the demo's teacher.")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "digits_efficientnet.onnx")
    args = parser.parse_args()
    model, top1 = train(args.epochs, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"validation {top1:.1f} %, {parameters / 1e6:.2f} M parameters")
    if top1 < 98.8:
        raise SystemExit("the teacher is below 98.8 %: not exported")
    export(model, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
