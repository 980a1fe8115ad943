"""A person in a pose, as primitives: an articulated skeleton with body, clothes, hair, hat and bag around it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from personmae.data.mannequins.paints import cloth_colours, face, limb, plain
from personmae.data.mannequins.raycast import BoolArray, FloatArray
from personmae.data.mannequins.shapes import Paint, Shapes, Vector
from personmae.data.mannequins.skeleton import SIDES, Joints, Pose, joints_of, move
from personmae.data.mannequins.wardrobe import Cloth, Person


def add_figure(shapes: Shapes, person: Person, pose: Pose, place: tuple[float, float], heading: float) -> int:
    """Add the person in the pose to the shapes, standing at place = (x, z) in the world. Returns the group's number."""
    group = shapes.begin_group(place, heading)
    joints = joints_of(person, pose)
    _add_legs(shapes, person, joints)
    _add_trunk(shapes, person, joints)
    _add_arms(shapes, person, joints)
    _add_head(shapes, person, joints, pose.head_turn)
    _add_bag(shapes, person, joints)
    return group


def _add_legs(shapes: Shapes, person: Person, joints: Joints) -> None:
    size, thick = person.height_m, 1.0 + 0.16 * person.build
    upper_m, lower_m = 0.245 * size * person.legs, 0.235 * size * person.legs
    cover = person.lower_length * (upper_m + lower_m)
    if person.upper == "dress" or person.lower == "skirt":
        cover = 0.0
    loose = {"trousers": 0.010, "wide": 0.022, "tight": 0.002, "shorts": 0.016, "skirt": 0.0}[person.lower] if cover else 0.0
    sock = (upper_m + lower_m * (0.45 if person.boots else 0.8), person.shoes if person.boots else person.socks)
    skin = limb(person.lower_cloth, cover, person.skin, sock=sock, stripe=person.side_stripe)
    leg, shoe, sole = shapes.add_paint(skin), shapes.add_paint(plain(person.shoes)), shapes.add_paint(plain(person.sole))
    knee_cover = 1.0 if cover > upper_m else 0.0
    shin_cover = 1.0 if cover > 0.8 * (upper_m + lower_m) else 0.0
    folds = 0.10 if loose > 0.005 else 0.04
    for i, _ in SIDES:
        knee_r = 0.030 * size * thick + loose * (0.7 if knee_cover else 0.0)
        shapes.capsule(joints.hips[i], joints.knees[i], 0.050 * size * thick + loose * 0.6, max(knee_r, 0.8 * loose + 0.028 * size), leg, folds=folds)
        ankle_r = 0.021 * size * thick + loose * (1.3 if shin_cover else 0.0)
        shapes.capsule(joints.knees[i], joints.ankles[i], knee_r + 0.002 * size, ankle_r, leg, folds=folds, texture_start=upper_m)
        heel, toe = move(joints.ankles[i], 0.02 * size, 0.0, -0.9, -0.9), joints.toes[i]
        shapes.capsule(heel, toe, 0.024 * size, 0.018 * size, shoe, forward=(0.0, 1.0, 0.0))
        below = 0.012 * size
        shapes.capsule(
            (heel[0], heel[1] - below, heel[2]), (toe[0], toe[1] - 0.7 * below, toe[2]), 0.020 * size, 0.016 * size, sole, forward=(0.0, 1.0, 0.0)
        )


def _trunk_paint(person: Person, joints: Joints) -> Paint:
    """The trunk's cloth in the group's coordinates: pattern around the body, prints, an open front, collar, belt and bag straps."""
    cloth, size = person.cloth, person.height_m
    waist, neck = joints.waist_y, joints.neck[1]
    hem_y = min(person.hem * size, joints.pelvis_y - 0.01) if person.upper not in ("coat", "dress") else 0.0
    bottom = person.lower_cloth if person.upper not in ("coat", "dress") else cloth

    def paint(q: FloatArray) -> FloatArray:
        x, y, z = q[:, 0], q[:, 1], q[:, 2] - joints.lean * np.maximum(q[:, 1] - joints.pelvis_y, 0.0)
        around = np.arctan2(x, z) * (0.12 * size)
        albedo = cloth_colours(cloth, y, around)
        front = z > 0.0
        shown = ~front if cloth.on_back else front
        middle = waist + cloth.place_m
        if cloth.pattern == "print":
            wide = 0.05 + 0.09 * cloth.duty
            inside = shown & (np.abs(x) < wide) & (np.abs(y - middle) < 0.25 * cloth.period_m + 0.04)
            albedo = np.where((inside & (np.mod(y / 0.045, 1.0) < 0.75))[:, None], np.array(cloth.second), albedo)
        elif cloth.pattern == "badge":
            inside = shown & (x * x + (y - middle) ** 2 < (0.04 + 0.35 * cloth.period_m) ** 2)
            albedo = np.where(inside[:, None], np.array(cloth.second), albedo)
        elif cloth.pattern == "block":
            above = y > middle if cloth.on_back else y < middle - 0.06
            albedo = np.where(above[:, None], np.array(cloth.second), albedo)
        if person.open_front:
            albedo = np.where((front & (np.abs(x) < 0.035 + 0.25 * np.maximum(0.0, y - waist - 0.12)))[:, None], np.array(person.inner), albedo)
        if person.upper == "tank":
            bare = (y > neck - 0.13) & (np.abs(x) > 0.075) | (y > neck - 0.05)
            albedo = np.where(bare[:, None], np.array(person.skin), albedo)
        albedo = np.where((y < hem_y)[:, None], cloth_colours(bottom, y, around), albedo)
        return _with_straps(albedo, person, joints, x, y, front)

    return paint


