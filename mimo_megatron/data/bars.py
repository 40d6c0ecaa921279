"""Bar charts as inline SVG, coloured by the page's style sheet: no script, no other file. Hover shows exact numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 560, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 20, 26  # margins in pixels: counts on the left, ticks below, markers on top
_NUM_BINS = 44
_LABEL_WIDTH = 6.4  # of a letter of 11 pixels, with room to spare


@dataclass(frozen=True)
class Limit:
    """A value that is drawn as a line across the bars, such as a pack's capacity."""

    value: float
    label: str


def histogram(
    groups: Mapping[str, NDArray[np.float64]],
    *,
    label: str,
    is_log: bool = False,
    limits: Sequence[Limit] = (),
    bounds: tuple[float, float] | None = None,
) -> Markup:
    """How many values fall where, the groups stacked in the order given, in classes ``g0``, ``g1``, ...

    Without any value it is a line of text. On a log axis values must be positive.
    """
    every = np.concatenate([*groups.values(), np.zeros(0)])
    if not len(every):
        return Markup('<p class="quiet">none</p>')
    axis = _Axis.over(*(bounds or (float(every.min()), float(every.max()))), is_log=is_log, limits=limits)
    edges = axis.edges()
    counts = np.stack([np.histogram(values, edges)[0] for values in groups.values()])
    tallest = max(1, int(counts.sum(axis=0).max()))
    parts = [_grid(axis, tallest)]
    for place, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        below = 0
        for group, (name, count) in enumerate(zip(groups, counts[:, place].tolist(), strict=True)):
            if count:
                told = f"{exact(low)} to {exact(high)}: {count:,}" + (f" of {name}" if len(groups) > 1 else "")
                parts.append(_bar(axis, low, high, below, count, tallest, f"g{group % 6}", told))
                below += count
    parts += [_limit(axis, one) for one in limits if axis.low <= one.value <= axis.high]
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, label)
    return opening + Markup("").join(parts) + Markup("</svg>")


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    is_log: bool

    @classmethod
    def over(cls, low: float, high: float, *, is_log: bool, limits: Sequence[Limit]) -> "_Axis":
        """An axis that holds the values, and limits that are not far beyond them."""
        for limit in limits:
            if low / 4 <= limit.value <= high * 4:
                low, high = min(low, limit.value), max(high, limit.value)
        if is_log:
            return cls(low / 1.1, high * 1.1, True)
        room = (high - low) * 0.02 or abs(low) * 0.1 or 1.0
        return cls(low if low == 0 else low - room, high + room, False)

    def x(self, value: float) -> float:
        low, high, at = (math.log(one) if self.is_log else one for one in (self.low, self.high, value))
        return _LEFT + (at - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def edges(self) -> NDArray[np.float64]:
        space = np.geomspace if self.is_log else np.linspace
        return space(self.low, self.high, _NUM_BINS + 1)

    def ticks(self) -> list[float]:
        if not self.is_log:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
            step *= next(one for one in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * one) <= 6)
            return [step * place for place in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1,) if len(decades) > 4 else (1, 3) if len(decades) > 3 else (1, 2, 5)
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        return [one for one in found if self.low <= one <= self.high]


def _y(count: float, tallest: int) -> float:
    return _HEIGHT - _BOTTOM - count / tallest * (_HEIGHT - _TOP - _BOTTOM)


def _grid(axis: _Axis, tallest: int) -> Markup:
    lines = []
    for count in sorted({0, tallest // 2, tallest}):
        y = _y(count, tallest)
        lines.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
            + Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 6, y + 4, compact(count))
        )
    for tick in axis.ticks():
        at = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
        lines.append(at.format(axis.x(tick), _HEIGHT - 8, compact(tick)))
    return Markup("").join(lines)


def _bar(axis: _Axis, low: float, high: float, below: int, count: int, tallest: int, css: str, told: str) -> Markup:
    left, right = axis.x(low), axis.x(high)
    top, bottom = _y(below + count, tallest), _y(below, tallest)
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    ).format(css, left + 0.5, min(top, bottom - 0.7), max(right - left - 1, 1), max(bottom - top, 0.7), told)


def _limit(axis: _Axis, limit: Limit) -> Markup:
    x = axis.x(limit.value)
    side = "end" if x + _LABEL_WIDTH * len(limit.label) > _WIDTH else "start"
    return Markup(
        '<line class="limit" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
        '<text class="limit" x="{:.1f}" y="{}" text-anchor="{}">{}</text>'
    ).format(x, x, _TOP - 6, _HEIGHT - _BOTTOM, x + (-4 if side == "end" else 4), _TOP - 8, side, limit.label)


def compact(value: float) -> str:
    """For axes: 12.5k, 3M, 0.25."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def exact(value: float) -> str:
    """For hovering: whole numbers from 100 on, three digits below."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
