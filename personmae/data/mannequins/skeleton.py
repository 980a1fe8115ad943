"""A skeleton in a pose: where the joints of a person are at a moment of a walk, or of standing.

The person's frame: x to the right, y up, z forward, the ground at y = 0. Proportions follow common anthropometric tables (segment
lengths as shares of the body height: Drillis & Contini, 1966), rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from personmae.data.mannequins.dice import Dice
from personmae.data.mannequins.shapes import Vector
from personmae.data.mannequins.wardrobe import Person

ArmMode = Literal["swing", "pocket", "phone", "carry", "strap"]
SIDES = ((0, -1.0), (1, 1.0))


@dataclass(frozen=True)
class Pose:
    """A moment of a walk, or of standing. Angles in radians."""

    phase: float  # of the gait, 0 to 2 pi
    stride: float  # swing of the thighs
    arm_swing: float
    arms: tuple[ArmMode, ArmMode]  # left, right
    lean: float  # of the trunk, metres forward per metre of height
    head_turn: float  # to the right


def draw_pose(person: Person, walk: Dice, moment: float) -> Pose:
    """The person's pose at `moment` (seconds into the track): the walk's dice decide how, the moment only the phase."""
    standing = walk.chance(0.15)
    cadence, start = walk.uniform(5.2, 6.6), walk.uniform(0.0, 2.0 * math.pi)
    arms: list[ArmMode] = [
        walk.pick(("swing", "pocket", "phone"), (6, 1, 1)), walk.pick(("swing", "pocket", "phone"), (6, 1, 1.4))
    ]  # fmt: skip
    side = 1 if person.bag_side > 0 else 0
    if person.bag in ("handbag", "tote", "trolley"):
        arms[side] = "carry"
    elif person.bag in ("shoulder", "backpack") and walk.chance(0.25):
        arms[side] = "strap"
    phase = start if standing else (start + cadence * moment) % (2.0 * math.pi)
    stride = 0.06 if standing else person.stride * walk.uniform(0.8, 1.1)
    swing = 0.04 if standing else person.arm_swing
    return Pose(phase, stride, swing, (arms[0], arms[1]), walk.uniform(0.0, 0.07), walk.normal(0.25))


@dataclass(frozen=True)
class Joints:
    hips: tuple[Vector, Vector]
    knees: tuple[Vector, Vector]
    ankles: tuple[Vector, Vector]
    toes: tuple[Vector, Vector]
    shoulders: tuple[Vector, Vector]
    elbows: tuple[Vector, Vector]
    wrists: tuple[Vector, Vector]
    hands: tuple[Vector, Vector]
    pelvis_y: float
    waist_y: float
    chest_y: float
    neck: Vector
    head: Vector
    lean: float

    def leaning(self, x: float, y: float, z: float) -> Vector:
        """A point of the trunk, moved forward with the lean."""
        return (x, y, z + self.lean * max(0.0, y - self.pelvis_y))


def move(point: Vector, length: float, x: float, y: float, z: float) -> Vector:
    return (point[0] + length * x, point[1] + length * y, point[2] + length * z)


def joints_of(person: Person, pose: Pose) -> Joints:
    size = person.height_m
    thigh, shin = 0.245 * size * person.legs, 0.235 * size * person.legs
    hip_y, hip_x = 0.52 * size * person.legs, 0.052 * size * person.hips
    hips: list[Vector] = []
    knees: list[Vector] = []
    ankles: list[Vector] = []
    toes: list[Vector] = []
    for _, side in SIDES:
        phase = pose.phase + (math.pi if side > 0 else 0.0)
        swing = pose.stride * math.sin(phase) + 0.04
        bend = 0.1 + 1.7 * pose.stride * max(0.0, math.cos(phase)) ** 2 if pose.stride > 0.1 else 0.06
        hip = (side * hip_x, hip_y, 0.0)
        knee = move(hip, thigh, 0.0, -math.cos(swing), math.sin(swing))
        ankle = move(knee, shin, -0.03 * side, -math.cos(swing - bend), math.sin(swing - bend))
        # The foot stays flat under a straight leg and hangs with the shin of a bent one.
        tilt = min(0.0, 0.8 * (swing - bend) + 0.15)
        toe = move(ankle, 0.095 * size, 0.10 * side, math.sin(tilt) - 0.18, math.cos(tilt))
        for points, point in ((hips, hip), (knees, knee), (ankles, ankle), (toes, toe)):
            points.append(point)
    drop = min(min(point[1] for point in ankles) - 0.042 * size, min(point[1] for point in toes) - 0.016 * size)
    low = [[(x, y - drop, z) for x, y, z in limb_points] for limb_points in (hips, knees, ankles, toes)]
    pelvis_y = hip_y - drop
    chest_y, shoulder_y = pelvis_y + 0.255 * size, pelvis_y + 0.292 * size
    shoulders: list[Vector] = []
    elbows: list[Vector] = []
    wrists: list[Vector] = []
    hands: list[Vector] = []
    for i, side in SIDES:
        phase = pose.phase + (math.pi if side > 0 else 0.0)
        twist = -0.03 * size * pose.arm_swing * math.sin(phase)
        shoulder = (side * 0.102 * size * person.shoulders, shoulder_y, pose.lean * 0.29 * size + twist)
        spread, swing, bend, inward = _arm_angles(person, pose.arms[i], -pose.arm_swing * math.sin(phase))
        elbow = move(shoulder, 0.168 * size, side * math.sin(spread), -math.cos(swing) * math.cos(spread), math.sin(swing) * math.cos(spread))
        lower = (side * math.sin(spread - inward), -math.cos(swing + bend), math.sin(swing + bend))
        wrist = move(elbow, 0.140 * size, *lower)
        hand = move(wrist, 0.055 * size, *lower)
        for points, point in ((shoulders, shoulder), (elbows, elbow), (wrists, wrist), (hands, hand)):
            points.append(point)
    lean = pose.lean
    return Joints(
        hips=(low[0][0], low[0][1]), knees=(low[1][0], low[1][1]), ankles=(low[2][0], low[2][1]), toes=(low[3][0], low[3][1]),
        shoulders=(shoulders[0], shoulders[1]), elbows=(elbows[0], elbows[1]), wrists=(wrists[0], wrists[1]), hands=(hands[0], hands[1]),
        pelvis_y=pelvis_y, waist_y=pelvis_y + 0.095 * size, chest_y=chest_y,
        neck=(0.0, pelvis_y + 0.305 * size, lean * 0.30 * size), head=(0.0, pelvis_y + 0.405 * size, lean * 0.40 * size + 0.012 * size), lean=lean,
    )  # fmt: skip


def _arm_angles(person: Person, mode: ArmMode, swing: float) -> tuple[float, float, float, float]:
    """(spread, swing of the upper arm, bend of the elbow, inward turn of the forearm)."""
    spread = 0.13 + 0.07 * max(0.0, person.build)
    if mode == "pocket":
        return spread + 0.15, -0.25, 0.55, 0.35
    if mode == "phone":
        return spread, 0.25, 1.85, 0.5
    if mode == "carry":
        return spread + 0.05, 0.15 * swing, 0.12, 0.0
    if mode == "strap":
        return spread + 0.05, 0.1, 2.2, 0.25
    return spread, swing, 0.25 + 0.5 * max(0.0, swing), 0.12
