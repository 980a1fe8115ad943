"""Who a person is: body, skin, hair, clothes, bag. Everything here stays the same in all pictures of a person.

Colours are sRGB in [0, 1] before light. Palettes are short and mostly dark, grey and blue, as in a street: people share colours, and differ by the
combination of garments, lengths, patterns, bags, hair and build.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from personmae.data.mannequins.dice import Dice, Domain

City = Literal["rivermouth", "highfield"]
Name = TypeVar("Name", bound=str)
Colour = tuple[float, float, float]
Pattern = Literal["plain", "stripes", "bars", "checks", "dots", "print", "block", "badge"]
HairStyle = Literal["short", "bald", "long", "bun", "tail", "bob"]
HatKind = Literal["none", "cap", "beanie", "brim", "hood"]
UpperKind = Literal["tank", "tee", "shirt", "sweater", "jacket", "coat", "dress"]
LowerKind = Literal["trousers", "wide", "tight", "shorts", "skirt"]
BagKind = Literal["none", "backpack", "shoulder", "handbag", "tote", "trolley"]

PALETTE: Mapping[str, Colour] = {
    "black": (0.10, 0.10, 0.11), "charcoal": (0.22, 0.22, 0.24), "grey": (0.45, 0.45, 0.46), "silver": (0.66, 0.66, 0.66),
    "white": (0.90, 0.90, 0.88), "navy": (0.11, 0.14, 0.28), "blue": (0.20, 0.34, 0.62), "sky": (0.55, 0.68, 0.82),
    "denim": (0.27, 0.34, 0.46), "red": (0.66, 0.13, 0.14), "burgundy": (0.37, 0.11, 0.16), "orange": (0.82, 0.43, 0.14),
    "yellow": (0.86, 0.75, 0.24), "green": (0.17, 0.42, 0.24), "olive": (0.35, 0.35, 0.21), "teal": (0.14, 0.42, 0.45),
    "purple": (0.36, 0.22, 0.45), "pink": (0.84, 0.54, 0.61), "beige": (0.75, 0.67, 0.53), "brown": (0.35, 0.24, 0.17),
}  # fmt: skip
SKINS: Sequence[Colour] = (
    (0.90, 0.73, 0.63), (0.85, 0.66, 0.54), (0.78, 0.58, 0.45), (0.64, 0.45, 0.33), (0.47, 0.31, 0.22), (0.33, 0.22, 0.17),
)  # fmt: skip
HAIRS: Sequence[Colour] = ((0.09, 0.08, 0.08), (0.20, 0.13, 0.10), (0.36, 0.24, 0.15), (0.70, 0.56, 0.34), (0.45, 0.20, 0.11), (0.62, 0.61, 0.60))


@dataclass(frozen=True, kw_only=True)
class CityStyle:
    """What people wear in a city: weights of the choices."""

    upper_colours: Mapping[str, float]
    lower_colours: Mapping[str, float]
    accent_colours: Mapping[str, float]
    uppers: Mapping[UpperKind, float]
    lowers: Mapping[LowerKind, float]
    bags: Mapping[BagKind, float]
    hats: Mapping[HatKind, float]
    patterns: Mapping[Pattern, float]
    skins: Sequence[float]
    hairs: Sequence[float]
    scarf_prob: float


STYLES: Mapping[City, CityStyle] = {
    "rivermouth": CityStyle(
        upper_colours={"black": 4, "charcoal": 2, "grey": 2, "silver": 1.5, "white": 4, "navy": 2.2, "blue": 1.5, "sky": 1, "red": 1, "burgundy": 0.5,
                       "orange": 0.4, "yellow": 0.5, "green": 0.6, "olive": 0.6, "teal": 0.4, "purple": 0.5, "pink": 0.9, "beige": 0.8, "brown": 0.4},
        lower_colours={"black": 5, "charcoal": 2.5, "grey": 1.5, "navy": 2.5, "denim": 5, "blue": 1, "white": 0.6, "beige": 1.2, "olive": 0.6,
                       "brown": 0.4, "red": 0.2, "pink": 0.2},
        accent_colours={"white": 3, "black": 2, "grey": 1, "red": 1.2, "navy": 1, "blue": 1, "yellow": 0.8, "sky": 0.7, "green": 0.5, "orange": 0.6,
                        "pink": 0.4},
        uppers={"tank": 0.5, "tee": 4.5, "shirt": 2, "sweater": 1.2, "jacket": 1.6, "coat": 0.4, "dress": 1},
        lowers={"trousers": 4, "wide": 1, "tight": 1.6, "shorts": 2.6, "skirt": 1.3},
        bags={"none": 3.4, "backpack": 2.6, "shoulder": 1.8, "handbag": 1, "tote": 0.9, "trolley": 0.3},
        hats={"none": 8, "cap": 1, "beanie": 0.15, "brim": 0.4, "hood": 0.2},
        patterns={"plain": 4.2, "stripes": 1.2, "bars": 0.5, "checks": 0.9, "dots": 0.3, "print": 1.7, "block": 0.9, "badge": 0.8},
        skins=(2, 3, 3, 1, 0.7, 0.5), hairs=(5, 3, 1.5, 0.7, 0.3, 0.6), scarf_prob=0.03,
    ),
    "highfield": CityStyle(
        upper_colours={"black": 6, "charcoal": 3, "grey": 2, "silver": 0.6, "white": 0.9, "navy": 3, "blue": 0.8, "red": 0.8, "burgundy": 0.9,
                       "green": 0.5, "olive": 1.4, "teal": 0.4, "beige": 1.3, "brown": 1.5, "orange": 0.3, "purple": 0.3, "pink": 0.3},
        lower_colours={"black": 6, "charcoal": 2.5, "navy": 2, "denim": 4.5, "grey": 1, "olive": 0.6, "brown": 1, "beige": 0.5, "burgundy": 0.2},
        accent_colours={"white": 1.5, "grey": 1.5, "black": 2, "red": 1.2, "beige": 1, "blue": 0.8, "orange": 0.7, "olive": 0.5, "yellow": 0.4},
        uppers={"tank": 0.02, "tee": 0.3, "shirt": 0.9, "sweater": 2, "jacket": 4.5, "coat": 3, "dress": 0.3},
        lowers={"trousers": 5, "wide": 1.2, "tight": 2, "shorts": 0.15, "skirt": 0.7},
        bags={"none": 3, "backpack": 2.6, "shoulder": 2, "handbag": 1.2, "tote": 0.8, "trolley": 0.5},
        hats={"none": 5, "cap": 0.6, "beanie": 2, "brim": 0.3, "hood": 1},
        patterns={"plain": 5.5, "stripes": 0.7, "bars": 0.4, "checks": 0.9, "dots": 0.15, "print": 0.7, "block": 1.5, "badge": 0.7},
        skins=(4, 3, 1.5, 0.7, 0.6, 0.5), hairs=(2.5, 3, 2, 1.8, 0.6, 1), scarf_prob=0.3,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cloth:
    """Colours and pattern of a garment; lengths in metres."""

    colour: Colour
    second: Colour
    pattern: Pattern
    period_m: float
    duty: float  # share of a period in the second colour
    place_m: float  # of a print: height over the waist; of a block: where it begins
    on_back: bool  # a print or badge on the back instead of the chest


@dataclass(frozen=True, kw_only=True)
class Person:
    """A person. Ratios are of the body height unless said otherwise."""

    height_m: float
    build: float  # -1 slim to 1 heavy
    shoulders: float  # factor on the width
    hips: float  # factor on the width
    waist: float  # factor on the width
    bust: float  # metres that it stands out
    legs: float  # factor on the leg length
    skin: Colour
    hair: Colour
    hair_style: HairStyle
    beard: bool
    hat: HatKind
    hat_colour: Colour
    upper: UpperKind
    cloth: Cloth
    sleeve: float  # share of the arm that is covered
    sleeve_colour: Colour
    open_front: bool  # the inner shirt shows
    inner: Colour
    hem: float  # height of the hem of a coat, dress or shirt over the ground, share of the body height
    lower: LowerKind
    lower_cloth: Cloth
    lower_length: float  # share of the leg that is covered
    side_stripe: bool
    shoes: Colour
    sole: Colour
    boots: bool
    socks: Colour
    bag: BagKind
    bag_colour: Colour
    bag_side: float  # -1 left, 1 right
    scarf: bool
    scarf_colour: Colour
    stride: float  # radians of the thigh's swing
    arm_swing: float


@functools.lru_cache(maxsize=256)
def person_of(seed: int, number: int, city: City) -> Person:
    """The person with the given number: a pure function of its arguments. The city's style sets the odds."""
    dice, style = Dice(seed, Domain.PERSON, number), STYLES[city]
    woman = dice.chance(0.5)
    upper = _pick(dice, style.uppers)
    while upper == "dress" and not woman:
        upper = _pick(dice, style.uppers)
    lower = _pick(dice, style.lowers)
    while lower == "skirt" and not woman:
        lower = _pick(dice, style.lowers)
    cloth = _cloth(dice, style, _pick(dice, style.upper_colours))
    lower_cloth = _lower_cloth(dice, style, lower)
    hat = _pick(dice, style.hats)
    hair_style: HairStyle = (
        dice.pick(("long", "tail", "bun", "bob", "short"), (4, 2, 1, 2, 1)) if woman else dice.pick(("short", "bald", "tail"), (8, 1.2, 0.4))
    )
    skin = dice.pick(SKINS, style.skins)
    sleeve_colour = cloth.colour if dice.chance(0.8) else cloth.second
    return Person(
        height_m=(1.63 if woman else 1.76) + dice.normal(0.07),
        build=max(-1.0, min(1.0, dice.normal(0.45))),
        shoulders=(0.92 if woman else 1.02) + dice.normal(0.04),
        hips=(1.07 if woman else 0.98) + dice.normal(0.04),
        waist=(0.92 if woman else 1.03) + dice.normal(0.05),
        bust=dice.uniform(0.02, 0.05) if woman else 0.0,
        legs=1.0 + dice.normal(0.02),
        skin=_jitter(dice, skin, 0.02),
        hair=_jitter(dice, dice.pick(HAIRS, style.hairs), 0.02),
        hair_style=hair_style,
        beard=(not woman) and dice.chance(0.2),
        hat=hat,
        hat_colour=_colour(dice, _pick(dice, style.accent_colours)),
        upper=upper,
        cloth=cloth,
        sleeve={"tank": 0.0, "tee": dice.uniform(0.25, 0.42), "dress": dice.pick((0.0, 0.25, 0.95))}.get(upper, dice.pick((0.95, 0.6), (6, 1))),
        sleeve_colour=sleeve_colour if upper != "coat" else cloth.colour,
        open_front=upper in ("jacket", "coat", "shirt") and dice.chance(0.5),
        inner=_colour(dice, _pick(dice, style.accent_colours)),
        hem={"coat": dice.uniform(0.25, 0.42), "dress": dice.uniform(0.16, 0.38)}.get(upper, dice.uniform(0.44, 0.52)),
        lower=lower,
        lower_cloth=lower_cloth,
        lower_length={"shorts": dice.uniform(0.35, 0.58), "skirt": dice.uniform(0.3, 0.8), "tight": dice.pick((0.97, 0.75))}.get(lower, 0.98),
        side_stripe=lower in ("trousers", "shorts") and dice.chance(0.15),
        shoes=_colour(dice, dice.pick(("black", "white", "brown", "grey", "red", "blue", "navy"), (4, 3, 1.2, 1, 0.5, 0.5, 0.5))),
        sole=_colour(dice, dice.pick(("white", "black", "beige"))),
        boots=dice.chance(0.12),
        socks=dice.pick((skin, PALETTE["white"], PALETTE["black"]), (2, 1, 1)),
        bag=_pick(dice, style.bags),
        bag_colour=_colour(dice, dice.pick(("black", "charcoal", "navy", "brown", "red", "blue", "grey", "beige", "pink", "green", "yellow", "white"),
                                           (5, 1.5, 2, 1.5, 1, 1, 1, 1, 0.5, 0.5, 0.4, 0.6))),
        bag_side=dice.sign(),
        scarf=dice.chance(style.scarf_prob),
        scarf_colour=_colour(dice, _pick(dice, style.accent_colours)),
        stride=dice.uniform(0.32, 0.5),
        arm_swing=dice.uniform(0.15, 0.55),
    )  # fmt: skip


