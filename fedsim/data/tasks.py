"""Small instruction tasks made by rule: one task is one client, as in Natural Instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from numpy.random import Generator


def _list(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> dict[str, str]:
    return {pair.partition("/")[0]: pair.partition("/")[2] for pair in text.split()}


WORDS = _list(
    "apple bread chair dance eagle field grape house ivory jolly knife lemon mouse night ocean "
    "piano queen river stone table uncle voice water young zebra amber brick cloud dream earth "
    "flame glass heart index judge koala light money north olive pearl quiet robin sugar tiger "
    "umber value wheat yacht angle beach candy devil entry fruit green honey image jewel"
)
DAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _list(
    "January February March April May June July August September October November December"
)
NUMBERS = _list("zero one two three four five six seven eight nine ten eleven twelve")
OPPOSITES = _pairs(
    "hot/cold big/small up/down fast/slow light/dark old/new wet/dry high/low hard/soft early/late "
    "open/closed full/empty rich/poor loud/quiet near/far thick/thin"
)
CAPITALS = _pairs(
    "France/Paris Italy/Rome Spain/Madrid Japan/Tokyo Egypt/Cairo Peru/Lima Cuba/Havana "
    "Kenya/Nairobi Norway/Oslo Greece/Athens Austria/Vienna Poland/Warsaw Chile/Santiago "
    "Portugal/Lisbon Ireland/Dublin Finland/Helsinki"
)
KINDS = {
    "animal": _list("dog cat horse sheep mouse tiger eagle zebra"),
    "fruit": _list("apple pear plum grape lemon cherry peach melon"),
    "colour": _list("red blue green yellow purple orange brown black"),
    "tool": _list("hammer saw drill axe spade rake chisel pliers"),
}
VALUES = {name: str(i) for i, name in enumerate(NUMBERS)}
SHORT = {month: month[:3] for month in MONTHS}
ROMAN = ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))


class Task(NamedTuple):
    """A task: its definition, and a function that draws one instance (input, output)."""

    definition: str
    draw: Callable[[Generator], tuple[str, str]]


def _word(g: Generator) -> str:
    return WORDS[int(g.integers(len(WORDS)))]


def _words(g: Generator, count: int = 3) -> list[str]:
    return [WORDS[int(i)] for i in g.choice(len(WORDS), count, replace=False)]


def _number(g: Generator, most: int = 50) -> int:
    return int(g.integers(1, most))


def _of_word(change: Callable[[str], str]) -> Callable[[Generator], tuple[str, str]]:
    def draw(g: Generator) -> tuple[str, str]:
        word = _word(g)
        return word, change(word)

    return draw


def _of_words(change: Callable[[list[str]], str]) -> Callable[[Generator], tuple[str, str]]:
    def draw(g: Generator) -> tuple[str, str]:
        words = _words(g)
        return " ".join(words), change(words)

    return draw


def _of_number(change: Callable[[int], object], most: int = 50) -> Callable[..., tuple[str, str]]:
    def draw(g: Generator) -> tuple[str, str]:
        number = _number(g, most)
        return str(number), str(change(number))

    return draw


def _of_two(change: Callable[[int, int], object]) -> Callable[[Generator], tuple[str, str]]:
    def draw(g: Generator) -> tuple[str, str]:
        a, b = _number(g), _number(g)
        return f"{a} {b}", str(change(a, b))

    return draw


def _of_table(table: dict[str, str]) -> Callable[[Generator], tuple[str, str]]:
    def draw(g: Generator) -> tuple[str, str]:
        key = list(table)[int(g.integers(len(table)))]
        return key, table[key]

    return draw


def _step(names: list[str], by: int) -> dict[str, str]:
    return {name: names[(i + by) % len(names)] for i, name in enumerate(names)}


def _kind(g: Generator) -> tuple[str, str]:
    kind = list(KINDS)[int(g.integers(len(KINDS)))]
    return KINDS[kind][int(g.integers(len(KINDS[kind])))], kind


def _odd(g: Generator) -> tuple[str, str]:
    one, other = (list(KINDS)[int(i)] for i in g.choice(len(KINDS), 2, replace=False))
    words = [KINDS[one][int(i)] for i in g.choice(8, 2, replace=False)]
    alien = KINDS[other][int(g.integers(8))]
    words.insert(int(g.integers(3)), alien)
    return " ".join(words), alien


def _roman(number: int) -> str:
    out = ""
    for value, sign in ROMAN:
        out += sign * (number // value)
        number %= value
    return out


def _vowels(word: str) -> str:
    return "".join(c for c in word if c in "aeiou")


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _flip(table: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


TASKS: dict[str, Task] = {
    "reverse": Task("Write the word backwards.", _of_word(lambda w: w[::-1])),
    "upper": Task("Write the word in capitals.", _of_word(str.upper)),
    "title": Task("Write the word with a capital first letter.", _of_word(str.title)),
    "first_letter": Task("Give the first letter of the word.", _of_word(lambda w: w[0])),
    "last_letter": Task("Give the last letter of the word.", _of_word(lambda w: w[-1])),
    "middle_letter": Task("Give the middle letter of the word.", _of_word(lambda w: w[2])),
    "sort_letters": Task("Sort the letters of the word.", _of_word(lambda w: "".join(sorted(w)))),
    "vowels": Task("List the vowels of the word in order.", _of_word(_vowels)),
    "consonants": Task(
        "Remove the vowels from the word.",
        _of_word(lambda w: "".join(c for c in w if c not in "aeiou")),
    ),
    "count_vowels": Task("Count the vowels in the word.", _of_word(lambda w: str(len(_vowels(w))))),
    "double_word": Task("Write the word twice.", _of_word(lambda w: f"{w} {w}")),
    "spell": Task("Spell the word with dashes.", _of_word("-".join)),
    "starts_with_vowel": Task(
        "Does the word start with a vowel?", _of_word(lambda w: _yes(w[0] in "aeiou"))
    ),
    "rotate": Task("Move the first letter to the end.", _of_word(lambda w: w[1:] + w[0])),
    "swap_ends": Task(
        "Swap the first and last letter.", _of_word(lambda w: w[-1] + w[1:-1] + w[0])
    ),
    "article": Task(
        "Put a or an before the word.", _of_word(lambda w: ("an " if w[0] in "aeiou" else "a ") + w)
    ),
    "first_word": Task("Give the first word.", _of_words(lambda w: w[0])),
    "last_word": Task("Give the last word.", _of_words(lambda w: w[-1])),
    "sort_words": Task("Sort the words.", _of_words(lambda w: " ".join(sorted(w)))),
    "reverse_words": Task("Reverse the words.", _of_words(lambda w: " ".join(w[::-1]))),
    "acronym": Task("Make an acronym of the words.", _of_words(lambda w: "".join(x[0] for x in w))),
    "join": Task("Join the words with dashes.", _of_words("-".join)),
    "without_middle": Task("Leave out the middle word.", _of_words(lambda w: f"{w[0]} {w[2]}")),
    "alphabetical_first": Task("Which word comes first in a dictionary?", _of_words(min)),
    "commas": Task("Put commas between the words.", _of_words(", ".join)),
    "add": Task("Add the numbers.", _of_two(lambda a, b: a + b)),
    "subtract": Task("Subtract the second number from the first.", _of_two(lambda a, b: a - b)),
    "larger": Task("Which number is larger?", _of_two(max)),
    "smaller": Task("Which number is smaller?", _of_two(min)),
    "sort_numbers": Task("Sort the numbers.", _of_two(lambda a, b: f"{min(a, b)} {max(a, b)}")),
    "same_parity": Task(
        "Are both numbers even or both odd?", _of_two(lambda a, b: _yes((a - b) % 2 == 0))
    ),
    "next_number": Task("Which number comes next?", _of_number(lambda n: n + 1)),
    "previous_number": Task("Which number comes before?", _of_number(lambda n: n - 1)),
    "double": Task("Double the number.", _of_number(lambda n: 2 * n)),
    "parity": Task("Is the number even or odd?", _of_number(lambda n: "odd" if n % 2 else "even")),
    "digit_sum": Task("Add the digits.", _of_number(lambda n: sum(map(int, str(n))), 1000)),
    "last_digit": Task("Give the last digit.", _of_number(lambda n: n % 10, 1000)),
    "binary": Task("Write the number in binary.", _of_number(lambda n: f"{n:b}")),
    "roman": Task("Write the number in Roman numerals.", _of_number(_roman, 40)),
    "number_word": Task("Write the number as a word.", _of_table(_flip(VALUES))),
    "word_number": Task("Write the word as a number.", _of_table(VALUES)),
    "next_day": Task("Which day comes next?", _of_table(_step(DAYS, 1))),
    "previous_day": Task("Which day comes before?", _of_table(_step(DAYS, -1))),
    "next_month": Task("Which month comes next?", _of_table(_step(MONTHS, 1))),
    "previous_month": Task("Which month comes before?", _of_table(_step(MONTHS, -1))),
    "short_month": Task("Shorten the month to three letters.", _of_table(SHORT)),
    "opposite": Task("Give the opposite.", _of_table({**OPPOSITES, **_flip(OPPOSITES)})),
    "capital": Task("What is the capital of the country?", _of_table(CAPITALS)),
    "country": Task("Which country has this capital?", _of_table(_flip(CAPITALS))),
    "kind": Task("Is it an animal, a fruit, a colour or a tool?", _kind),
    "odd_one_out": Task("Which word does not belong?", _odd),
}
"""51 tasks, by name."""
