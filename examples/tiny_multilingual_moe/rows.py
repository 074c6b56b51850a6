"""Rows of the corpus: which template, with which words and numbers. A row is the same in every
language; `grammar.Language` renders it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import random
from dataclasses import dataclass

from grammar import Language, Slots

PEOPLE = (
    *("anna", "maria", "sara", "lina", "nina", "eva", "sofia", "laura"),
    *("tom", "david", "ali", "leo", "omar", "max", "ivan", "karim"),
)
EDIBLE = ("apple", "orange", "lemon", "egg", "cookie")
THINGS = (
    *EDIBLE,
    *("book", "pencil", "card", "stamp", "photo", "ticket", "ball", "toy"),
    *("balloon", "flower", "shell", "stone", "candle", "button", "cup"),
)
CONTAINERS = ("bag", "box", "basket")
COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
FOODS = ("bread", "rice", "soup", "cheese", "fruit", "cake", "fish", "salad")
PLACES = ("school", "market", "station", "library", "park", "beach", "hospital", "museum")
CITIES = ("paris", "berlin", "madrid", "moscow", "nairobi", "tokyo", "beijing", "cairo")
COUNTRIES = ("france", "germany", "spain", "russia", "kenya", "japan", "china", "egypt")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
ANIMALS = ("elephant", "horse", "cow", "dog", "cat", "bird", "mouse", "bee")  # from big to small
JOBS = ("teacher", "doctor", "cook", "driver", "singer", "nurse")
WEATHER = ("warm", "cold", "dry", "windy")

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
LARGEST = 99  # of every number in a problem
EVENTS = {
    "plus.buys": "+",
    "plus.finds": "+",
    "plus.gets": "+",
    "minus.gives": "-",
    "minus.loses": "-",
    "minus.sells": "-",
    "minus.eats": "-",
    "half.gives": "/",
}
QUESTIONS = {
    "ask.now": "",
    "ask.share": "/",
    "ask.pack": "/",
    "ask.more": "+",
    "ask.fewer": "-",
    "ask.times": "*",
    "ask.together": "+",
    "ask.cost": "*",
}
STORIES = {  # the steps, as operations on the running result and the slot that holds the number
    "story.pages": [("n", "*", "m")],
    "story.read": [("m", "*", "k"), ("", "+", "n")],
    "story.bus": [("n", "-", "m"), ("", "+", "k")],
    "story.age": [("n", "+", "m"), ("", "+", "k")],
    "story.change": [("n", "*", "m"), ("k", "-", "")],
    "story.class": [("n", "+", "m"), ("", "-", "k")],
    "story.walk": [("n", "+", "m"), ("", "*", "k")],
    "story.garden": [("n", "*", "m"), ("", "-", "k")],
}


@dataclass(frozen=True)
class Problem:
    """A word problem: its sentences by template and slots, its steps, and its answer."""

    parts: list[str]
    slots: list[Slots]
    steps: list[str]
    answer: int

    @property
    def key(self) -> int:
        """A number from the problem's templates and numbers: the same in every language, with
        other names and things, and in every run."""
        numbers = [{k: v for k, v in slots.items() if isinstance(v, int)} for slots in self.slots]
        text = json.dumps([self.parts, numbers], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def prompt(self, language: Language) -> str:
        """What the model is asked: the question and a line break."""
        return language.task(self.parts, self.slots) + "\n"

    @property
    def solution(self) -> str:
        """What the model should go on with: the steps; the last number is the answer."""
        return ", ".join(self.steps)


class Draw:
    """Draws numbers for one problem and keeps its steps; `ValueError` where none fits."""

    def __init__(self, random_state: random.Random) -> None:
        self.random = random_state
        self.steps: list[str] = []

    def step(self, left: int, sign: str, right: int) -> int:
        """Note ``left sign right`` and return its result, which has to be from 2 to `LARGEST`."""
        result = OPERATIONS[sign](left, right)
        exact = sign != "/" or left % right == 0
        if not (2 <= result <= LARGEST and exact):
            raise ValueError("out of range")
        self.steps.append(f"{left}{sign}{right}={result}")
        return result

    def number(self, sign: str, value: int) -> int:
        """A second operand that fits ``value sign ...``."""
        if sign == "+":
            return self.random.randint(2, min(30, LARGEST - value)) if value <= LARGEST - 2 else 0
        if sign == "-":
            return self.random.randint(2, max(2, value - 2))
        if sign == "*":
            return self.random.randint(2, 9)
        return self.random.choice([d for d in range(2, 10) if value % d == 0] or [0])


def draw_problem(random_state: random.Random) -> Problem:
    """One problem of one to three steps."""
    while True:
        draw = Draw(random_state)
        try:
            if random_state.random() < 0.3:
                parts, slots, answer = _story(draw)
            else:
                parts, slots, answer = _chain(draw)
        except (ValueError, ZeroDivisionError):
            continue
        if 1 <= len(draw.steps) <= 3:
            return Problem(parts, slots, draw.steps, answer)


def _story(draw: Draw) -> tuple[list[str], list[Slots], int]:
    name = draw.random.choice(list(STORIES))
    a, b = draw.random.sample(PEOPLE, 2)
    largest = 12 if any(sign == "*" for _, sign, _ in STORIES[name]) else 30
    numbers = {s: draw.random.randint(2, largest) for step in STORIES[name] for s in step[::2] if s}
    if name == "story.change":
        numbers["k"] = draw.random.randint(2, LARGEST)
    value = 0
    for left, sign, right in STORIES[name]:
        value = draw.step(numbers.get(left, value), sign, numbers.get(right, value))
    return [name], [{"a": a, "b": b, "obj": draw.random.choice(THINGS), **numbers}], value


def _chain(draw: Draw) -> tuple[list[str], list[Slots], int]:
    choose = draw.random.choice
    a, b = draw.random.sample(PEOPLE, 2)
    thing = choose(THINGS)
    common: Slots = {"a": a, "b": b, "obj": thing, "box": choose(CONTAINERS)}
    opening = draw.random.choices(["open.has", "open.boxes", "open.two"], [3, 1, 1])[0]
    value, first = _open(draw, opening)
    parts, slots = [opening], [common | first]
    for _ in range(draw.random.choices([0, 1, 2], [1, 2, 1])[0]):
        event = choose([e for e in EVENTS if e != "minus.eats" or thing in EDIBLE])
        number = 2 if event == "half.gives" else draw.number(EVENTS[event], value)
        value = draw.step(value, EVENTS[event], number)
        parts.append(event)
        slots.append(common | {"n": number})
    plain = len(parts) > 1 and draw.random.random() < 0.6
    question = "ask.now" if plain else choose(list(QUESTIONS))
    number = 0
    if sign := QUESTIONS[question]:
        number = draw.number(sign, value)
        value = draw.step(value, sign, number)
    return [*parts, question], [*slots, common | {"n": number}], value


def _open(draw: Draw, opening: str) -> tuple[int, Slots]:
    n, m = draw.random.randint(2, 9), draw.random.randint(2, 12)
    if opening == "open.boxes":
        return draw.step(n, "*", m), {"n": n, "m": m}
    if opening == "open.two":
        n, m = draw.random.randint(2, 30), draw.random.randint(2, 30)
        return draw.step(n, "+", m), {"n": n, "m": m}
    n = draw.random.randint(2, 50)
    return n, {"n": n}


def draw_lookup(random_state: random.Random) -> Problem:
    """A question about numbers that asks for one that stands in the text: nothing to work out.

    Two people have things; the one who is not asked about may get or lose some.
    """
    people = random_state.sample(PEOPLE, 2)
    things = random_state.choices(THINGS, k=2)
    owned = [random_state.randint(2, 50) for _ in people]
    parts = ["open.has"] * 2
    slots: list[Slots] = [
        {"a": person, "obj": thing, "n": number}
        for person, thing, number in zip(people, things, owned, strict=True)
    ]
    asked = random_state.randrange(2)
    if random_state.random() < 0.4:
        other = 1 - asked
        parts.append(random_state.choice(["plus.buys", "plus.finds", "minus.loses", "minus.sells"]))
        number = random_state.randint(2, max(2, owned[other] - 2))
        slots.append({"a": people[other], "obj": things[other], "n": number})
    parts.append("ask.now")
    slots.append({"a": people[asked], "obj": things[asked], "n": 0})
    return Problem(parts, slots, [str(owned[asked])], owned[asked])


def draw_slots(random_state: random.Random) -> Slots:
    """Slots for any general template."""
    choose, sample = random_state.choice, random_state.sample
    a, b = sample(PEOPLE, 2)
    thing, other_thing = sample(THINGS, 2)
    food, other = sample(FOODS, 2)
    big, small = sorted(sample(range(len(ANIMALS)), 2))
    day = random_state.randrange(7)
    home, town = sample(range(len(CITIES)), 2)
    m, n = sorted(sample(range(2, 100), 2))
    hour = random_state.randint(2, 11)
    return {
        "a": a, "b": b, "obj": thing, "thing": other_thing, "food": food, "other": other,
        "box": choose(CONTAINERS), "color": choose(COLORS), "place": choose(PLACES),
        "city": CITIES[home], "country": COUNTRIES[home], "town": CITIES[town],
        "weekday": WEEKDAYS[day], "next": WEEKDAYS[(day + 1) % 7], "month": choose(MONTHS),
        "big": ANIMALS[big], "small": ANIMALS[small], "job": choose(JOBS),
        "weather": choose(WEATHER), "h": hour,
        "dawn": (hour + 5) % 12 + 1,  # the hour as Swahili counts it
        "d": random_state.randint(2, 28), "m": m, "n": n,
    }  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """A row of general text: a template and its slots."""

    template: str
    slots: Slots

    def text(self, language: Language) -> str:
        """The text of the row; a quiz is a prompt and its answer."""
        if self.template in language.data["general"]:
            return language.fill(language.data["general"][self.template], self.slots)
        question, answer = language.data["quiz"][self.template.removeprefix("quiz.")]
        return f"{language.fill(question, self.slots)}\n{language.fill(answer, self.slots)}"

    def is_open(self, language: Language) -> bool:
        """Whether the template has slots, so that there are many such rows."""
        template = language.data["general"].get(self.template)
        return template is None or "{" in template


def draw_sentence(random_state: random.Random, english: Language) -> Sentence:
    """One row of general text; one in four is a quiz."""
    quiz = random_state.random() < 0.25
    names = [f"quiz.{q}" for q in english.data["quiz"]] if quiz else list(english.data["general"])
    return Sentence(random_state.choice(names), draw_slots(random_state))
