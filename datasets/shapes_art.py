"""What the objects and the surfaces of the shapes world look like, each as a formula."""

import numpy as np

# --- objects: (u, v) in object coordinates, u to the right, v downwards, outline about within 1 ---
# Each returns the silhouette (bool) and a tone: -1 paints black, 0 the object's colour, +1 white.


def _ball(u, v):
    seams = (np.abs(np.abs(u) - 0.75 + 0.35 * v * v) < 0.09) | (np.abs(u) < 0.07)
    return u * u + v * v < 0.9, np.where(seams, -0.75, 0.25 - 0.35 * (u + v))


def _box(u, v):
    tape = (np.abs(u) < 0.16) | (np.abs(v) < 0.16)
    edge = np.maximum(np.abs(u), np.abs(v)) > 0.68
    return np.maximum(np.abs(u), np.abs(v)) < 0.84, np.where(tape, 0.75, np.where(edge, -0.5, 0.0))


def _kite(u, v):
    return np.abs(u) / 0.72 + np.abs(v) < 1, np.where((u > 0) == (v > -0.15), 0.5, -0.45)


def _star(u, v):
    radius, angle, half = np.hypot(u, v), np.arctan2(u, -v), np.pi / 5
    turn = (angle + half) % (2 * half) - half  # from the nearest tip
    # The straight edge from a tip at 1.05 to the notch at 0.5, half a tip's angle further.
    edge = np.sin(half) / (np.sin(np.abs(turn)) / 0.5 + np.sin(half - np.abs(turn)) / 1.05)
    return radius < edge, np.where(radius < 0.28, 0.85, np.where(turn > 0, 0.4, -0.4))


def _heart(u, v):
    x, y = 1.15 * u, -1.15 * v + 0.1

    def within(squared):  # the same outline, sqrt(squared) times as small
        return (squared * (x * x + y * y) - 0.8) ** 3 - 1.3 * squared**2.5 * x * x * y**3 < 0

    return within(1), np.where(within(7), -0.5, np.where(within(2), 0.65, -0.1))


def _wheel(u, v):
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    spokes = np.abs(np.sin(4 * angle)) * radius < 0.22
    tone = np.where(radius > 0.7, -0.75, np.where(spokes, 0.0, 0.8))
    return radius < 0.95, tone


def _moon(u, v):
    inside = (u * u + v * v < 0.95) & ((u - 0.5) ** 2 + (v + 0.1) ** 2 > 0.42)
    craters = np.zeros(u.shape, bool)
    for x, y, r in ((-0.6, -0.2, 0.17), (-0.35, 0.5, 0.2), (0.2, 0.75, 0.12), (-0.35, -0.65, 0.13)):
        craters |= (u - x) ** 2 + (v - y) ** 2 < r * r
    return inside, np.where(craters, -0.6, 0.3)


def _flower(u, v):
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    petal = np.abs(np.cos(3 * angle))
    tone = np.where(radius < 0.28, -0.8, np.where(petal < 0.35, -0.35, 0.35))
    return radius < 0.5 + 0.47 * petal, tone


def _house(u, v):
    roof = (v < -0.1) & (np.abs(u) < (v + 0.95) * 1.1)
    walls = (np.abs(v - 0.4) < 0.5) & (np.abs(u) < 0.7)
    door = (np.abs(u) < 0.16) & (v > 0.4)
    windows = (np.abs(np.abs(u) - 0.42) < 0.14) & (np.abs(v - 0.2) < 0.14)
    tone = np.where(door | windows, -0.85, np.where(roof, -0.45, 0.45))
    return roof | walls, tone


def _tree(u, v):
    crown = np.zeros(u.shape, bool)
    for top in (-1.0, -0.55, -0.1):
        crown |= (v > top) & (v < top + 0.65) & (np.abs(u) < (v - top) * 1.1)
    trunk = (np.abs(u) < 0.14) & (np.abs(v - 0.75) < 0.25)
    layers = ((v + 1.0) / 0.45) % 1
    return crown | trunk, np.where(trunk & ~crown, -0.7, 0.4 - 0.9 * layers)


