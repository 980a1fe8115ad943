"""Unsupervised training on clusters, which usl and uda share: Cluster Contrast (Dai et al., ACCV 2022).

At the start of each epoch the features of all images are clustered; then come steps of P clusters with K images each, whose features are told
apart by the memory of cluster means, which follows them. Labels of the set say how good the clusters are, and train nothing. Plan, loaders,
log, checkpoints and report are those of the other tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personmae.configs import UserError, to_plain
from personmae.data.identity_plan import IdentityPlan
from personmae.data.labelled import LabelledImages, TrainingSets, open_labelled
from personmae.data.loaders import open_loader
from personmae.data.records import PersonImage
from personmae.models.identity_head import IdentityHead, IdentityHeadConfig, NeckedEncoder
from personmae.models.reid import ReidEncoder
from personmae.models.vit import VisionTransformer
from personmae.models.weights import AFTER_NECK
from personmae.recipes.unsupervised import FREE_SETTINGS, AdaptConfig, UnsupervisedConfig
from personmae.tasks.finetuning_results import finish, mean_average_precision
from personmae.tasks.model_scores import camera_notes
from personmae.tasks.model_setup import initial_encoder, place_model, silence, to_micro
from personmae.tasks.pseudo_labelling import SOURCE_OFFSET, find_labels, of_source, settle_neck
from personmae.tasks.retrieval import count_warnings, open_sets
from personmae.training.best_epoch import BestEpoch
from personmae.training.checkpoint_writer import CheckpointWriter
from personmae.training.cluster_memory import ClusterMemory
from personmae.training.environment import describe_environment
from personmae.training.finetuning_optimisers import build_finetuning_optimiser
from personmae.training.identity_step import whole_batch_gradients
from personmae.training.logbook import Logbook, check_run_dir
from personmae.training.optimisers import update_weights
from personmae.training.precision import check_finite, make_deterministic
from personmae.training.processes import Processes, StopSignal, start_processes
from personmae.training.quarantine import Quarantine
from personmae.training.resuming import checkpoint_state, load_to_resume, restore_moments, restore_weights, state_bytes
from personmae.training.schedules import stepwise_rate


def main(config: UnsupervisedConfig) -> int:
    """Run or continue a run; returns the number of steps done, fewer than planned if it was asked to stop.

    Writes the run folder as `personmae train holistic` does, and clusters.jsonl (each epoch's clusters and their quality), eps.txt (what other eps
    would have given at the start) and pictures of clusters. Raises UserError for what the user can mend, as an eps that finds no clusters.
    """
    with start_processes(config.device) as processes:
        device = processes.device
        if config.deterministic:
            make_deterministic(device)
        sets = processes.from_main(lambda: open_target(config))
        train, checkpoints = sets.train, config.run_dir / "checkpoints"
        with processes.main_first():
            if config.num_people % (processes.world_size * config.accumulation):
                raise UserError(f"{config.num_people} clusters cannot be shared among {processes.world_size * config.accumulation} parts of a batch")
            say = print if processes.is_main else silence
            allowed, digest = config.resume == "auto", sets.digest()
            saved = load_to_resume(checkpoints, config, FREE_SETTINGS, digest, config.data or "", say, allowed=allowed)
            initial, origin = initial_encoder(config)
        first = saved.step if saved else 0
        processes.check_same_step(first)
        total = config.schedule.epochs * config.steps_per_epoch
        logbook = Logbook(
            config.run_dir,
            num_steps=total,
            images_per_step=config.batch_size,
            log_every=config.log_every,
            resume_step=first,
            config=describe_run(config, sets, total, processes) if processes.is_main else None,
            is_main=processes.is_main,
            device=device,
        )
        with logbook:
            logbook.announce(f"{config.preset}: {total} steps ({config.schedule.epochs} epochs) on {processes.description}")
            logbook.announce(f"training without labels: {train.describe()}")
            logbook.announce(f"initial weights: {origin}")
            precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
            encoder, neck = build_model(config, initial, train)
            model = nn.ModuleDict({"encoder": encoder, "head": neck})
            scored = NeckedEncoder(encoder, neck)
            logbook.announce(f"precision: {precision}; {place_model(model, encoder, config, device, precision)}")
            if saved:
                restore_weights(saved, config.preset, model, None)
            optimiser = build_finetuning_optimiser(encoder, neck, config.optimiser)
            best = BestEpoch(config.run_dir / "best.safetensors")
            labels, memory = None, None
            if saved:
                restore_moments(saved, config.preset, optimiser)
                best.restore(saved.state["best"])
                if saved.state["labels"] is not None:
                    labels = saved.state["labels"].numpy()
                    memory = ClusterMemory(saved.state["memory"], config.memory).to(device)
                logbook.announce(f"continuing {saved.path} at step {first} of {total}")
                del saved
            quarantine = Quarantine(
                config.run_dir, len(train.index), config.loader.max_bad_ratio, processes.is_main, logbook.announce, resume_step=first
            )
            writer = CheckpointWriter(checkpoints, config.keep_last, logbook.announce)
            if processes.is_main:
                writer.reserve(state_bytes(model, None), device)
            step, stopped = first, False
            with StopSignal(processes) as stop, writer:
                while step < total and not stopped:
                    epoch = step // config.steps_per_epoch
                    end = (epoch + 1) * config.steps_per_epoch
                    if labels is None or memory is None:
                        labels, memory = find_labels(scored, epoch, train, config, processes, logbook.announce)
                    plan = plan_of(train, labels, config)
                    rate = stepwise_rate(epoch, config.optimiser.learning_rate, config.schedule)
                    loader = open_loader(
                        train.index,
                        plan,
                        config.loader,
                        size=config.model.image_size,
                        device=device,
                        first_step=step,
                        last_step=end,
                        rank=processes.rank,
                        world_size=processes.world_size,
                        local_world_size=processes.local_world_size,
                        accumulation=config.accumulation,
                        announce=logbook.announce,
                    )
                    told = 0
                    model.train()
                    with loader:
                        batches = iter(loader)
                        logbook.start_clock(step, loader.wait_seconds)
                        while step < end and not stopped:
                            parts = [to_micro(next(batches), micro, encoder, train, config, processes) for micro in range(config.accumulation)]
                            # By the plan: what replaces an unreadable image is of the same cluster.
                            wanted = labels[plan.step_samples(step)]
                            compute = contrast(neck, memory, torch.from_numpy(wanted).to(device, non_blocking=True))
                            loss, accuracy, normed = whole_batch_gradients(
                                encoder, neck, parts, compute, precision=precision, rank=processes.rank, world_size=processes.world_size
                            )
                            norm = update_weights(optimiser, model, None, rate, 0.0, config.optimiser.clip_norm)
                            memory.update(normed, wanted)
                            step += 1
                            if writer.failed:
                                stop.ask()
                            stopped = stop.requested()
                            ended = step == end
                            latest: dict[str, Tensor | float] = {
                                "epoch": step / config.steps_per_epoch,
                                "learning_rate": rate,
                                "quarantined_images": float(len(quarantine)),
                                "clusters": float(labels.max() + 1),
                                "outlier_ratio": float((labels < 0).mean()),
                            }
                            if ended and config.best_by == "test" and ((epoch + 1) % config.evaluate_every == 0 or step == total):
                                latest["judged_map"] = judge(scored, best, epoch + 1, sets, config, processes)
                                model.train()
                            checkpoint_due = stopped or step == total or (ended and (epoch + 1) % config.checkpoint_every == 0)
                            values = {"loss": loss, "accuracy": accuracy, "gradient_norm": norm}
                            line = logbook.log(step, values, latest, wait_seconds=loader.wait_seconds, last=checkpoint_due or ended)
                            if line:
                                check_finite(line, step)
                                overdue = 0 < 60 * config.checkpoint_minutes <= writer.seconds_since_save
                                met = processes.all_gather((loader.quarantine[told:], overdue))
                                told = len(loader.quarantine)
                                quarantine.add(step, [entry for entries, _ in met for entry in entries])
                                checkpoint_due |= met[0][1]
                            if checkpoint_due:
                                # In the middle of an epoch its clusters are part of the state; at its end they are found anew.
                                clusters = (None, None) if ended else (torch.from_numpy(labels), memory.vectors)
                                own = {"best": best.state(), **dict(zip(("labels", "memory"), clusters, strict=True))}
                                with processes.main_first():
                                    if processes.is_main:
                                        writer.save(step, {**checkpoint_state(config, digest, model, None, optimiser), **own})
                                        if stopped or step == total:
                                            writer.wait()
                    if step == end:
                        labels = memory = None
            settle_neck(scored, train, config, processes)
            with processes.main_first():
                if processes.is_main:
                    start = NeckedEncoder(*build_model(config, initial, train)).eval()
                    notes = {AFTER_NECK: "yes"}
                    logbook.announce(finish(config, encoder, neck, start, best, sets, device, step, total, logbook.announce, scored, notes))
            return step


def judge(
    model: NeckedEncoder, best: BestEpoch, epoch: int, sets: TrainingSets, config: UnsupervisedConfig, processes: Processes
) -> float:
    """The mAP on the test sets after an epoch (from 1), whose weights are kept if they are the best so far."""
    settle_neck(model, sets.train, config, processes)
    tests = [reid_set for _, reid_set in sets.tests]
    found = processes.from_main(lambda: mean_average_precision(model, tests, sets, config, processes.device))
    if best.is_better(found, epoch) and processes.is_main:
        best.save(model.encoder, model.head, {"run": str(config.run_dir), "by": "test", AFTER_NECK: "yes", **camera_notes(sets)})
    return found


def plan_of(train: LabelledImages, labels: npt.NDArray[np.int64], config: UnsupervisedConfig) -> IdentityPlan:
    """Batches of clusters for the epochs that have these labels."""
    clustered = replace(train, labels=labels, people=np.arange(labels.max() + 1))
    source = of_source(train)
    halves = np.isin(clustered.people, labels[source]) if source.any() else None
    return IdentityPlan(
        clustered,
        config.num_people,
        config.images_each,
        config.seed,
        config.views,
        cross_camera=config.cross_camera,
        steps=config.steps_per_epoch,
        first_half=halves,
    )


def contrast(neck: IdentityHead, memory: ClusterMemory, labels: Tensor) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]:
    """The loss of a batch against the memory; with it: the loss [], the accuracy [] and the features float32 [B, D] that it saw."""

    def compute(features: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        normed = F.normalize(neck(features).necked[0], dim=1)
        loss, accuracy = memory(normed, labels)
        return loss, (loss.detach(), accuracy, normed.detach())

    return compute


def open_target(config: UnsupervisedConfig) -> TrainingSets:
    """The sets of a run. Raises UserError for what is no labelled set, or has no training part."""
    check_run_dir(config.run_dir)
    if config.data is None:
        raise UserError("no set was given; add --data NAME=FOLDER, as --data market1501=/data/market (`personmae data names` lists them)")
    if config.init is None:
        raise UserError("no weights to begin with; add --init RUN (a run folder, a weights file or timm:NAME), or --init random:vit-small for none")
    ((name, whole),) = open_sets([config.data], config.split)
    print(whole.describe())
    for note in [*whole.notes, *count_warnings(whole)]:
        print(f"  {note}")
    if not whole.train:
        raise UserError(f"{name} has no training part: it is for testing alone; give it as --test, and another set as --data")
    if config.model.camera_weight > 0 and not whole.has_cameras:
        raise UserError(f"{name} does not tell its cameras, and --model.camera-weight needs them; set it to 0")
    train = open_labelled([*whole.train, *source_images(config)], config.run_dir / "train.txt", print)
    if config.cross_camera and train.num_cameras < 2:
        print("all training images are of one camera (or cameras are not told): a cluster's images are drawn without regard to cameras")
    tests = open_sets(config.test, config.split) if config.test else [(name, whole)]
    return TrainingSets(whole.name, train, None, tests)


def source_images(config: UnsupervisedConfig) -> list[PersonImage]:
    """The labelled images that are trained on jointly with the target, under other numbers; none where that is not asked for."""
    if not isinstance(config, AdaptConfig) or not config.joint:
        return []
    assert config.source is not None
    ((name, whole),) = open_sets([config.source])
    if not whole.train:
        raise UserError(f"{name} has no training part, so it can be no --source")
    return [replace(image, person=image.person + SOURCE_OFFSET, camera=image.camera + SOURCE_OFFSET) for image in whole.train]


def build_model(config: UnsupervisedConfig, initial: VisionTransformer, train: LabelledImages) -> tuple[ReidEncoder, IdentityHead]:
    """Encoder and neck, on the CPU."""
    encoder = ReidEncoder(initial, config.model, train.num_cameras, seed=config.seed)
    return encoder, IdentityHead(IdentityHeadConfig(widths=encoder.widths, num_people=0, neck=config.model.neck, ghost_size=config.ghost_size))


def describe_run(config: UnsupervisedConfig, sets: TrainingSets, total: int, processes: Processes) -> dict[str, Any]:
    """What config.json holds: the settings, and what the run was started on."""
    train = sets.train
    numbers = {"images": len(train), "cameras": train.num_cameras, "rejected_images": len(train.index.rejected)}
    return {**to_plain(config), "started": {**describe_environment(), "machine": processes.description, **numbers, "steps": total}}
