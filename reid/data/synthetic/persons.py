"""Made persons: what stays the same of one in all pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reid.data.synthetic.paint import CLOTHES, Colour, between, near, pick, tint

_SKIN = ((245, 214, 190), (230, 190, 160), (205, 155, 120), (165, 115, 80), (120, 80, 55))
_HAIR = ((25, 20, 20), (60, 40, 30), (110, 75, 45), (190, 155, 95), (140, 60, 35), (150, 150, 150))
# Words that are listed twice are twice as likely.
_HAIR_CUTS = ("short", "short", "short", "long", "long", "bun", "bun", "bald")
_HATS = ("none",) * 7 + ("cap", "beanie", "brim")
_UPPER_CUTS = ("long", "long", "long", "short", "short", "coat", "dress")
_PATTERNS = ("plain",) * 3 + ("hoops", "pinstripes", "checks", "logo", "yoke", "open", "sash")
_LOWER_CUTS = ("trousers",) * 5 + ("shorts", "shorts", "skirt", "skirt")
_BAGS = ("none", "none", "backpack", "backpack", "shoulder", "handbag")


@dataclass(frozen=True)
class Build:
    """The body; lengths are in heights of a body.

    Attributes:
        width: Width of the body; 1 is average.
        legs: Height of the hips above the ground.
        head: Radius of the head.
        stride: Length of a step; 1 is average.
    """

    width: float
    legs: float
    head: float
    stride: float


@dataclass(frozen=True)
class Hair:
    """The hair.

    Attributes:
        cut: `short`, `long`, `bun` or `bald`.
        colour: Its colour.
    """

    cut: str
    colour: Colour


@dataclass(frozen=True)
class Hat:
    """The hat.

    Attributes:
        kind: `none`, `cap`, `beanie` or `brim`.
        colour: Its colour.
    """

    kind: str
    colour: Colour


@dataclass(frozen=True)
class Upper:
    """The upper clothes.

    Attributes:
        cut: `long` or `short` sleeves, `coat` or `dress`.
        pattern: `plain`, `hoops`, `pinstripes`, `checks`, `logo`, `yoke`, `open` or `sash`.
        period: Distance between stripes, or size of the logo, in heights of a body.
        colours: Main and second colour.
    """

    cut: str
    pattern: str
    period: float
    colours: tuple[Colour, Colour]


@dataclass(frozen=True)
class Lower:
    """The lower clothes; not seen under a dress.

    Attributes:
        cut: `trousers`, `shorts` or `skirt`.
        colour: Their colour.
        piping: Whether trousers have a stripe of the upper clothes' second colour.
    """

    cut: str
    colour: Colour
    piping: bool


@dataclass(frozen=True)
class Bag:
    """The bag.

    Attributes:
        kind: `none`, `backpack`, `shoulder` or `handbag`.
        colour: Its colour.
        side: Where a bag hangs: 1 is the person's left, -1 the right.
    """

    kind: str
    colour: Colour
    side: int


@dataclass(frozen=True)
class Person:
    """What stays the same of one person in all pictures.

    Attributes:
        build: The body.
        skin: Colour of face, hands and bare legs.
        hair: The hair.
        hat: The hat.
        upper: The upper clothes.
        lower: The lower clothes.
        bag: The bag.
        shoes: Colour of the shoes.
    """

    build: Build
    skin: Colour
    hair: Hair
    hat: Hat
    upper: Upper
    lower: Lower
    bag: Bag
    shoes: Colour


def synthesise_person(rng: np.random.Generator) -> Person:
    """Makes up the looks of one person."""
    main, second, hat, lower, bag, shoes = (near(rng, pick(rng, CLOTHES)) for _ in range(6))
    if max(abs(a - b) for a, b in zip(main, second, strict=True)) < 60:
        # A pattern in two equal colours could not be seen.
        second = tint((255, 255, 255), 0.92) if sum(main) < 380 else (30, 30, 36)
    # Keep the order of the fields: it decides which random numbers each gets.
    return Person(
        build=Build(
            width=between(rng, (0.78, 1.3)),
            legs=between(rng, (0.46, 0.53)),
            head=between(rng, (0.055, 0.068)),
            stride=between(rng, (0.6, 1.2)),
        ),
        skin=near(rng, pick(rng, _SKIN), 6),
        hair=Hair(cut=pick(rng, _HAIR_CUTS), colour=near(rng, pick(rng, _HAIR), 6)),
        hat=Hat(kind=pick(rng, _HATS), colour=hat),
        upper=Upper(
            cut=pick(rng, _UPPER_CUTS),
            pattern=pick(rng, _PATTERNS),
            period=between(rng, (0.04, 0.085)),
            colours=(main, second),
        ),
        lower=Lower(cut=pick(rng, _LOWER_CUTS), colour=lower, piping=bool(rng.random() < 0.15)),
        bag=Bag(kind=pick(rng, _BAGS), colour=bag, side=1 if rng.random() < 0.5 else -1),
        shoes=shoes,
    )
