r"""Units of measure after a number: their dimension and size, so that 5 km is 5000 m and no mass is a length.

A word that is in no table is a unit of its own (apples are no oranges).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    dimension: Dimension
    size: Fraction
    """In the base units of the tables below."""


def _table(dimension: str, sizes: str) -> dict[str, tuple[dict[str, int], Fraction]]:
    """``"m meter metre=1 km=1000"``: names, then their size."""
    found = {}
    for entry in sizes.split(";"):
        words, _, size = entry.partition("=")
        powers = {base[0]: int(base[1:] or 1) for base in dimension.split()} if dimension != "1" else {}
        found.update({word: (powers, Fraction(size)) for word in words.split()})
    return found


_COUNTERS = "元个人次种只本件张名条块辆棵"
# Base units by their first letter: L metre, M kilogram, T second, A ampere, K kelvin; others are their own dimension.
_UNITS: dict[str, tuple[dict[str, int], Fraction]] = {
    **_table("L", "m meter metre=1;km kilometer kilometre=1000;dm decimeter decimetre=1/10;nm nanometer=1/1000000000"),
    **_table("L", "cm centimeter centimetre=1/100;mm millimeter millimetre=1/1000;in inch inches=127/5000"),
    **_table("L", "ft foot feet=381/1250;yd yard=1143/1250;mi mile=201168/125"),
    **_table("M", "kg kilogram=1;g gram=1/1000;mg milligram=1/1000000;lb lbs pound=45359237/100000000;t tonne=1000"),
    **_table("T", "s sec second=1;ms millisecond=1/1000;min minute=60;h hr hour=3600;day=86400;week=604800"),
    **_table("L3", "l L liter litre=1/1000;ml mL milliliter millilitre=1/1000000"),
    **_table("L1 T-1", "mph=1397/3125;kmh kph=5/18"),
    **_table("L1 M1 T-2", "N newton=1"),
    **_table("L2 M1 T-2", "J joule=1;kJ kilojoule=1000"),
    **_table("L2 M1 T-3", "W watt=1;kW kilowatt=1000"),
    **_table("L-1 M1 T-2", "Pa pascal=1;kPa=1000"),
    **_table("T-1", "Hz hertz=1"),
    **_table("A", "A ampere amp=1"),
    **_table("K", "K kelvin=1"),
    **_table("1", "thousand=1000;million=1000000;billion=1000000000;trillion=1000000000000"),
    **_table("L", "米=1;千米 公里=1000;厘米=1/100;毫米=1/1000;分米=1/10"),
    **_table("L2", "平方米=1;平方厘米=1/10000;平方千米=1000000"),
    **_table("L3", "立方米=1;立方厘米 毫升=1/1000000;升=1/1000"),
    **_table("M", "千克 公斤=1;克=1/1000;吨=1000"),
    **_table("T", "秒=1;分钟=60;小时=3600;天=86400"),
    **_table("$", "dollar usd USD=1;cent ¢=1/100"),
    **_table("€", "€ euro=1"),
    **_table("£", "£=1"),
    **_table("¥", "¥ yen=1"),
    **_table("°", "° degree=1"),
    **_table("r", "rad radian=1"),
    **_table("Ω", "Ω ohm=1;kΩ=1000"),
    **{sign: ({sign: 1}, Fraction(1)) for sign in _COUNTERS},
}  # fmt: skip
KNOWN = frozenset(_UNITS)
DEGREE: Dimension = (("°", 1),)
RADIAN: Dimension = (("r", 1),)
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "squared": 2, "cubed": 3}
# Words of a sentence, behind which a second answer or a doubt may hide, are no unit.
_PROSE_WORDS = (
    "or and not maybe perhaps possibly if between to is are was about approximately roughly less more than at least "
    "most either but then so no another also else instead respectively when where for all any "
    "one two three four five six seven eight nine ten zero wrong right false true "
    # and what makes another number of the one before it
    "hundred hundreds dozen dozens half halves third thirds fourth fourths fifth fifths factorial plus minus times "
    "over negative percent percentage pct never incorrect"
)
_PROSE = frozenset(_PROSE_WORDS.split())
MAX_WORDS = 4
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_PART = re.compile(r"([A-Za-zµΩ$€£¥¢°\u4e00-\u9fff]+)(?:\s?\^\s?\{?\s?(-?\d)\s?\}?)?|([/*·])|\s+")


def read_unit(text: str) -> Unit | None:
    r"""``km/h``, ``kg m/s^2``, ``square meters``, ``apples``; None for what is no unit."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:cdot|times)\s*", "*", text).replace(r"\degree", " ° ").replace(r"\$", " $ ")
    text = re.sub(r"\bper\b", "/", text).strip(" .")
    words = re.findall(r"[a-z]+", text.lower())
    if len(words) > MAX_WORDS or not _PROSE.isdisjoint(words):
        return None
    if _CHINESE.search(text) and text not in _UNITS:  # no words between them: a doubt could hide in any other
        return None
    powers: dict[str, int] = {}
    size, sign, pending, place = Fraction(1), 1, 1, 0
    last: tuple[dict[str, int], Fraction] | None = None
    for part in _PART.finditer(text):
        if part.start() != place:
            return None
        place = part.end()
        word, power, operator = part.groups()
        if operator:
            sign = -1 if operator == "/" else 1
        elif word and word.lower() in _POWERS:
            number = _POWERS[word.lower()]
            if word.lower().endswith("ed") and last:
                size *= _add(powers, last, sign * (number - 1))
            else:
                pending = number
        elif word:
            last = _look_up(word)
            size *= _add(powers, last, sign * pending * int(power or 1))
            pending = 1
    if place != len(text) or last is None:
        return None
    return Unit(tuple(sorted((base, power) for base, power in powers.items() if power)), size)


def _add(powers: dict[str, int], unit: tuple[dict[str, int], Fraction], times: int) -> Fraction:
    for base, power in unit[0].items():
        powers[base] = powers.get(base, 0) + power * times
    return unit[1] ** times


def _look_up(word: str) -> tuple[dict[str, int], Fraction]:
    if word in _UNITS:
        return _UNITS[word]
    # M is mega where m is milli; MPa is no mPa and GB no Gb, but Cats are cats.
    is_symbol = (len(word) == 2 and word[0] == "M") or (len(word) < 5 and not word[1:].islower())
    lower = word.lower()
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in _UNITS and len(name) > 1 and not (is_symbol and word[0] == "M"):
            return _UNITS[name]
    return ({word if is_symbol else lower.removesuffix("s"): 1}, Fraction(1))
