"""What a torch module is after its export: the same layers, with the same weights."""

from __future__ import annotations

import torch
from torch import nn

from hantc.dialect.conv import Conv
from hantc.dialect.emitter import opaque_leaves
from hantc.dialect.graph import leaf_of
from hantc.dialect.importer import import_model
from hantc.dialect.norm import BatchNorm
from hantc.dialect.torch_export import export_module


def test_norms_and_weights_stay() -> None:
    """An exporter that folds norms changes the weights of the convolutions before them."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    module(torch.randn(16, 3, 12, 12))  # statistics of its own
    network = import_model(export_module(module, torch.randn(1, 3, 12, 12)))
    assert module.training  # the mode is given back
    assert not opaque_leaves(network)
    leaves = [leaf_of(network, n) for n in network.graph.nodes]
    norms = [m for m in leaves if isinstance(m, BatchNorm)]
    convs = [m for m in leaves if isinstance(m, Conv)]
    own = module.state_dict()
    for made, i in zip(norms, (1, 4), strict=True):
        assert torch.equal(made.running_var, own[f"{i}.running_var"])
        assert torch.equal(made.running_mean, own[f"{i}.running_mean"])
        assert torch.equal(made.weight, own[f"{i}.weight"])
    for conv, i in zip(convs, (0, 3), strict=True):
        assert torch.equal(conv.weight, own[f"{i}.weight"])
    x = torch.randn(5, 3, 12, 12)  # any batch
    assert torch.allclose(network(x), module.eval()(x), atol=1e-5)
