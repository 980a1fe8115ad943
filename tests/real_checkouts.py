"""Our backbone and our exports in the real code of others: features equal, a step of training, and both timed. No test: it needs checkouts.

    python tests/real_checkouts.py transreid=CHECKOUT transreid-ssl=CHECKOUT cluster-contrast=CHECKOUT fast-reid=CHECKOUT torchreid=CHECKOUT

A checkout is copied, and the line that docs/backbone.md names is changed in the copy. Both build their whole model by their own functions with the
same exported file; ours then takes all weights of theirs (by the same names), and the features of both in evaluation are compared. Then each takes
steps with that code's own loss and optimiser. CUDA calls do nothing on a machine without it. Prints a table; --json FILE writes it too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

# A program's own folder is on the path, the root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._measure import write_result
from personmae.interop.checkout_child import use_checkout
from personmae.interop.checkouts import CHECKABLE, checkout_root
from personmae.interop.exports import export_state, write_export
from personmae.interop.initial_weights import load_state
from personmae.models.vit import VisionTransformer, initialise
from personmae.models.weights import save_encoder
from personmae.models.zoo import ENCODERS

NUM_PEOPLE, EACH, NUM_STEPS, NUM_TIMED = 4, 2, 4, 5
SIZE = (256, 128)
# (file, line, what takes its place)
CHANGES = {
    "transreid": (
        "model/make_model.py",
        "from .backbones.vit_pytorch import",
        "from personmae.interop.transreid import",
    ),
    "transreid-ssl": (
        "model/make_model.py",
        "from .backbones.vit_pytorch import",
        "from personmae.interop.transreid_ssl import",
    ),
    "cluster-contrast": (
        "clustercontrast/models/__init__.py",
        "from .vision_transformer import *",
        "from personmae.interop.cluster_contrast import vit_small, vit_base",
    ),
}
CASES = {
    "transreid": [("vit-small", {"JPM": False}), ("vit-base", {"JPM": True})],
    "transreid-ssl": [("vit-small", {"JPM": False}), ("vit-small", {"JPM": True})],
    "cluster-contrast": [("vit-small", {})],
    "fast-reid": [("vit-base", {})],
    "torchreid": [("vit-small", {})],
}


class Task:
    """What a code base's model is asked: `model`, features in evaluation, and a step that returns the loss."""

    def __init__(self, model, evaluate, step):
        self.model, self.evaluate, self.step = model, evaluate, step


def batch():
    generator = torch.Generator().manual_seed(0)
    people = torch.arange(NUM_PEOPLE).repeat_interleave(EACH)
    return torch.randn(NUM_PEOPLE * EACH, 3, *SIZE, generator=generator), people, torch.arange(NUM_PEOPLE * EACH) % 4


def build_transreid(request):
    from config import cfg
    from loss import make_loss
    from model import make_model
    from solver import make_optimizer

    ssl = request["target"] == "transreid-ssl"
    small = "vit_small" if ssl else "deit_small"
    settings = {
        "MODEL.NAME": "transformer",
        "MODEL.PRETRAIN_CHOICE": "imagenet",
        "MODEL.PRETRAIN_PATH": request["file"],
        "MODEL.TRANSFORMER_TYPE": f"{small if request['encoder'] == 'vit-small' else 'vit_base'}_patch16_224_TransReID",
        "MODEL.STRIDE_SIZE": [12, 12],
        "MODEL.SIE_CAMERA": True,
        "MODEL.SIE_COE": 3.0,
        "MODEL.JPM": request["options"]["JPM"],
        "MODEL.RE_ARRANGE": True,
        "MODEL.METRIC_LOSS_TYPE": "triplet",
        "MODEL.NO_MARGIN": True,
        "MODEL.IF_LABELSMOOTH": "off",
        "MODEL.DROP_PATH": 0.0,
        "DATALOADER.SAMPLER": "softmax_triplet",
        "INPUT.SIZE_TRAIN": list(SIZE),
        "SOLVER.OPTIMIZER_NAME": "SGD",
        "SOLVER.BASE_LR": 0.0004 if ssl else 0.008,
        "TEST.NECK_FEAT": "before",
    }
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    model = make_model(cfg, num_class=NUM_PEOPLE, camera_num=4, view_num=1)
    loss_function, center = make_loss(cfg, num_classes=NUM_PEOPLE)
    optimiser, _ = make_optimizer(cfg, model, center)
    images, people, cameras = batch()

    def step():
        score, feature = model(images, people, cam_label=cameras, view_label=torch.zeros_like(cameras))
        loss = loss_function(score, feature, people, cameras)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    return Task(model, lambda: model(images, cam_label=cameras, view_label=torch.zeros_like(cameras)), step)


