"""All rewrites, in the order in which they run."""

from __future__ import annotations

from hantc.dialect.rewrites.base import Rewrite
from hantc.dialect.rewrites.carry_norm import CarryNorm
from hantc.dialect.rewrites.commute_pool import CommutePool
from hantc.dialect.rewrites.drop_noops import DropNoops
from hantc.dialect.rewrites.drop_requantize import DropRequantize
from hantc.dialect.rewrites.fold_norm import FoldAffine, FoldNorm
from hantc.dialect.rewrites.fold_pad import FoldPad
from hantc.dialect.rewrites.fuse_act import ClipToRelu, FuseHardSwish, FuseSilu
from hantc.dialect.rewrites.global_pool import MakeGlobalPool
from hantc.dialect.rewrites.merge_branches import MergeBranches
from hantc.dialect.rewrites.merge_clips import MergeClips
from hantc.dialect.rewrites.merge_convs import MergeConvs, MergeLinears
from hantc.dialect.rewrites.shortcut_conv import ShortcutConv
from hantc.dialect.rewrites.sink_transpose import SinkTranspose
from hantc.dialect.rewrites.split_sum import SplitSum
from hantc.dialect.rewrites.stride_slice import StrideSlice
from hantc.dialect.rewrites.sum_to_mean import SumToMean

# What clears the way comes first: a no-op between a convolution and its norm would keep them apart.
REWRITES: tuple[Rewrite, ...] = (
    DropNoops(),
    DropRequantize(),
    SplitSum(),
    SinkTranspose(),
    MergeClips(),
    ClipToRelu(),
    FuseSilu(),
    FuseHardSwish(),
    SumToMean(),
    MakeGlobalPool(),
    ShortcutConv(),
    StrideSlice(),
    FoldPad(),
    CarryNorm(),
    FoldNorm(),
    FoldAffine(),
    MergeBranches(),
    MergeConvs(),
    MergeLinears(),
    CommutePool(),
)
