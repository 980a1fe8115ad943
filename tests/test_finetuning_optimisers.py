"""The optimisers of fine-tuning and their rates: the groups of each recipe by name, and timm's scheduler."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from personmae.configs import UserError
from personmae.models.drop_path import draw_factors, draw_subsets, drop_rates
from personmae.models.identity_head import IdentityHead, IdentityHeadConfig
from personmae.models.reid import ReidConfig, ReidEncoder
from personmae.models.vit import VitConfig
from personmae.training.finetuning_optimisers import MALE_OPTIMISER, FinetuneOptimiserConfig, build_finetuning_optimiser, finetuning_groups
from personmae.training.optimisers import set_learning_rate
from personmae.training.schedules import MALE_SCHEDULE, FinetuneScheduleConfig, finetuning_rate
from tests.test_vit import random_encoder

VIT = VitConfig(image_size=(64, 32), patch_px=8, width=32, depth=3, num_heads=2)


@pytest.fixture
def parts():
    encoder = ReidEncoder(random_encoder(VIT), ReidConfig(image_size=(64, 32), stride_px=8, parts="jpm", camera_weight=3.0), num_cameras=4)
    return encoder, IdentityHead(IdentityHeadConfig(widths=encoder.widths, num_people=6))


def settings_by_name(encoder, head, config):
    """name -> (scale of the rate, weight decay)"""
    names = {parameter: name for part, module in (("encoder", encoder), ("head", head)) for name, parameter in module.named_parameters(prefix=part)}
    found = {}
    for group in finetuning_groups(encoder, head, config):
        assert group["lr"] == pytest.approx(config.learning_rate * group["lr_scale"])
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr_scale"], group["weight_decay"])
    trained = {name for parameter, name in names.items() if parameter.requires_grad}
    assert set(found) == trained
    return found


def test_sgd_has_twice_the_rate_for_biases(parts):
    found = settings_by_name(*parts, FinetuneOptimiserConfig(weight_decay=1e-4))
    for name, (scale, decay) in found.items():
        assert scale == (2.0 if name.endswith("bias") else 1.0), name
        assert decay == 1e-4


def test_adamw_has_rates_that_fall_from_layer_to_layer(parts):
    found = settings_by_name(*parts, MALE_OPTIMISER)
    # Layers of timm: 0 the stem, then the blocks, then the last norm and what is new.
    for name, (scale, decay) in found.items():
        if name.startswith(("encoder.encoder.blocks.", "encoder.parts.blocks.")):
            layer = 1 + int(name.split(".")[3]) if name.startswith("encoder.encoder") else 3
        elif name.startswith(("encoder.encoder.patch_embed", "encoder.encoder.cls_token", "encoder.encoder.pos_embed", "encoder.camera_embed")):
            layer = 0
        else:
            layer = 4
        assert scale == pytest.approx(0.4 ** (4 - layer)), name
        plain = name.endswith(("bias", "norm1.weight", "norm2.weight", "norm.weight", "cls_token", "pos_embed", "camera_embed"))
        plain |= name.startswith("head.necks")
        assert decay == (0.0 if plain else 0.05), name


def test_the_rate_reaches_every_group(parts):
    optimiser = build_finetuning_optimiser(*parts, FinetuneOptimiserConfig())
    set_learning_rate(optimiser, 0.5)
    assert {(group["lr_scale"], group["lr"]) for group in optimiser.param_groups} == {(1.0, 0.5), (2.0, 1.0)}
    plain = torch.optim.SGD(nn.Linear(2, 2).parameters(), 1.0)
    set_learning_rate(plain, 0.25)
    assert plain.param_groups[0]["lr"] == 0.25


def test_a_state_of_the_other_optimiser_is_refused(parts):
    sgd = build_finetuning_optimiser(*parts, FinetuneOptimiserConfig())
    adamw = build_finetuning_optimiser(*parts, MALE_OPTIMISER)
    with pytest.raises(UserError, match=r"go on with --optimiser\.kind adamw"):
        sgd.load_state_dict(adamw.state_dict())


def peer(config, peak, per_epoch):
    """timm's scheduler, in epochs or in steps."""
    weight = nn.Parameter(torch.zeros(()))
    unit = 1 if config.by == "epoch" else per_epoch
    prefix = config.cosine_from == "warmup"
    length = config.epochs - (config.warmup_epochs if prefix else 0)
    scheduler = CosineLRScheduler(
        torch.optim.SGD([weight], lr=peak),
        t_initial=length * unit,
        lr_min=config.final_ratio * peak,
        warmup_t=config.warmup_epochs * unit,
        warmup_lr_init=config.warmup_start * peak,
        warmup_prefix=prefix,
        cycle_limit=1,
        t_in_epochs=True,
    )
    return scheduler


