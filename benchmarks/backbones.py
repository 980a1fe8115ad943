"""Our backbone inside ReID code beside what stands there: images/s in inference and training, with the same weights.

    python benchmarks/backbones.py                                        beside timm's ViT, with attention spelled out and with PyTorch's
    python benchmarks/backbones.py --checkout transreid=CHECKOUT          also beside the class of a checkout: transreid, transreid-ssl or fast-reid

Ours is the module that TransReID gets: normalised float images in, class token out; on a GPU also held to Triton's kernels and to PyTorch's own,
between which it chooses by size (`personmae.models.fusing.FUSED_FROM`). Before anything is timed, the features of all are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import RESULTS, spread, time_calls, write_result
from personmae.interop.checkout_child import BUILDERS, use_checkout
from personmae.interop.checkouts import checkout_root
from personmae.interop.exports import CONTAINER
from personmae.interop.pixel_features import timm_network
from personmae.interop.transreid import TransreidVit
from personmae.models import fusing
from personmae.models.zoo import ENCODERS

TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}  # of the features' norm; theirs and ours sum in another order


class Peer(NamedTuple):
    """A backbone: images [B, 3, H, W] -> features [B, D]."""

    name: str
    model: nn.Module
    fused_from: int | None = None  # ours: elements from which on Triton's kernels run; None for their own choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--encoder", choices=["vit-small", "vit-base"], default="vit-base" if on_gpu else "vit-small")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[64, 256] if on_gpu else [8])
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16" if on_gpu else "fp32", help="by autocast")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--num", type=int, default=20 if on_gpu else 5, help="calls of each kind in a turn, timed together")
    parser.add_argument("--num-turns", type=int, default=5 if on_gpu else 3, help="the backbones take turns")
    parser.add_argument("--checkout", metavar="TARGET=FOLDER")
    parser.add_argument("--output", type=Path, default=RESULTS / "backbones.json")
    options = parser.parse_args()
    rows = compare(options)
    print(f"{'backbone':28} {'batch':>6} {'inference, images/s':34} {'training, images/s':34}")
    for row in rows:
        print(f"{row['backbone']:28} {row['batch_size']:6d} {row['inference']!s:34} {row['training']!s:34}")
    # The checkout's place is the machine's business.
    settings = {**vars(options), "checkout": options.checkout and options.checkout.partition("=")[0]}
    write_result(options.output, "backbones", settings, rows)
    print(f"written to {options.output}")


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each backbone and batch size, after their features were found equal."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    ours = TransreidVit(options.encoder, img_size=options.size, stride_size=options.stride, drop_path_rate=0.0)
    peers = [
        Peer("ours", ours),
        # On a CPU the two are the same operators.
        *([Peer("ours, by Triton", ours, 0), Peer("ours, by PyTorch", ours, 1 << 62)] if device.type == "cuda" else []),
        Peer("timm, attention spelled out", timm_backbone(ours, options.encoder, fused=False)),
        Peer("timm, PyTorch's attention", timm_backbone(ours, options.encoder, fused=True)),
        *([Peer(options.checkout.partition("=")[0], checkout_backbone(options, ours))] if options.checkout else []),
    ]
    for peer in peers:
        peer.model.to(device)
    return [row for batch_size in options.batch_size for row in time_all(peers, torch.randn(batch_size, 3, *options.size, device=device), options)]


def time_all(peers: list[Peer], images: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each backbone with these images."""
    for precision in dict.fromkeys(("fp32", options.precision)):
        check_equal(peers, images, precision)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.num_turns):
        for peer in peers:
            for kind, call in (("inference", inference(peer, images, options.precision)), ("training", training(peer, images, options.precision))):
                # Together: as in use, the host may run ahead of the GPU.
                timed = time_calls(partial(repeat, call, options.num), num=1, num_warm_up=1, device=images.device)
                seconds.setdefault((peer.name, kind), []).append(timed.median / options.num)
    return [
        {"backbone": peer.name, "batch_size": len(images)}
        | {kind: spread([len(images) / value for value in seconds[peer.name, kind]]) for kind in ("inference", "training")}
        for peer in peers
    ]


@contextlib.contextmanager
def held_to(peer: Peer) -> Iterator[None]:
    """Inside, our blocks choose their kernels as the peer has it."""
    before = fusing.FUSED_FROM
    fusing.FUSED_FROM = before if peer.fused_from is None else peer.fused_from
    try:
        yield
    finally:
        fusing.FUSED_FROM = before


def check_equal(peers: list[Peer], images: Tensor, precision: str) -> None:
    """Raises SystemExit if a backbone computes something else than the first."""
    features = [inference(peer, images, precision)().float() for peer in peers]
    for peer, feature in zip(peers, features, strict=True):
        difference = float((feature - features[0]).norm() / features[0].norm())
        if not difference < TOLERANCES[precision]:
            raise SystemExit(f"{peer.name} gives other features than ours in {precision}, by {difference:.1e} of them: there is nothing to compare")


def repeat(call: Callable[[], object], num: int) -> None:
    """So many calls, one after the other."""
    for _ in range(num):
        call()


def inference(peer: Peer, images: Tensor, precision: str) -> Callable[[], Tensor]:
    def call() -> Tensor:
        peer.model.eval()
        with torch.inference_mode(), _autocast(images, precision), held_to(peer):
            return peer.model(images)

    return call


def training(peer: Peer, images: Tensor, precision: str) -> Callable[[], object]:
    def call() -> None:
        peer.model.train()
        peer.model.zero_grad(set_to_none=True)
        with _autocast(images, precision), held_to(peer):
            loss = peer.model(images).square().mean()
        loss.backward()

    return call


def _autocast(images: Tensor, precision: str) -> torch.autocast:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(images.device.type, dtype, enabled=precision != "fp32")


def timm_backbone(ours: TransreidVit, encoder: str, fused: bool) -> nn.Module:
    """timm's network of this size with our weights; fused: PyTorch's attention, else spelled out as in the ReID code bases."""
    vit: Any = timm_network(dataclasses.replace(ENCODERS[encoder], image_size=ours.image_size), ours.stride, ours.state_dict())
    for block in vit.blocks:
        block.attn.fused_attn = fused
    return vit


def checkout_backbone(options: argparse.Namespace, ours: TransreidVit) -> nn.Module:
    """The class of a checkout with our weights."""
    target, _, folder = options.checkout.partition("=")
    if target not in ("transreid", "transreid-ssl", "fast-reid"):
        raise SystemExit(f"--checkout {target}: the ViTs of transreid, transreid-ssl and fast-reid can be timed")
    root = checkout_root(target, Path(folder))
    use_checkout(str(root))
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "weights.pth"
        torch.save({CONTAINER: ours.state_dict()}, file)
        request = {"target": target, "root": str(root), "file": str(file), "image_size": list(options.size), "stride": options.stride}
        return BUILDERS[target](request | {"encoder": options.encoder})


if __name__ == "__main__":
    main()