def build_cluster_contrast(request):
    models = importlib.import_module("clustercontrast.models")
    memory_class = importlib.import_module("clustercontrast.models.cm").ClusterMemory
    name = request["encoder"].replace("-", "_")
    model = models.create(name, img_size=SIZE, drop_path_rate=0.0, pretrained_path=request["file"], hw_ratio=2, conv_stem=False)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.00035, momentum=0.9, weight_decay=5e-4)
    images, people, _ = batch()
    memory = memory_class(model.num_features, NUM_PEOPLE, temp=0.05, momentum=0.2, use_hard=True)
    memory.features = nn.functional.normalize(torch.randn(NUM_PEOPLE, model.num_features, generator=torch.Generator().manual_seed(1)), dim=1)

    def step():
        loss = memory(model(images), people)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.item()

    return Task(model, lambda: model(images), step)


def build_fast_reid(request):
    get_cfg = importlib.import_module("fastreid.config").get_cfg
    build_model = importlib.import_module("fastreid.modeling").build_model
    build_optimizer = importlib.import_module("fastreid.solver").build_optimizer
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(request["root"]) / "configs/Market1501/bagtricks_vit.yml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.HEADS.NUM_CLASSES = NUM_PEOPLE
    cfg.MODEL.BACKBONE.PRETRAIN_PATH = request["file"]
    cfg.MODEL.BACKBONE.DROP_PATH_RATIO = 0.0
    if request["ours"]:
        from personmae.interop.fast_reid import register

        register()
        cfg.MODEL.BACKBONE.NAME = "build_personmae_backbone"
    model = build_model(cfg)
    optimiser = build_optimizer(cfg, model)
    optimiser = optimiser[0] if isinstance(optimiser, tuple) else optimiser
    images, people, cameras = batch()

    def inputs():
        # Its model normalises the images in place.
        return {"images": (images.clone() * 50 + 127).clamp(0, 255), "targets": people, "camids": cameras}

    storage = importlib.import_module("fastreid.utils.events").EventStorage

    def step():
        with storage(0):
            loss = sum(model(inputs()).values())
        # Its buffers of gradients must stay where they are.
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        optimiser.step()
        return loss.item()

    return Task(model, lambda: model(inputs()), step)


def build_torchreid(request):
    torchreid = importlib.import_module("torchreid")
    if request["ours"]:
        from personmae.interop.torchreid import register

        register(SIZE, 16)
        model = torchreid.models.build_model("personmae_vit_small", num_classes=NUM_PEOPLE, loss="triplet", pretrained=False, use_gpu=False)
        torchreid.utils.load_pretrained_weights(model, request["file"])
    else:
        model = _TimmInTorchreid(request)
    optimiser = torchreid.optim.build_optimizer(model, optim="amsgrad", lr=0.00003)
    manager = types.SimpleNamespace(num_train_pids=NUM_PEOPLE, train_loader=None, test_loader=None)
    engine = torchreid.engine.ImageTripletEngine(manager, model, optimiser, use_gpu=False)
    images, people, _ = batch()
    return Task(model, lambda: model(images), lambda: engine.forward_backward({"img": images, "pid": people})["loss_x"])


class _TimmInTorchreid(nn.Module):
    """torchreid has no ViT: timm's, with a classifier."""

    def __init__(self, request):
        super().__init__()
        import timm

        vit = timm.create_model("vit_small_patch16_224", img_size=SIZE, num_classes=0, checkpoint_path=request["file"])
        for name, child in [*vit.named_children()]:
            self.add_module(name, child)
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.vit = [vit]
        self.classifier = nn.Linear(384, NUM_PEOPLE)

    def forward(self, x):
        feature = self.vit[0](x)
        return (self.classifier(feature), feature) if self.training else feature


BUILDERS = {
    "transreid": build_transreid,
    "transreid-ssl": build_transreid,
    "cluster-contrast": build_cluster_contrast,
    "fast-reid": build_fast_reid,
    "torchreid": build_torchreid,
}