def _with_straps(albedo: FloatArray, person: Person, joints: Joints, x: FloatArray, y: FloatArray, front: BoolArray) -> FloatArray:
    if person.bag == "backpack":
        strap = front & (np.abs(np.abs(x) - 0.055 * person.height_m) < 0.02) & (y > joints.waist_y + 0.06)
    elif person.bag == "shoulder":
        low, high = joints.pelvis_y, joints.neck[1]
        strap = np.abs(x - person.bag_side * 0.09 * person.height_m * (1.0 - 2.0 * (y - low) / (high - low))) < 0.02
    else:
        return albedo
    return np.where(strap[:, None], np.array(person.bag_colour) * 0.8, albedo)


def _add_trunk(shapes: Shapes, person: Person, joints: Joints) -> None:
    size, thick = person.height_m, 1.0 + 0.22 * person.build
    ease = {"tank": 0.0, "tee": 0.008, "shirt": 0.012, "sweater": 0.018, "jacket": 0.030, "coat": 0.036, "dress": 0.002}[person.upper]
    paint = shapes.add_paint(_trunk_paint(person, joints))
    hip_r, chest_r = (
        0.090 * size * person.hips * (1.0 + 0.16 * person.build) + 0.5 * ease,
        0.083 * size * (0.5 + 0.5 * person.shoulders) * (1.0 + 0.12 * person.build) + ease,
    )
    waist_r = 0.077 * size * person.waist * thick + ease
    deep = 0.66 + 0.08 * max(0.0, person.build)
    waist, chest = joints.leaning(0.0, joints.waist_y, 0.0), joints.leaning(0.0, joints.chest_y - 0.035 * size, 0.0)
    shapes.ellipsoid(
        (0.0, joints.pelvis_y + 0.012 * size, -0.008 * size), (hip_r, 0.075 * size, hip_r * deep * 1.08), paint, folds=0.08, texture_start=None
    )
    shapes.capsule(
        (0.0, joints.pelvis_y + 0.03 * size, 0.0),
        waist,
        0.97 * hip_r,
        waist_r,
        paint,
        depth=deep,
        closed=(False, True),
        folds=0.08,
        texture_start=None,
    )
    shapes.capsule(waist, chest, waist_r, chest_r, paint, depth=deep, folds=0.08, texture_start=None)
    left, right = joints.shoulders
    low = 0.012 * size
    shapes.capsule(
        (left[0] * 0.85, left[1] - low, left[2]),
        (right[0] * 0.85, right[1] - low, right[2]),
        0.040 * size + 0.4 * ease,
        0.040 * size + 0.4 * ease,
        paint,
        forward=(0.0, 0.0, 1.0),
        folds=0.05,
        texture_start=None,
    )
    shapes.capsule(
        joints.leaning(0.0, joints.chest_y, 0.0),
        (joints.neck[0], joints.neck[1] + 0.012 * size, joints.neck[2]),
        0.062 * size + 0.5 * ease,
        0.032 * size,
        paint,
        depth=0.8,
        texture_start=None,
    )
    if person.bust > 0.0:
        shapes.ellipsoid(
            joints.leaning(0.0, joints.chest_y - 0.055 * size, chest_r * deep * 0.55),
            (0.068 * size, 0.036 * size, 0.045 + person.bust),
            paint,
            texture_start=None,
        )
    if person.build > 0.3:
        shapes.ellipsoid(
            joints.leaning(0.0, joints.waist_y + 0.01, 0.25 * waist_r),
            (0.9 * waist_r, 0.08 * size, 0.75 * waist_r),
            paint,
            folds=0.05,
            texture_start=None,
        )
    _add_skirts(shapes, person, joints, paint, hip_r, waist_r, deep)


