"""Lambda bottleneck (Bello 2021, arXiv 2102.08602)."""

from __future__ import annotations

from hantc.ops.attention import Lambda
from hantc.ops.bot_trans import HEADS, BotTrans
from hantc.ops.family import PAPER
from hantc.ops.layers import Layer


class LambdaLayer(BotTrans):
    """The bottleneck transformer with a lambda layer of four heads in the place of self-attention."""

    name = "lambda"
    source = f"{PAPER}, operation pool, lambda layer (arXiv 2102.08602)"

    def mixer(self, channels: int, size: tuple[int, int]) -> Layer:
        """The lambda layer."""
        return Lambda(channels, size, HEADS)
