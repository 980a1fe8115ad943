"""Stand-ins of other people's ReID code, of timm's blocks: what their networks compute, and what their loaders do with a file.

Written from the contracts, not from their code; `tests/real_checkouts.py` holds the same against real checkouts.
"""

import copy
import functools
import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn


class StandInVit(nn.Module):
    """The ViT that TransReID, its successors and fast-reid share: learned positions, overlapping patches, SIE, and an unused classifier `fc`."""

    def __init__(self, width=384, depth=12, heads=6, image_size=(256, 128), stride=16, cameras=0, views=0, weight=1.0, local=False):
        super().__init__()
        self.cameras, self.views, self.weight, self.local = cameras, views, weight, local
        self.num_y, self.num_x = ((side - 16) // stride + 1 for side in image_size)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 16, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_y * self.num_x, width))
        if max(cameras, 1) * max(views, 1) > 1:
            self.sie_embed = nn.Parameter(torch.randn(max(cameras, 1) * max(views, 1), 1, width))
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x, cam_label=None, view_label=None):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.cameras > 0 and self.views > 0:
            x = x + self.weight * self.sie_embed[cam_label * self.views + view_label]
        elif self.cameras > 0:
            x = x + self.weight * self.sie_embed[cam_label]
        elif self.views > 0:
            x = x + self.weight * self.sie_embed[view_label]
        for block in self.blocks[:-1] if self.local else self.blocks:
            x = block(x)
        return x if self.local else self.norm(x)[:, 0]

    def load_param(self, path, ratio=None):
        """TransReID's rules; with a ratio those of TransReID-SSL. Raises KeyError for a name that the network lacks, as theirs do."""
        content = torch.load(path, map_location="cpu")
        for name in ("model", "state_dict"):
            content = content.get(name, content)
        own = self.state_dict()
        loaded = 0
        for name, value in content.items():
            if "head" in name or "dist" in name:
                continue
            if name == "pos_embed" and value.shape != own[name].shape:
                rows = int(math.sqrt((value.shape[1] - 1) * (ratio or 1)))
                cells = value[0, 1:].reshape(1, rows, rows // (ratio or 1), -1).permute(0, 3, 1, 2)
                cells = F.interpolate(cells, size=(self.num_y, self.num_x), mode="bilinear").flatten(2).transpose(1, 2)
                value = torch.cat([value[:, :1], cells], dim=1)
            own[name].copy_(value)
            loaded += 1
        return loaded


class StandInJigsaw(nn.Module):
    """TransReID with its jigsaw branch: takes the last block and the norm of the backbone, deep copies of both, and calls them plainly."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.b1, self.b2 = (nn.Sequential(copy.deepcopy(base.blocks[-1]), copy.deepcopy(base.norm)) for _ in range(2))

    def forward(self, x, cam_label=None, view_label=None):
        tokens = self.base(x, cam_label=cam_label, view_label=view_label)
        quarter = (tokens.shape[1] - 1) // 4
        parts = [torch.cat([tokens[:, :1], tokens[:, 1 + n * quarter : 1 + (n + 1) * quarter]], dim=1) for n in range(4)]
        return [self.b1(tokens)[:, 0], *(self.b2(part)[:, 0] for part in parts)]


class ClusterContrastStandIn(nn.Module):
    """A backbone with the neck of Cluster Contrast."""

    def __init__(self, base, width=384):
        super().__init__()
        self.base, self.bottleneck = base, nn.BatchNorm1d(width)

    def forward(self, x):
        return F.normalize(self.bottleneck(self.base(x)))