def _add_skirts(shapes: Shapes, person: Person, joints: Joints, trunk: int, hip_r: float, waist_r: float, deep: float) -> None:
    """The hanging parts: hem of a shirt or jacket, tails of a coat, skirt of a dress."""
    size = person.height_m
    reach = max(abs(knee[2]) for knee in joints.knees)
    long_ones = person.upper in ("coat", "dress")
    hem_y = min(person.hem * size, joints.pelvis_y - 0.02 * size)
    if long_ones or person.upper in ("shirt", "sweater", "jacket", "tee"):
        drop = (joints.waist_y - hem_y) / (0.28 * size)
        flare = 1.0 + (0.22 if person.upper == "dress" else 0.12) * drop
        stretch = deep * (1.06 + 0.8 * drop * reach / hip_r * 0.5)
        shapes.capsule(
            (0.0, joints.waist_y, 0.0),
            (0.0, hem_y, 0.0),
            max(waist_r, 0.9 * hip_r),
            1.03 * hip_r * flare,
            trunk,
            depth=stretch,
            closed=(False, False),
            folds=0.12,
            texture_start=None,
        )
    if person.lower == "skirt" and person.upper != "dress":
        length = person.lower_length * 0.48 * size
        top, end = joints.pelvis_y + 0.03 * size, joints.pelvis_y + 0.03 * size - 0.08 * size - 0.7 * length
        paint = shapes.add_paint(limb(person.lower_cloth, 9.0, person.skin))
        stretch = deep * (1.0 + 0.7 * min(1.0, length / (0.25 * size)) * reach / hip_r * 0.6)
        shapes.capsule(
            (0.0, top, 0.0),
            (0.0, end, 0.0),
            hip_r,
            hip_r * (1.05 + 0.35 * person.lower_length),
            paint,
            depth=stretch,
            closed=(False, False),
            folds=0.14,
        )


def _add_arms(shapes: Shapes, person: Person, joints: Joints) -> None:
    size, thick = person.height_m, 1.0 + 0.14 * person.build
    ease = {"tank": 0.0, "tee": 0.006, "shirt": 0.006, "sweater": 0.012, "jacket": 0.017, "coat": 0.019, "dress": 0.002}[person.upper]
    upper_m, lower_m = 0.168 * size, 0.140 * size
    cover = person.sleeve * (upper_m + lower_m)
    pattern = "plain" if person.cloth.pattern in ("print", "badge", "block") else person.cloth.pattern
    cloth: Cloth = replace(person.cloth, colour=person.sleeve_colour, pattern=pattern)
    sleeve, skin = shapes.add_paint(limb(cloth, cover, person.skin)), shapes.add_paint(plain(person.skin))
    upper_ease, lower_ease = (ease if cover > 0.2 * upper_m else 0.0), (ease if cover > upper_m else 0.0)
    for i, _ in SIDES:
        shapes.capsule(
            joints.shoulders[i],
            joints.elbows[i],
            0.032 * size * thick + upper_ease,
            0.023 * size * thick + max(lower_ease, 0.5 * upper_ease),
            sleeve,
            folds=0.08,
        )
        shapes.capsule(
            joints.elbows[i],
            joints.wrists[i],
            0.023 * size * thick + lower_ease,
            0.015 * size * thick + 0.8 * lower_ease,
            sleeve,
            folds=0.08,
            texture_start=upper_m,
        )
        shapes.capsule(joints.wrists[i], joints.hands[i], 0.017 * size, 0.019 * size, skin)