def child(request):
    """Build, take or leave the whole state, evaluate, step, time; results go into the request's file."""
    if not torch.cuda.is_available():
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self
    use_checkout(request["root"])
    torch.manual_seed(0)
    task = BUILDERS[request["target"]](request)
    state = Path(request["state"])
    if request["ours"]:
        # theirs has a classifier that nothing uses
        found = task.model.load_state_dict(torch.load(state, weights_only=True), strict=False)
        assert not found.missing_keys, found.missing_keys
        assert all(".fc." in key or key.startswith("fc.") for key in found.unexpected_keys), found.unexpected_keys
    else:
        torch.save(task.model.state_dict(), state)
    task.model.eval()
    with torch.no_grad():
        features = task.evaluate().float().numpy()
        task.evaluate()
        seconds = [_timed(task.evaluate) for _ in range(NUM_TIMED)]
    task.model.train()
    losses = [task.step() for _ in range(NUM_STEPS)]
    steps = [_timed(task.step) for _ in range(NUM_TIMED)]
    np.save(request["features"], features)
    Path(request["result"]).write_text(json.dumps({"losses": losses, "inference": seconds, "training": steps}))


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def changed_copy(target, root, folder):
    """The checkout with its line changed; the checkout itself where nothing is."""
    if target not in CHANGES:
        return root
    copied = folder / "changed"
    shutil.copytree(root, copied, ignore=shutil.ignore_patterns(".git", "*.pth", "*.pkl"))
    name, line, instead = CHANGES[target]
    text = (copied / name).read_text()
    assert text.count(line) == 1, f"{name} has no line {line}"
    (copied / name).write_text(text.replace(line, instead))
    return copied


def compare(target, repo, encoder, options):
    """One row of the table."""
    root = checkout_root(target, repo)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = VisionTransformer(ENCODERS[encoder])
        initialise(model, torch.Generator().manual_seed(0))
        save_encoder(folder / "encoder.safetensors", model, {})
        stride = 12 if target.startswith("transreid") else 16
        state = load_state(folder / "encoder.safetensors", image_size=SIZE, stride_px=stride)
        write_export(folder / "weights.pth", export_state(state, target))
        found = {}
        for kind, place in (("theirs", root), ("ours", changed_copy(target, root, folder))):
            request = {
                "target": target,
                "root": str(place),
                "file": str(folder / "weights.pth"),
                "encoder": encoder,
                "options": options,
                "ours": kind == "ours",
                "state": str(folder / "state.pth"),
                "features": str(folder / f"{kind}.npy"),
                "result": str(folder / f"{kind}.json"),
            }
            done = subprocess.run([sys.executable, __file__, "--child", json.dumps(request)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{target}, {kind}:\n{(done.stdout + done.stderr)[-3000:]}")
            found[kind] = json.loads((folder / f"{kind}.json").read_text()) | {"features": np.load(folder / f"{kind}.npy")}
    theirs, ours = found["theirs"], found["ours"]
    return {
        "target": target,
        "encoder": encoder,
        "options": options,
        "features": list(theirs["features"].shape),
        "difference": float(np.abs(theirs["features"] - ours["features"]).max()),
        "losses_theirs": theirs["losses"],
        "losses_ours": ours["losses"],
        "inference_ratio": [float(a / b) for a, b in zip(sorted(theirs["inference"]), sorted(ours["inference"]), strict=True)],
        "training_ratio": [float(a / b) for a, b in zip(sorted(theirs["training"]), sorted(ours["training"]), strict=True)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", metavar="TARGET=CHECKOUT", help=", ".join(name for name in CHECKABLE if name in CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(json.loads(arguments.child))
    rows = []
    for text in arguments.checkouts:
        target, _, repo = text.partition("=")
        for encoder, options in CASES[target]:
            row = compare(target, Path(repo), encoder, options)
            rows.append(row)
            middle = NUM_TIMED // 2
            print(
                f"{target:17} {encoder} {options or ''} features {row['features']}, largest difference {row['difference']:.1e}; "
                f"loss {' '.join(f'{loss:.4f}' for loss in row['losses_theirs'])} (theirs), {' '.join(f'{loss:.4f}' for loss in row['losses_ours'])} "
                f"(ours); theirs / ours: inference {row['inference_ratio'][middle]:.2f}, training {row['training_ratio'][middle]:.2f}",
                flush=True,
            )
            assert row["difference"] < 1e-4, row
            assert np.isfinite(row["losses_ours"]).all(), row
    if arguments.json:
        write_result(arguments.json, "real_checkouts", {"size": list(SIZE), "batch_size": NUM_PEOPLE * EACH, "num": NUM_TIMED}, rows)
    return None


if __name__ == "__main__":
    main()