@pytest.mark.parametrize(
    "config",
    [FinetuneScheduleConfig(), FinetuneScheduleConfig(epochs=7, warmup_epochs=2), FinetuneScheduleConfig(epochs=5, warmup_epochs=0), MALE_SCHEDULE],
    ids=str,
)
def test_rates_are_those_of_timm(config):
    peak, per_epoch = 0.008, 4
    scheduler = peer(config, peak, per_epoch)
    for epoch in range(config.epochs):
        for step in range(per_epoch):
            # TransReID asks its scheduler for the epoch counted from 1.
            time = epoch + 1 if config.by == "epoch" else epoch * per_epoch + step
            ours = finetuning_rate(epoch, step / per_epoch, peak, config)
            if config.by == "epoch" and epoch == config.epochs - 1:
                assert ours == pytest.approx(config.final_ratio * peak)
                continue
            assert ours == pytest.approx(scheduler._get_lr(time)[0], rel=1e-9, abs=1e-12), (epoch, step)


def test_schedules_that_do_not_fit():
    with pytest.raises(UserError, match="both must fit"):
        FinetuneScheduleConfig(epochs=3, warmup_epochs=4)
    with pytest.raises(UserError, match="final_ratio"):
        FinetuneScheduleConfig(final_ratio=1.5)
    for options in ({"learning_rate": 0.0}, {"layer_decay": 0.0}, {"layer_decay": 1.5}):
        with pytest.raises(UserError, match=next(iter(options))):
            FinetuneOptimiserConfig(**options)


def test_drop_rates_rise_as_in_timm():
    assert drop_rates(0.3, 4) == pytest.approx([rate.item() for rate in torch.linspace(0, 0.3, 4) for _ in range(2)])
    assert drop_rates(0.3, 2, num_parts=3)[4:] == [0.3] * 6
    assert drop_rates(0.3, 3, kind="subset") == [0.3] * 6


def test_factors_keep_the_mean_and_follow_from_seed_epoch_and_sample():
    rates = [0.0, 0.2, 0.6]
    factors = draw_factors(rates, 5, 2, range(20_000))
    for row, rate in zip(factors, rates, strict=True):
        assert row[row > 0].unique().tolist() == [pytest.approx(1 / (1 - rate))]
        assert row.mean().item() == pytest.approx(1.0, abs=0.03)
        assert (row == 0).double().mean().item() == pytest.approx(rate, abs=0.02)
    assert torch.equal(draw_factors(rates, 5, 2, [7, 3]), factors[:, [7, 3]])
    assert not torch.equal(draw_factors(rates, 5, 3, range(100)), factors[:, :100])


def test_subsets_are_of_one_size_and_random():
    subsets = draw_subsets(0.25, 6, 1, 0, range(40, 52))
    assert subsets.shape == (6, 9)
    assert (subsets.diff(dim=1) > 0).all()
    assert subsets.min() >= 0
    assert subsets.max() < 12
    assert len({tuple(row) for row in subsets.tolist()}) == 6
    assert torch.equal(subsets, draw_subsets(0.25, 6, 1, 0, range(40, 52)))
    assert draw_subsets(0.9, 2, 1, 0, range(3)).shape == (2, 1)