def _add_head(shapes: Shapes, person: Person, joints: Joints, turn: float) -> None:
    size, (x, y, z) = person.height_m, joints.head
    s, c = math.sin(turn), math.cos(turn)
    ahead = (s, 0.0, c)

    def at(right: float, up: float, forward: float) -> Vector:
        return (x + size * (c * right + s * forward), y + size * up, z + size * (c * forward - s * right))

    skin = shapes.add_paint(plain(person.skin))
    shapes.capsule(joints.neck, at(0.0, -0.045, -0.012), 0.030 * size, 0.028 * size, skin)
    visage = shapes.add_paint(face(person.skin, person.hair if person.beard else None, size))
    shapes.ellipsoid(at(0.0, 0.0, 0.0), (0.044 * size, 0.066 * size, 0.053 * size), visage, forward=ahead)
    hair = shapes.add_paint(plain(person.hair))
    if person.hair_style != "bald":
        shapes.ellipsoid(at(0.0, 0.018, -0.014), (0.049 * size, 0.060 * size, 0.054 * size), hair, forward=ahead, folds=0.1)
    if person.hair_style in ("long", "bob"):
        end = -0.16 if person.hair_style == "long" else -0.06
        shapes.capsule(at(0.0, 0.0, -0.025), at(0.0, end, -0.040), 0.048 * size, 0.044 * size, hair, forward=ahead, depth=0.75, folds=0.15)
    elif person.hair_style == "tail":
        shapes.capsule(at(0.0, 0.035, -0.065), at(0.0, -0.09, -0.075), 0.020 * size, 0.012 * size, hair, folds=0.1)
    elif person.hair_style == "bun":
        shapes.ellipsoid(at(0.0, 0.06, -0.055), (0.028 * size, 0.028 * size, 0.028 * size), hair)
    if person.hat != "none":
        hat = shapes.add_paint(plain(person.hat_colour if person.hat != "hood" else person.cloth.colour))
        if person.hat == "hood":
            shapes.ellipsoid(at(0.0, 0.005, -0.018), (0.062 * size, 0.078 * size, 0.058 * size), hat, forward=ahead, folds=0.1)
        else:
            shapes.ellipsoid(at(0.0, 0.032, -0.006), (0.053 * size, 0.048 * size, 0.061 * size), hat, forward=ahead)
        if person.hat == "cap":
            shapes.ellipsoid(at(0.0, 0.032, 0.060), (0.042 * size, 0.007 * size, 0.045 * size), hat, forward=ahead)
        elif person.hat == "brim":
            shapes.ellipsoid(at(0.0, 0.030, -0.004), (0.100 * size, 0.008 * size, 0.105 * size), hat, forward=ahead)
    if person.scarf:
        scarf = shapes.add_paint(plain(person.scarf_colour))
        shapes.ellipsoid(
            (joints.neck[0], joints.neck[1] + 0.012 * size, joints.neck[2] + 0.008 * size),
            (0.058 * size, 0.030 * size, 0.056 * size),
            scarf,
            folds=0.2,
        )
        low = (0.03 * size, joints.chest_y - 0.06 * size, joints.neck[2] + 0.075 * size)
        shapes.capsule((0.02 * size, joints.neck[1], joints.neck[2] + 0.05 * size), low, 0.022 * size, 0.025 * size, scarf, depth=0.5, folds=0.15)


def _add_bag(shapes: Shapes, person: Person, joints: Joints) -> None:
    size, side = person.height_m, person.bag_side
    if person.bag == "none":
        return
    paint = shapes.add_paint(plain(person.bag_colour))
    dark = shapes.add_paint(plain((person.bag_colour[0] * 0.5, person.bag_colour[1] * 0.5, person.bag_colour[2] * 0.5)))
    hand = joints.hands[1 if side > 0 else 0]
    if person.bag == "backpack":
        back = -(0.105 + 0.02 * person.build) * size
        low = joints.leaning(0.0, joints.waist_y + 0.02 * size, back)
        high = joints.leaning(0.0, joints.chest_y - 0.015 * size, back)
        shapes.capsule(low, high, 0.085 * size, 0.078 * size, paint, depth=0.62, folds=0.06)
        shapes.ellipsoid(joints.leaning(0.0, joints.waist_y + 0.05 * size, back - 0.045 * size), (0.06 * size, 0.05 * size, 0.022 * size), dark)
    elif person.bag == "shoulder":
        centre = (side * 0.118 * size * person.hips, joints.pelvis_y + 0.01 * size, -0.01 * size)
        shapes.box(centre, (0.035 * size, 0.065 * size, 0.090 * size), paint)
        shapes.box((centre[0] + side * 0.006 * size, centre[1] + 0.035 * size, centre[2]), (0.034 * size, 0.03 * size, 0.092 * size), dark)
    elif person.bag == "handbag":
        shapes.capsule(hand, (hand[0], hand[1] - 0.10 * size, hand[2]), 0.006 * size, 0.02 * size, dark)
        shapes.ellipsoid((hand[0], hand[1] - 0.125 * size, hand[2]), (0.035 * size, 0.060 * size, 0.085 * size), paint, folds=0.06)
    elif person.bag == "tote":
        shapes.box((hand[0] + side * 0.01, hand[1] - 0.14 * size, hand[2]), (0.028 * size, 0.105 * size, 0.095 * size), paint, folds=0.06)
        shapes.capsule(hand, (hand[0], hand[1] - 0.06 * size, hand[2]), 0.012 * size, 0.02 * size, dark)
    else:
        centre = (side * 0.20 * size, 0.19 * size, -0.24 * size)
        shapes.box(centre, (0.085 * size, 0.165 * size, 0.06 * size), paint, up=(0.0, 1.0, -0.3))
        shapes.capsule((centre[0], centre[1] + 0.15 * size, centre[2]), hand, 0.008 * size, 0.008 * size, dark)