def _fish(u, v):
    body = ((u + 0.2) / 0.78) ** 2 + (v / 0.5) ** 2 < 1
    tail = (u > 0.4) & (u < 0.95) & (np.abs(v) < (u - 0.3) * 0.85)
    scales = np.hypot((u * 4.2) % 1 - 0.5, ((v + 0.12 * np.floor(u * 4.2)) * 4.2) % 1 - 0.5) > 0.42
    eye = (u + 0.65) ** 2 + (v + 0.1) ** 2
    tone = np.where(tail & ~body, 0.45, np.where(scales, -0.4, 0.25))
    return body | tail, np.where(eye < 0.012, -1, np.where(eye < 0.04, 1, tone))


def _bug(u, v):
    body = (u / 0.72) ** 2 + ((v - 0.12) / 0.78) ** 2 < 1
    head = u * u + (v + 0.72) ** 2 < 0.07
    legs = (np.abs(np.abs(v - 0.1) - 0.36) < 0.06) | (np.abs(v - 0.1) < 0.06)
    dots = (np.abs(u) - 0.34) ** 2 + (np.abs(v - 0.15) - 0.3) ** 2 < 0.024
    dark = head | (np.abs(u) < 0.06) | dots | (v < -0.38)
    return body | head | (legs & (np.abs(u) < 0.95)), np.where(
        dark, -0.85, np.where(body, 0.1, -0.8)
    )


OBJECTS = {
    "ball": _ball,
    "box": _box,
    "kite": _kite,
    "star": _star,
    "heart": _heart,
    "wheel": _wheel,
    "moon": _moon,
    "flower": _flower,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "bug": _bug,
}


# --- surfaces: (x, y) in pixels of the scene, a random generator, white noise -> tone ---


def _grass(x, y, rng, grain):
    blades = np.sin(x * 1.9 + 2.2 * np.sin(y * 0.35 + rng.uniform(0, 6))) * np.sin(y * 0.8)
    return 0.25 * blades + 0.12 * grain


def _sand(x, y, rng, grain):
    return 0.07 * np.sin(0.25 * y + 0.1 * x + rng.uniform(0, 6)) + 0.13 * grain


def _water(x, y, rng, grain):
    wave = np.sin(0.75 * y + 1.5 * np.sin(0.16 * x + rng.uniform(0, 6)) + rng.uniform(0, 6))
    return 0.3 * wave * np.abs(wave)


def _brick(x, y, rng, grain):
    x, y = x + rng.uniform(0, 16), y + rng.uniform(0, 8)
    row = np.floor(y / 8)
    mortar = (y % 8 < 1.4) | ((x + 8 * (row % 2)) % 16 < 1.4)
    tint = 0.12 * np.sin(12.9 * row + 78.2 * np.floor((x + 8 * (row % 2)) / 16))
    return np.where(mortar, 0.5, tint)


def _wood(x, y, rng, grain):
    x = x + rng.uniform(0, 16)
    grain = np.sin(2.2 * x + 1.6 * np.sin(0.12 * y + 3 * np.floor(x / 16)))
    return np.where(x % 16 < 1.3, -0.55, 0.14 * grain)


def _snow(x, y, rng, grain):
    drift = np.sin(0.11 * x + rng.uniform(0, 6)) * np.sin(0.13 * y + rng.uniform(0, 6))
    return 0.12 * drift - 0.08 + 0.05 * grain


SURFACES = {
    "grass": (_grass, (84, 138, 52)),
    "sand": (_sand, (214, 188, 136)),
    "water": (_water, (52, 112, 178)),
    "brick": (_brick, (158, 78, 60)),
    "wood": (_wood, (150, 104, 62)),
    "snow": (_snow, (232, 238, 246)),
}
