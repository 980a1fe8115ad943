"""PersonMAE: predict the whole of region B, as pixels and as features of a teacher, from the visible patches of region A.

The method is that of Hu et al., "PersonMAE: Person Re-Identification Pre-Training with Masked AutoEncoders", IEEE TMM 2024 (arXiv 2311.04496), as
far as its abstract tells; what it leaves open follows BootMAE (decoders, feature loss, ramp), MAE (pixel target) and SiameseIM (relative codes),
each named where it is used. Plain MAE is one configuration: target region A, masked cells only, pixels only, decoder form mae.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from personmae.configs import UserError
from personmae.models.decoders import Decoder, DecoderConfig
from personmae.models.masking import MaskingConfig, visible_count
from personmae.models.regions import HIDDEN, ORIGINS, SEEN, cell_origins
from personmae.models.vit import Encoded, VisionTransformer, VitConfig, initialise, set_fusing
from personmae_kernels import feature_loss, patch_loss, patch_rows
from personmae_kernels.reference import FeatureLossKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedConfig:
    """The masked model: sizes, masks, and what is predicted."""

    encoder: VitConfig = VitConfig()
    masking: MaskingConfig = MaskingConfig()
    pixel_decoder: DecoderConfig = DecoderConfig()
    feature_decoder: DecoderConfig = DecoderConfig()
    low_level_injection: bool = False  # the pixel decoder attends to the encoder's first block (BootMAE)
    target_region: Literal["B", "A"] = "B"
    predict: Literal["whole", "masked", "unseen"] = "whole"  # cells of the target: all, hidden in A, not seen in A
    losses: Literal["both", "pixels", "features"] = "both"
    pixel_weight: float = 1.0
    feature_weight: float = 1.0  # after the ramp
    feature_loss: FeatureLossKind = "mse"
    per_channel_pixels: bool = False  # standardise patches per colour channel (BootMAE) instead of whole (MAE)

    def __post_init__(self) -> None:
        uses = {"both": ("pixel", "feature"), "pixels": ("pixel",), "features": ("feature",)}[self.losses]
        for name in uses:
            decoder: DecoderConfig = getattr(self, f"{name}_decoder")
            if decoder.form == "mae" and self.target_region == "B":
                raise UserError(f"{name}_decoder.form mae predicts region A only; set target_region A, or form cross or joint")
        rows, columns = self.encoder.grid
        if self.predict == "masked" and visible_count(self.masking, self.encoder.grid) == rows * columns:
            raise UserError("predict masked with nothing masked would train nothing; hide something with masking.ratio, or predict whole")
        if self.low_level_injection and self.losses == "pixels":
            raise UserError("low_level_injection with losses pixels would train the encoder's first block only; set losses both")


def longest_sequence(config: MaskedConfig) -> int:
    """Tokens of the longest sequence that an attention layer of the model sees."""
    rows, columns = config.encoder.grid
    forms = {decoder.form for decoder in (config.pixel_decoder, config.feature_decoder)}
    return rows * columns + 1 + (visible_count(config.masking, config.encoder.grid) if "joint" in forms else 0)


class RegionInputs(NamedTuple):
    """One batch on the device of the model."""

    region_a: Tensor  # uint8 [B, H, W, 3]
    region_b: Tensor  # uint8 [B, H, W, 3], the target (region A again where the target is A)
    boxes: Tensor  # int32 [B, 2, 4] (y0, x0, y1, x1) of A and of the target in the unflipped image
    flips: Tensor  # bool [B, 2]
    mask: Tensor  # bool [B, L] of A, True = hidden
    visible: Tensor  # int32 [B, V], ascending


class MaskedOutput(NamedTuple):
    """Losses of a batch; all but `total` are without gradient."""

    total: Tensor  # [] float32, scaled by the weights: call backward() on it as it is
    sums: Tensor  # [2, 3] float32, unweighted loss summed over cells: (pixels, features) by (seen, hidden, outside)
    counts: Tensor  # [3] float32, number of cells of each origin
    averages: Tensor  # [2] float32, mean over the predicted cells: (pixels, features)


class PersonMAE(nn.Module):
    """Encoder and decoders."""

    def __init__(self, config: MaskedConfig, feature_width: int | None = None, seed: int = 0) -> None:
        """feature_width: width of the teacher's tokens, by default that of the encoder. seed: of the initial weights."""
        super().__init__()
        self.config = config
        encoder = config.encoder
        self.encoder = VisionTransformer(encoder)
        if config.losses != "features":
            self.pixel_decoder = Decoder(config.pixel_decoder, encoder.width, 3 * encoder.patch_px**2, encoder.grid)
        if config.losses != "pixels":
            self.feature_decoder = Decoder(config.feature_decoder, encoder.width, feature_width or encoder.width, encoder.grid)
        # Each part has its own stream, so that the encoder starts the same whatever decoders it has.
        for number, part in enumerate(self.children()):
            initialise(part, torch.Generator().manual_seed(seed * 1000 + number))
        # Steps of pre-training are captured in a CUDA graph.
        set_fusing(self, small=True)

    def encode(self, inputs: RegionInputs) -> Encoded:
        """The encoder's tokens of the visible patches of region A."""
        return self.encoder.encode(inputs.region_a, inputs.visible, keep_first=self.config.low_level_injection)

    def predict_pixels(self, encoded: Encoded, inputs: RegionInputs) -> Tensor:  # -> [B, L, 3 * patch**2], standardised patches
        context = encoded.normed if encoded.first is None else encoded.first
        return self.pixel_decoder(context, inputs.visible, inputs.boxes, inputs.flips)

    def forward(self, inputs: RegionInputs, features: Tensor | None, feature_ramp: float | Tensor = 1.0, scale: float = 1.0) -> MaskedOutput:
        """Losses of one batch.

        features: [B, L, E], the teacher's tokens of the target region, or None where the features are not predicted. feature_ramp: factor of
        the feature loss, 0 to 1, a number or [] on the device. scale: factor of the whole loss, such as 1 / number of accumulation steps.
        """
        config, grid = self.config, self.config.encoder.grid
        origins = cell_origins(inputs.boxes, inputs.flips, inputs.mask, grid)
        chosen = self._chosen_cells(origins).float()
        weights = chosen / chosen.sum(1, keepdim=True).clamp(min=1) / len(chosen)
        encoded = self.encode(inputs)
        zero = torch.zeros_like(weights)
        total, pixels, tokens = zero.sum(), zero, zero
        if config.losses != "features":
            predicted = self.predict_pixels(encoded, inputs)
            encoder = config.encoder
            total_pixels, pixels = patch_loss(
                predicted,
                inputs.region_b,
                weights * (scale * config.pixel_weight),
                encoder.patch_px,
                encoder.mean,
                encoder.std,
                config.per_channel_pixels,
            )
            total = total + total_pixels
        if config.losses != "pixels":
            if features is None:
                raise ValueError("features of the teacher are needed where losses is both or features")
            predicted = self.feature_decoder(encoded.normed, inputs.visible, inputs.boxes, inputs.flips)
            total_tokens, tokens = feature_loss(
                predicted, features, weights * (scale * feature_ramp * config.feature_weight), config.feature_loss
            )
            total = total + total_tokens
        with torch.no_grad():
            per_cell = torch.stack([pixels, tokens]).flatten(1)
            by_origin = nn.functional.one_hot(origins.flatten(), len(ORIGINS)).float()
            averages = (per_cell * weights.flatten()).sum(1)
            # Not a matrix product: autocast would round it to bf16.
            return MaskedOutput(total, (per_cell[:, :, None] * by_origin).sum(1), by_origin.sum(0), averages)

    @torch.no_grad()
    def predict_image(self, inputs: RegionInputs) -> Tensor:
        """The target region as predicted, for pictures: uint8 [B, H, W, 3]. A patch is predicted up to its mean and contrast; these are taken from
        the true patch, as in MAE's pictures."""
        encoder = self.config.encoder
        predicted = self.predict_pixels(self.encode(inputs), inputs).float()
        rows = patch_rows(inputs.region_b, None, encoder.patch_px, encoder.mean, encoder.std)
        if self.config.per_channel_pixels:
            predicted, rows = predicted.unflatten(-1, (3, -1)), rows.unflatten(-1, (3, -1))
        pixels = (predicted * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True)).reshape(len(rows), *encoder.grid, 3, *2 * (encoder.patch_px,))
        pixels = pixels.permute(0, 1, 4, 2, 5, 3).reshape(inputs.region_b.shape)
        mean, std = torch.tensor(encoder.mean, device=pixels.device), torch.tensor(encoder.std, device=pixels.device)
        return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _chosen_cells(self, origins: Tensor) -> Tensor:  # [B, L] -> bool [B, L]
        if self.config.predict == "masked":
            return origins == HIDDEN
        if self.config.predict == "unseen":
            return origins != SEEN
        return torch.ones_like(origins, dtype=torch.bool)
