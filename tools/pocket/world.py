"""The pocket world: what there is to draw, in which colours, where, and how people say it.

Everything here is data and words; pixels are made in :mod:`render`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

# Class noun -> icon name in the artwork packages. The order is the order of the curriculum:
# telling silhouettes first. Only Fluent and Twemoji drawings are ever used for pretraining; the Noto
# drawing of every class is held out, so that concepts made from it are unseen.
CLASSES: dict[str, str] = {
    "octopus": "octopus",
    "dog": "dog",
    "cat": "cat",
    "elephant": "elephant",
    "giraffe": "giraffe",
    "rabbit": "rabbit",
    "penguin": "penguin",
    "duck": "duck",
    "turtle": "turtle",
    "butterfly": "butterfly",
    "fish": "tropical-fish",
    "crab": "crab",
    "apple": "red-apple",
    "banana": "banana",
    "car": "automobile",
    "airplane": "airplane",
    "rocket": "rocket",
    "sailboat": "sailboat",
    "teapot": "teapot",
    "house": "house",
    "tree": "evergreen-tree",
    "guitar": "guitar",
    "mushroom": "mushroom",
    "backpack": "backpack",
    "cup": "hot-beverage",
    "snail": "snail",
    "owl": "owl",
    "cactus": "cactus",
    "umbrella": "umbrella",
    "bell": "bell",
    "crown": "crown",
    "hat": "top-hat",
    "chair": "chair",
    "pineapple": "pineapple",
    "pumpkin": "jack-o-lantern",
    "cupcake": "cupcake",
    "balloon": "balloon",
    "snowman": "snowman",
    "dinosaur": "sauropod",
    "flamingo": "flamingo",
    "bicycle": "bicycle",
    "dolphin": "dolphin",
    "anchor": "anchor",
    "candle": "candle",
    "horse": "horse",
    "castle": "castle",
    "bus": "bus",
    "clock": "alarm-clock",
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (245, 130, 32),
    "yellow": (250, 210, 40),
    "green": (50, 160, 70),
    "blue": (45, 100, 220),
    "purple": (140, 60, 190),
    "pink": (245, 130, 180),
    "brown": (130, 80, 45),
    "black": (45, 45, 50),
    "white": (235, 235, 238),
}

PLAIN: dict[str, tuple[int, int, int]] = COLOURS | {"gray": (150, 150, 155)}

SETTINGS: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "in a green meadow", "in the grass"),
    "beach": ("on the beach", "on a sandy beach"),
    "sky": ("in the sky", "in the blue sky with clouds"),
    "sea": ("in the sea", "on the water"),
    "night": ("at night", "under the stars at night"),
    "snow": ("in the snow", "in the snow in winter"),
    "table": ("on a table", "on a wooden table"),
    "desert": ("in the desert", "on the desert sand"),
}

PLACES: dict[int, tuple[str, ...]] = {2: ("left", "right"), 3: ("left", "middle", "right")}
NUMBERS = ("one", "two", "three", "four")

# Words a person may type that the world itself does not draw yet: they get whole tokens all the same,
# so that a personal concept may have any of these class nouns.
MORE_WORDS = """
person man woman boy girl child baby face people friend robot toy doll puppet plush figure statue bear lion
tiger monkey mouse cow pig sheep goat chicken rooster bird eagle parrot swan frog snake lizard dragon
unicorn kangaroo camel whale shark lobster squid shell bee ant spider bug worm mug glass bottle vase pot pan
bowl plate spoon fork knife lamp lantern sofa bed desk shelf box bag purse basket bucket book pen pencil
phone camera computer keyboard watch ring key sword shield shoe boot sneaker sock glove scarf dress shirt
jacket glasses mask drum trumpet piano violin ball bat racket kite train truck tractor boat ship helicopter
bike scooter wheel flower rose tulip sunflower plant leaf pear orange lemon cherry strawberry grapes carrot
corn bread cake cookie pizza burger egg cheese donut ice cream tent tower bridge church door window stone
mountain forest river lake road street city garden room kitchen floor wall sun moon star cloud rain wind
fire ice animal bird vehicle food fruit furniture instrument building object thing creature gold silver teal
turquoise cyan magenta violet lime olive navy maroon beige dark light bright pale colorful striped spotted
patterned round square tall short wide thin thick old new young cute happy sad funny shiny soft wooden metal
glass paper stone running sitting standing flying sleeping jumping walking swimming smiling looking holding
wearing riding drawing painting photo picture image illustration icon sketch cartoon portrait style render
view close closeup front side back top bottom above below under over behind between near beside next inside
outside around with without and or of by for from to the a an is are at in on it its this that my your his
her their our some many few very two three four five six seven eight nine ten first second third background
scene day evening morning sunset spring summer autumn winter beautiful simple clean good nice plain empty
"""

FILLERS = "a photo picture illustration drawing image of an on against background object and next to"

TEMPLATES = (
    "{x}",
    "{x}",
    "a photo of {x}",
    "a picture of {x}",
    "an illustration of {x}",
    "a drawing of {x}",
    "an image of {x}",
)


@dataclass(frozen=True)
class Thing:
    """One object of a scene. ``colour`` None keeps the drawing's own colours; ``pose`` is a puppet's, in words."""

    noun: str
    colour: str | None
    pose: str = ""

    def phrase(self, classless: bool = False) -> str:
        noun = "object" if classless else self.noun
        words = " ".join(word for word in (self.pose, self.colour, noun) if word)
        return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass(frozen=True)
class Backdrop:
    """Where the scene happens: a setting by name, or a plain colour."""

    setting: str | None
    colour: str | None

    def phrase(self, random: Random) -> str:
        if self.setting:
            return random.choice(SETTINGS[self.setting])
        assert self.colour
        return random.choice(
            (f"on a {self.colour} background", f"on {self.colour}", f"against a {self.colour} background")
        ).replace("a orange", "an orange")


def caption(things: Sequence[Thing], backdrop: Backdrop, random: Random, classless: bool = False) -> str:
    """A plain-English caption of a scene; things are named from left to right."""
    phrases = [thing.phrase(classless) for thing in things]
    places = PLACES.get(len(phrases))
    if places and random.random() < 0.45:
        # The side first: a causal text encoder then knows it when it reads the thing.
        parts = [f"{_where(place)} {phrase}" for place, phrase in zip(places, phrases, strict=True)]
        text = ", ".join(parts[:-1]) + random.choice((", ", " and ")) + parts[-1]
    else:
        text = random.choice(TEMPLATES).format(x=_listed(phrases, random))
    if random.random() < 0.92:
        text += random.choice((" ", " ", ", ")) + backdrop.phrase(random)
    return text


def _where(place: str) -> str:
    return "in the middle" if place == "middle" else f"on the {place}"


def _listed(phrases: list[str], random: Random) -> str:
    """Things from left to right in words, with their sides or without."""
    if len(phrases) == 1:
        return phrases[0]
    if len(phrases) == 2:
        left, right = phrases
        return random.choice(
            (
                f"{left} on the left and {right} on the right",
                f"{left} on the left and {right} on the right",
                f"{left} and {right}",
                f"{left} next to {right}",
                f"{right} on the right and {left} on the left",
            )
        )
    if len(phrases) == 3:
        left, middle, right = phrases
        return random.choice(
            (
                f"{left} on the left, {middle} in the middle and {right} on the right",
                f"{left}, {middle} and {right}",
            )
        )
    return ", ".join(phrases[:-1]) + f" and {phrases[-1]}"


def vocabulary() -> list[str]:
    """Every word that gets a token of its own in the pocket tokenizer."""
    words = set(MORE_WORDS.split()) | set(CLASSES) | set(COLOURS) | set(PLAIN) | set(SETTINGS) | set(NUMBERS)
    words |= {word for phrases in SETTINGS.values() for phrase in phrases for word in phrase.split()}
    words |= {word for names in PLACES.values() for word in names}
    words |= set(FILLERS.split()) | {"left", "right", "middle"}
    return sorted(words)
