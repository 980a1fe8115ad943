"""The code bases that weights are exported to: what each expects of a file, as read in their sources and tried on them.

    transreid          damo-cv/TransReID
    transreid-ssl      damo-cv/TransReID-SSL, transreid_pytorch (and its forks PASS, PersonViT, CION)
    cluster-contrast   the ViT fork of alibaba/cluster-contrast-reid in damo-cv/TransReID-SSL
    fast-reid          JDAI-CV/fast-reid
    torchreid          KaiyangZhou/deep-person-reid
    openunreid         open-mmlab/OpenUnReID
    clip-reid          Syliz517/CLIP-ReID, its baseline
    solider            tinyvision/SOLIDER-REID
    layumi             layumi/Person_reID_baseline_pytorch
    timm               huggingface/pytorch-image-models
    safetensors        whoever reads safetensors; the model card is in its header
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from personmae.interop.initial_weights import Normalisation

TargetName = Literal[
    "transreid",
    "transreid-ssl",
    "cluster-contrast",
    "fast-reid",
    "torchreid",
    "openunreid",
    "clip-reid",
    "solider",
    "layumi",
    "timm",
    "safetensors",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a code base expects of a file of weights."""

    normalisation: Normalisation  # of the pixels that it feeds to the network
    plain_vit: bool = True  # its own network takes the weights of a plain ViT; else only through our module
    strides: bool = True  # its patches may overlap
    positions: Literal["square", "ratio", "none"] = "none"  # what it can resize: square grids, a grid of a told ratio, or nothing
    unwraps: tuple[str, ...] = ()  # containers that it takes the weights out of
    strict_keys: bool = False  # a name that its network lacks ends its program
    skipped: tuple[str, ...] = ()  # what it leaves out: names that contain these
    dropped_prefixes: tuple[str, ...] = ()  # prefixes of names that it takes away itself
    weights_only: bool = True  # torch.load as it calls it refuses anything but tensors and plain values, since torch 2.6; timm allows some
    reads_safetensors: bool = False
    suffix: str = ".pth"
    use: tuple[str, ...] = ()  # how to load: {file}, {size}, {kind}


TIMM = Target(
    normalisation="imagenet",
    positions="square",
    strides=False,
    unwraps=("state_dict_ema", "model_ema", "state_dict", "model"),
    strict_keys=True,
    weights_only=False,
    reads_safetensors=True,
    dropped_prefixes=("module.",),
    use=(
        "timm.create_model('{kind}_patch16_224', img_size=({height}, {width}), num_classes=0, checkpoint_path={file!r})",
        "our layers inside: import personmae, and 'personmae_{kind}_patch16' instead",
    ),
)
TARGETS: dict[TargetName, Target] = {
    "transreid": Target(
        normalisation="half",
        positions="square",
        unwraps=("model", "state_dict"),
        strict_keys=True,
        skipped=("head", "dist"),
        use=(
            "MODEL.PRETRAIN_CHOICE imagenet MODEL.PRETRAIN_PATH {file} MODEL.TRANSFORMER_TYPE {transreid_kind} MODEL.STRIDE_SIZE [{stride},{stride}]",
            "INPUT.SIZE_TRAIN [{height},{width}] INPUT.SIZE_TEST [{height},{width}]",
            "our layers inside: in model/make_model.py import the three factories from personmae.interop.transreid",
        ),
    ),
    "transreid-ssl": Target(
        normalisation="half",
        positions="ratio",
        unwraps=("model", "state_dict", "teacher"),
        strict_keys=True,
        skipped=("head", "dist", "pre_logits"),
        use=(
            "MODEL.PRETRAIN_CHOICE imagenet MODEL.PRETRAIN_PATH {file} MODEL.TRANSFORMER_TYPE {kind}_patch16_224_TransReID "
            "MODEL.STRIDE_SIZE [{stride},{stride}]",
            "INPUT.SIZE_TRAIN [{height},{width}] INPUT.SIZE_TEST [{height},{width}] MODEL.STEM_CONV False",
            "our layers inside: in model/make_model.py import the two factories from personmae.interop.transreid_ssl",
        ),
    ),
    "cluster-contrast": Target(
        normalisation="imagenet",
        positions="ratio",
        unwraps=("model", "state_dict", "teacher"),
        strict_keys=True,
        skipped=("head", "dist", "pre_logits", "fc.", "classifier", "bottleneck"),
        dropped_prefixes=("module.", "base."),
        strides=False,
        use=(
            "examples/cluster_contrast_train_usl.py -a {kind} -pp {file} --height {height} --width {width}",
            "our layers inside: in clustercontrast/models/__init__.py import vit_small and vit_base from personmae.interop.cluster_contrast",
        ),
    ),
    "fast-reid": Target(
        normalisation="half",
        positions="square",
        unwraps=("model", "state_dict"),
        skipped=("head", "dist"),
        use=(
            "its own ViT (base only): MODEL.BACKBONE.NAME build_vit_backbone MODEL.BACKBONE.PRETRAIN_PATH {file}",
            "our layers inside, any size: import personmae.interop.fast_reid before the config is read, MODEL.BACKBONE.NAME build_personmae_backbone",
        ),
    ),
    "torchreid": Target(
        normalisation="imagenet",
        plain_vit=False,
        use=(
            "from personmae.interop.torchreid import register; register(({height}, {width}), {stride})",
            "model = torchreid.models.build_model('personmae_{kind}', num_classes, pretrained=False); load_pretrained_weights(model, {file!r})",
        ),
    ),
    "openunreid": Target(
        normalisation="imagenet",
        plain_vit=False,
        use=(
            "in openunreid/models/backbones/__init__.py: from personmae.interop.openunreid import personmae_{kind}",
            "and below the factory: __factory['personmae_{kind}'] = functools.partial(personmae_{kind}, weights={file!r})",
        ),
    ),
    "clip-reid": Target(
        normalisation="half",
        plain_vit=False,
        use=(
            "in model/make_model.py: from personmae.interop.clip_reid import ClipReidVit",
            "self.image_encoder = ClipReidVit('{encoder}', weights={file!r}, image_size=({height}, {width}), stride={stride})",
        ),
    ),
    "solider": Target(
        normalisation="half",
        plain_vit=False,
        use=(
            "in model/make_model.py: from personmae.interop.solider import personmae_{kind}; __factory_T_type['personmae_{kind}'] = personmae_{kind}",
            "MODEL.TRANSFORMER_TYPE personmae_{kind} MODEL.PRETRAIN_PATH {file}",
        ),
    ),
    # Its classes hold timm's networks.
    "layumi": dataclasses.replace(
        TIMM, use=("timm.create_model('{kind}_patch16_224', img_size=({height}, {width}), num_classes=0, checkpoint_path={file!r}) as model.model",)
    ),
    "timm": TIMM,
    "safetensors": Target(
        normalisation="imagenet",
        suffix=".safetensors",
        reads_safetensors=True,
        use=("tensors = safetensors.torch.load_file({file!r})     # the header's entry personmae-export says what it is",),
    ),
}
assert set(TARGETS) == set(get_args(TargetName))