def _pick(dice: Dice, weights: Mapping[Name, float]) -> Name:
    return dice.pick(list(weights), list(weights.values()))


def _colour(dice: Dice, name: str) -> Colour:
    return _jitter(dice, PALETTE[name], 0.025)


def _jitter(dice: Dice, colour: Colour, sigma: float) -> Colour:
    """Dye lots: a little other lightness and hue, so that nobody is told by an exact colour."""
    hue, light, saturation = colorsys.rgb_to_hls(*colour)
    light = light * (1.0 + dice.normal(4 * sigma)) + dice.normal(sigma / 2)
    red, green, blue = colorsys.hls_to_rgb(
        (hue + dice.normal(sigma / 2)) % 1.0, min(0.95, max(0.05, light)), saturation * (1.0 + dice.normal(4 * sigma))
    )
    return (min(1.0, max(0.02, red)), min(1.0, max(0.02, green)), min(1.0, max(0.02, blue)))


def _cloth(dice: Dice, style: CityStyle, name: str) -> Cloth:
    accent = _pick(dice, style.accent_colours)
    while accent == name:
        accent = _pick(dice, style.accent_colours)
    return Cloth(
        colour=_colour(dice, name),
        second=_colour(dice, accent),
        pattern=_pick(dice, style.patterns),
        period_m=dice.uniform(0.06, 0.16),
        duty=dice.uniform(0.3, 0.6),
        place_m=dice.uniform(0.12, 0.30),
        on_back=dice.chance(0.4),
    )


def _lower_cloth(dice: Dice, style: CityStyle, lower: LowerKind) -> Cloth:
    name = _pick(dice, style.lower_colours)
    pattern: Pattern = dice.pick(("plain", "checks", "stripes", "dots"), (14, 1, 0.6, 0.5)) if lower in ("skirt", "shorts", "wide") else "plain"
    return Cloth(
        colour=_colour(dice, name),
        second=_colour(dice, _pick(dice, style.accent_colours)),
        pattern=pattern,
        period_m=dice.uniform(0.05, 0.12),
        duty=dice.uniform(0.25, 0.5),
        place_m=0.0,
        on_back=False,
    )
