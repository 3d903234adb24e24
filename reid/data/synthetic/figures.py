"""The picture of a walking person."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

from reid.data.synthetic.paint import Colour, Point, disc, tint
from reid.data.synthetic.persons import Person


class Figure:
    """One walking body on a transparent layer.

    The body has three axes, in heights of a body: to its left, forward, and down from the top of
    the head; `at` maps them to pixels of the layer.

    Args:
        layer: RGBA, drawn on in place.
        person: Who walks.
        pitch: How far the camera looks down: 0 is level.
        yaw: Walking direction in radians; 0 is towards the camera.
        phase: Phase of the step, in radians.
        origin: Pixel (x, y) of the top of the head.
        scale: Height of the body in pixels.
    """

    def __init__(
        self,
        layer: Image.Image,
        person: Person,
        pitch: float,
        yaw: float,
        phase: float,
        origin: Point,
        scale: float,
    ) -> None:
        self.layer, self.person, self.pitch = layer, person, pitch
        self.canvas = ImageDraw.Draw(layer)
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        self.phase, self.origin, self.scale = phase, origin, scale
        self.hip = 1.0 - person.build.legs

    def draw(self, light: float) -> None:
        """Draws the body from back to front, then its shadow side.

        Args:
            light: From the left (-1) or the right (1).
        """
        x, y = self.at(0.0, 0.0, 0.975)
        wide = 0.16 * self.scale
        shadow = (x - wide, y - 0.1 * wide, x + wide * (1.0 - light), y + 0.22 * wide)
        ground = Image.new("RGBA", self.layer.size)
        ImageDraw.Draw(ground).ellipse(shadow, fill=(20, 20, 24, 110))
        self.draw_body()
        columns = (np.arange(self.layer.size[0]) - x) / (0.14 * self.scale)
        ramp = np.clip(1.0 + 0.22 * light * columns - 0.1 * columns**2, 0.45, 1.0) * 255.0
        shade = np.repeat(ramp.astype(np.uint8)[None, :, None], 4, axis=2)
        shade[:, :, 3] = 255
        body = ImageChops.multiply(
            self.layer, Image.fromarray(shade).resize(self.layer.size, Image.Resampling.NEAREST)
        )
        ground.alpha_composite(body)
        self.layer.paste(ground)

    def draw_body(self) -> None:
        """Draws limbs, clothes, head and bag, from back to front."""
        far, near = (1, -1) if self.sin > 0 else (-1, 1)
        self.draw_leg(far)
        if abs(self.sin) > 0.3:
            self.draw_arm(far)
        self.draw_leg(near)
        self.draw_bag(over=False)
        if self.person.hair.cut == "long" and self.cos > 0:
            r = self.person.build.head
            rows = ((0.05, 1.0 * r), (0.2, 1.1 * r), (0.25, 0.9 * r))
            self.band(rows, self.person.hair.colour, forward=-0.02)
        self.draw_torso()
        self.draw_head()
        self.draw_bag(over=True)
        if abs(self.sin) <= 0.3:
            self.draw_arm(far)
        self.draw_arm(near)

    def at(self, left: float, forward: float, down: float) -> Point:
        """The pixel (x, y) of a point of the body."""
        across = (left * self.cos + forward * self.sin) * (1.0 + self.pitch * (0.5 - down))
        down += self.pitch * down * (1.0 - down)
        return self.origin[0] + across * self.scale, self.origin[1] + down * self.scale

    def half(self, wide: float, deep: float) -> float:
        """Half the width in the picture of an ellipse with these two half axes."""
        return math.hypot(wide * self.cos, deep * self.sin) * self.person.build.width

    def bar(
        self,
        ends: Sequence[Point],
        widths: Sequence[float],
        colour: Colour | int,
        canvas: ImageDraw.ImageDraw | None = None,
    ) -> None:
        """Draws a bent limb: a disc at each joint and straight sides between them."""
        canvas = canvas or self.canvas
        radii = [width * self.scale * 0.5 for width in widths]
        for (x, y), r in zip(ends, radii, strict=True):
            disc(canvas, x, y, r, r, colour)
        joints = zip(ends, radii, strict=True)
        for (a, r), (b, s) in itertools.pairwise(joints):
            length = math.hypot(b[0] - a[0], b[1] - a[1]) or 1.0
            u, v = (b[1] - a[1]) / length, (a[0] - b[0]) / length
            corners = ((a, r), (b, s), (b, -s), (a, -r))
            canvas.polygon([(p[0] + u * q, p[1] + v * q) for p, q in corners], fill=colour)

    def band(
        self,
        rows: Sequence[tuple[float, float]],
        colour: Colour | int,
        canvas: ImageDraw.ImageDraw | None = None,
        forward: float = 0.0,
    ) -> None:
        """Draws a shape around the body's axis; `rows` are (down, half the width) from above."""
        sides: list[list[Point]] = [[], []]
        for down, half in rows:
            x, y = self.at(0.0, forward, down)
            sides[0].append((x - half * self.scale, y))
            sides[1].append((x + half * self.scale, y))
        (canvas or self.canvas).polygon(sides[0] + sides[1][::-1], fill=colour)

    def cloth(self, factor: float) -> Image.Image:
        """The pattern of the upper clothes, as large as the layer."""
        upper = self.person.upper
        main, second = (tint(colour, factor) for colour in upper.colours)
        cloth = Image.new("RGB", self.layer.size, main)
        canvas = ImageDraw.Draw(cloth)
        step = upper.period * self.scale
        x, y = self.at(0.0, 0.0, 0.17)
        far = self.layer.size[0] + self.layer.size[1]
        if upper.pattern in ("hoops", "checks"):
            for k in range(16):
                canvas.rectangle((0, y + k * step, far, y + (k + 0.45) * step), fill=second)
        if upper.pattern in ("pinstripes", "checks"):
            across = step * (0.45 + 0.55 * abs(self.cos))
            line = main if upper.pattern == "checks" else second
            for k in range(-8, 9):
                canvas.rectangle((x + k * across, 0, x + (k + 0.4) * across, far), fill=line)
        if upper.pattern == "yoke":
            canvas.rectangle((0, y, far, y + (0.05 + 1.2 * upper.period) * self.scale), fill=second)
        return cloth

    def clothe(self, mask: Image.Image, factor: float = 1.0) -> None:
        """Puts the upper clothes where the mask is white."""
        self.layer.paste(self.cloth(factor), mask=mask)

    def mask(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        """A black mask as large as the layer, and the canvas to draw on it."""
        mask = Image.new("L", self.layer.size)
        return mask, ImageDraw.Draw(mask)

    def leg(self, side: int) -> tuple[Point, Point, Point]:
        """Hip, knee and ankle of the left (1) or right (-1) leg."""
        build, (swing, lift) = self.person.build, self.step(side)
        knee_down = self.hip + 0.46 * build.legs
        return (
            self.at(side * 0.048 * build.width, 0.0, self.hip),
            self.at(side * 0.05, 0.06 * swing + lift, knee_down),
            self.at(side * 0.045, 0.13 * swing - lift, 0.955 - lift),
        )

    def step(self, side: int) -> tuple[float, float]:
        """How far the left (1) or right (-1) foot is in front, and how far it is lifted."""
        stride = self.person.build.stride
        swing = side * math.sin(self.phase) * stride
        return swing, max(0.0, side * math.cos(self.phase)) * 0.03 * stride

    def arm(self, side: int) -> tuple[Point, Point, Point]:
        """Shoulder, elbow and hand of the left (1) or right (-1) arm."""
        width = self.person.build.width
        swing = -side * math.sin(self.phase) * self.person.build.stride
        return (
            self.at(side * 0.105 * width, 0.0, 0.205),
            self.at(side * (0.115 * width + 0.02), 0.045 * swing - 0.01, 0.345),
            self.at(side * (0.11 * width + 0.025), 0.11 * swing + 0.03, 0.475),
        )

    def joints(self) -> npt.NDArray[np.float32]:
        """The pixels (17, 2), x and y, of COCO's joints; left and right are the person's."""
        r = self.person.build.head
        middle, front = 0.012 + 1.15 * r, 0.012 + 0.8 * r
        points = [self.at(0.0, front, middle + 0.25 * r)]
        points += [self.at(side * 0.3 * r, front, middle) for side in (1, -1)]
        points += [self.at(side * 0.8 * r, 0.012, middle) for side in (1, -1)]
        for limb in (self.arm, self.leg):
            left, right = limb(1), limb(-1)
            points += [point for pair in zip(left, right, strict=True) for point in pair]
        return np.array(points, np.float32)

    def draw_leg(self, side: int) -> None:
        """Draws the left (1) or right (-1) leg and its shoe."""
        person, build = self.person, self.person.build
        swing, lift = self.step(side)
        knee_down = self.hip + 0.46 * build.legs
        hip, knee, ankle = self.leg(side)
        toe = self.at(side * 0.05, 0.13 * swing - lift + 0.055, 0.975 - lift)
        factor = 1.0 if side * self.sin <= 0 else 0.82
        skin, cloth = tint(person.skin, factor), tint(person.lower.colour, factor)
        trousers = person.lower.cut == "trousers" and person.upper.cut != "dress"
        widths = (0.105 * build.width, 0.078 * build.width, 0.055 * build.width)
        self.bar((hip, knee, ankle), widths, cloth if trousers else skin)
        if person.lower.cut == "shorts" and person.upper.cut != "dress":
            low = self.at(side * 0.05, 0.055 * swing + lift, knee_down - 0.01)
            self.bar((hip, low), (0.112 * build.width, 0.1 * build.width), cloth)
        elif trousers and person.lower.piping:
            stripe = tint(person.upper.colours[1], factor)
            self.bar((hip, knee, ankle), (0.02, 0.02, 0.02), stripe)
        self.bar((ankle, toe), (0.055, 0.04), tint(person.shoes, factor))

    def draw_arm(self, side: int) -> None:
        """Draws the left (1) or right (-1) arm, its sleeve, and a handbag if it carries one."""
        person, width = self.person, self.person.build.width
        shoulder, elbow, hand = self.arm(side)
        factor = 0.86 if side * self.sin <= 0 else 0.7
        self.bar((elbow, hand), (0.05, 0.04), tint(person.skin, factor + 0.1))
        mask, canvas = self.mask()
        if person.upper.cut in ("long", "coat"):
            wrist = (elbow[0] + 0.82 * (hand[0] - elbow[0]), elbow[1] + 0.82 * (hand[1] - elbow[1]))
            ends, widths = (shoulder, elbow, wrist), (0.075 * width, 0.062 * width, 0.05 * width)
            self.bar(ends, widths, 255, canvas)
        else:
            middle = (0.3 * shoulder[0] + 0.7 * elbow[0], 0.3 * shoulder[1] + 0.7 * elbow[1])
            self.bar((shoulder, middle), (0.078 * width, 0.07 * width), 255, canvas)
            self.bar((middle, elbow), (0.05, 0.05), tint(person.skin, factor + 0.1))
        self.clothe(mask, factor)
        if person.bag.kind == "handbag" and side == person.bag.side:
            self.draw_handbag(hand)

    def draw_torso(self) -> None:
        """Draws the upper clothes, and the lower ones around the hips."""
        person, upper = self.person, self.person.upper
        skirt = person.lower.cut == "skirt" and upper.cut != "dress"
        waist = self.hip - 0.055, self.half(0.088, 0.068)
        low = self.hip + (0.2 if skirt else 0.035)
        end = low, self.half(0.135, 0.12) if skirt else self.half(0.098, 0.075)
        self.band((waist, end), person.lower.colour)
        hem = {"coat": self.hip + 0.14, "dress": self.hip + 0.2}.get(upper.cut, self.hip + 0.01)
        flare = {"coat": 1.12, "dress": 1.4}.get(upper.cut, 1.0)
        mask, canvas = self.mask()
        shape = [(0.158, 0.035, 0.035), (0.178, 0.09, 0.05), (0.2, 0.118, 0.066)]
        shape += [(0.36, 0.095, 0.07), (hem, 0.1 * flare, 0.074 * flare)]
        self.band([(down, self.half(wide, deep)) for down, wide, deep in shape], 255, canvas)
        self.clothe(mask)
        self.draw_front(hem)

    def draw_front(self, hem: float) -> None:
        """Draws the patterns that do not repeat: logo, open jacket, sash."""
        upper, second = self.person.upper, self.person.upper.colours[1]
        front = self.cos > 0.25
        if front and upper.pattern == "logo":
            x, y = self.at(0.0, 0.065, 0.29)
            wide, high = upper.period * self.cos * self.scale, 0.8 * upper.period * self.scale
            disc(self.canvas, x, y, wide, high, second)
        elif front and upper.pattern == "open":
            ends = (self.at(0.0, 0.065, 0.175), self.at(0.0, 0.065, hem - 0.01))
            self.bar(ends, (0.04, 0.7 * upper.period + 0.02), second)
        elif upper.pattern == "sash":
            sign, width = 1.0 if self.cos > 0 else -1.0, self.person.build.width
            ends = (
                self.at(0.08 * width, 0.05 * sign, 0.21),
                self.at(-0.08 * width, 0.05 * sign, self.hip - 0.02),
            )
            self.bar(ends, (0.05, 0.05), second)

    def draw_bag(self, over: bool) -> None:
        """Draws the part of the bag that is drawn before (`over` false) or after the torso."""
        if self.person.bag.kind == "backpack":
            self.draw_backpack(over)
        elif self.person.bag.kind == "shoulder":
            self.draw_shoulder_bag(over)

    def draw_backpack(self, over: bool) -> None:
        """Draws the backpack, or only its straps if the torso hides it."""
        colour = self.person.bag.colour
        if over != (self.cos > 0.0):
            half = math.hypot(0.082 * self.cos, 0.05 * self.sin)
            rows = ((0.19, 0.6 * half), (0.215, half), (0.42, half * 1.08), (0.44, half * 0.8))
            self.band(rows, colour, forward=-0.095)
            self.band(((0.34, half * 0.8), (0.35, half * 0.8)), tint(colour, 0.7), forward=-0.1)
        elif over:
            for side in (-1, 1):
                ends = (self.at(side * 0.06, 0.04, 0.18), self.at(side * 0.07, 0.05, 0.36))
                self.bar(ends, (0.022, 0.022), colour)

    def draw_shoulder_bag(self, over: bool) -> None:
        """Draws the strap over the torso, and the bag on the near or on the far side of it."""
        bag, dark = self.person.bag, tint(self.person.bag.colour, 0.7)
        near = bag.side * self.sin < 0.35
        if over:
            sign = 0.06 if self.cos > 0 else -0.06
            ends = (
                self.at(-bag.side * 0.07, sign, 0.18),
                self.at(bag.side * 0.1, sign, self.hip - 0.04),
            )
            self.bar(ends, (0.016, 0.016), dark)
        if over == near:
            half = 0.055 * (0.6 + 0.4 * abs(self.sin))
            x, y = self.at(bag.side * 0.13 * self.person.build.width, 0.0, self.hip - 0.06)
            half, high = half * self.scale, 0.12 * self.scale
            self.canvas.rounded_rectangle((x - half, y, x + half, y + high), 4, bag.colour)
            self.canvas.rectangle((x - half, y, x + half, y + 0.35 * high), fill=dark)

    def draw_handbag(self, hand: Point) -> None:
        """Draws the bag and its handles below the hand, a pixel (x, y)."""
        x, y = hand
        wide, high = 0.06 * (0.5 + 0.5 * abs(self.sin)) * self.scale, 0.1 * self.scale
        self.canvas.line((x, y, x - wide, y + 0.4 * high), fill=(30, 30, 30), width=3)
        self.canvas.line((x, y, x + wide, y + 0.4 * high), fill=(30, 30, 30), width=3)
        box = (x - wide, y + 0.4 * high, x + wide, y + 1.4 * high)
        self.canvas.rectangle(box, fill=self.person.bag.colour)

    def draw_head(self) -> None:
        """Draws neck, face, hair and hat."""
        person, r = self.person, self.person.build.head
        neck = (self.at(0, 0, 0.13), self.at(0, 0, 0.175))
        self.bar(neck, (0.05, 0.055), tint(person.skin, 0.8))
        x, y = self.at(0.0, 0.012, 0.012 + 1.15 * r)
        wide, high = r * 0.86 * self.scale, r * 1.12 * self.scale
        disc(self.canvas, x, y, wide, high, person.skin)
        self.draw_hair(x, y, wide, high)
        if self.cos > 0.1:
            face = self.sin * wide * 0.55
            for side in (-1, 1):
                ex, ey = x + face + side * 0.36 * wide * self.cos, y + 0.05 * high
                disc(self.canvas, ex, ey, 0.11 * wide, 0.11 * wide, (30, 25, 25))
        self.draw_hat(x, y, wide, high)

    def draw_hair(self, x: float, y: float, wide: float, high: float) -> None:
        """Draws the hair around a head at (x, y) with these two half axes, in pixels."""
        hair, r = self.person.hair, self.person.build.head
        if hair.cut != "bald":
            # The hair is the head's outline, cut open where the face looks.
            box = (x - 1.06 * wide, y - 1.08 * high, x + 1.06 * wide, y + 1.02 * high)
            turn = 90.0 * (1.0 - self.cos)  # 0: from the front, 180: from the back
            if self.cos < -0.4:
                self.canvas.ellipse(box, fill=hair.colour)
            else:
                back = min(turn, 95.0)
                start = 195.0 - back if self.sin > 0 else 195.0 + 0.4 * back
                end = 345.0 - 0.4 * back if self.sin > 0 else 345.0 + back
                self.canvas.chord(box, start, end, fill=hair.colour)
        if hair.cut == "long" and self.cos <= 0:
            rows = ((0.04, 0.8 * r), (0.1, 1.05 * r), (0.24, 0.95 * r))
            self.band(rows, hair.colour, forward=-0.02)
        if hair.cut == "bun":
            bun_x, bun_y = self.at(0.0, -0.05, 0.03)
            disc(self.canvas, bun_x, bun_y, 0.5 * wide, 0.5 * wide, hair.colour)

    def draw_hat(self, x: float, y: float, wide: float, high: float) -> None:
        """Draws the hat on a head at (x, y) with these two half axes, in pixels."""
        hat = self.person.hat
        if hat.kind == "none":
            return
        top = (x - 1.12 * wide, y - 1.2 * high, x + 1.12 * wide, y + 0.5 * high)
        self.canvas.chord(top, 180, 360, fill=hat.colour)
        if hat.kind == "cap":
            ends = ((x, y - 0.4 * high), (x + 1.6 * wide * self.sin, y - 0.35 * high))
            if self.cos > -0.5:
                self.bar(ends, (0.03, 0.02), tint(hat.colour, 0.8))
        elif hat.kind == "brim":
            ends = ((x - 1.5 * wide, y - 0.4 * high), (x + 1.5 * wide, y - 0.4 * high))
            self.bar(ends, (0.02, 0.02), tint(hat.colour, 0.8))
