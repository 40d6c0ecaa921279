"""Line charts as inline SVG: no script, no external resource, colours from the page's style sheet.

A point is never invented: a value that is missing leaves a gap, and thinning for long runs keeps each bucket's lowest
and highest value, so that a spike of one step stays visible. Hover shows exact values through ``<title>``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 26  # margins, in pixels, for tick labels of up to six digits
_LETTER_WIDTH = 6.6  # of a bold 11-pixel letter, on average, with room to spare
_LOG_DECADES = 4  # a log axis reaches at most this far below its highest value: warm-up starts near 0
_NARROWEST, _SMALLEST = 1e-9, 1e-30  # an axis spans more than this, relative and absolute: ticks differ in their digits
_NUM_HOVER_COLUMNS = 200
_NUM_BUCKETS = 400

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line: ``ys`` over rising ``xs``, NaN where there is no value. ``css`` names its classes in the style sheet."""

    name: str
    xs: NDArray[np.float64]
    ys: NDArray[np.float64]
    css: str
    has_tooltip: bool = True


@dataclass(frozen=True)
class Marker:
    """Something that happened at ``x``; a stage writes its label along the top, the others show it on hover."""

    x: float
    label: str
    kind: Literal["resume", "checkpoint", "stage"]


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    markers: Sequence[Marker] = (),
    y_limits: tuple[float | None, float | None] = (None, None),
    y_format: Format | None = None,
    is_log: bool = False,
    width: int = 560,
    height: int = 210,
) -> Markup:
    """The chart as one ``<svg>``; ``label`` is what a screen reader says. At least one value must be finite."""
    every_x, every_y = (np.concatenate(arrays) for arrays in zip(*((one.xs, one.ys) for one in series), strict=True))
    x_axis = _Axis.over(float(every_x.min()), float(every_x.max()), _LEFT, width - _RIGHT, max_ticks=width // 90)
    low, high = _value_range(every_y[np.isfinite(every_y)], y_limits, is_log)
    y_axis = _Axis.over(low, high, height - _BOTTOM, _TOP, max_ticks=5, is_log=is_log)
    parts = [
        _grid(x_axis, y_axis, width, height, y_format or compact),
        *_markers(markers, x_axis, height),
        *(_line(one, x_axis, y_axis) for one in series),
        *_hover_columns([one for one in series if one.has_tooltip], x_axis, y_axis, width, height, y_format or exact),
    ]
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)
    return opening + Markup("\n").join(parts) + Markup("</svg>")


def smooth(ys: NDArray[np.float64], num_steps: int) -> NDArray[np.float64]:
    """A mean that reaches about ``num_steps / 2`` to both sides, so that it does not lag; a gap stays a gap.

    Weights fall off exponentially, and are normalised at the ends.
    """
    keep = 1 - 2 / (num_steps + 1)
    finite = np.flatnonzero(np.isfinite(ys))
    sums, weights = -ys[finite], np.full(len(finite), -1.0)  # both passes count the point itself
    for direction in (1, -1):
        total = weight = 0.0
        for i in range(len(finite))[::direction]:
            total, weight = keep * total + ys[finite[i]], keep * weight + 1
            sums[i] += total
            weights[i] += weight
    smoothed = np.full_like(ys, np.nan)
    smoothed[finite] = sums / weights
    return smoothed


def compact(value: float) -> str:
    """For axes and figures: 12.5k, 3M, 0.25, 1e-5."""
    if value and abs(value) < 1e-3:
        return scientific(value)
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """For learning rates: 1e-3, 2.5e-5."""
    if not value:
        return "0"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def exact(value: float) -> str:
    """For tooltips: five digits, thousands grouped."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """At most ``max_ticks + 1`` round values inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten inside [low, high]; where there are fewer than three, their multiples by 2 and 5 too."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5)):
        found = [multiple * 10.0**e for e in exponents for multiple in multiples]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) > 2:
            break
    return found


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    is_log: bool

    @classmethod
    def over(
        cls, low: float, high: float, start: float, end: float, *, max_ticks: int, is_log: bool = False
    ) -> "_Axis":
        """The axis from ``low`` (drawn at ``start``) to ``high`` (at ``end``); a single value gets some room."""
        if high - low <= max(_NARROWEST * max(abs(low), abs(high)), _SMALLEST):
            room = max(abs(low), abs(high)) / 2
            room = room if room > _SMALLEST else 0.5
            low, high = low - room, high + room
        marks = log_ticks(low, high) if is_log else ticks(low, high, max_ticks)
        return cls(low, high, start, end, tuple(marks), is_log)

    def place(self, values: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Pixels of ``values``; those outside the axis are drawn on its border."""
        low, high, at = self.low, self.high, np.clip(values, self.low, self.high)
        if self.is_log:
            low, high, at = math.log(low), math.log(high), np.log(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def _value_range(
    values: NDArray[np.float64], limits: tuple[float | None, float | None], is_log: bool
) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if is_log:
        low = max(float(values[values > 0].min()), high * 10.0**-_LOG_DECADES)
        return low / 1.15, high * 1.15
    room = 0.06 * (high - low)
    if low >= 0 and low < 0.35 * high:  # near enough to zero to start there, which is easier to judge
        low, high = 0.0, high + room
    else:
        low, high = low - room, high + room
    return low if limits[0] is None else limits[0], high if limits[1] is None else limits[1]


def _grid(x_axis: _Axis, y_axis: _Axis, width: int, height: int, y_format: Format) -> Markup:
    lines = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/><text class="y" x="{}" y="{y}">{}</text>').format(
            _LEFT, width - _RIGHT, _LEFT - 8, y_format(value), y=_px(y_axis.place(value))
        )
        for value in y_axis.ticks
    ]
    lines += [
        Markup('<text class="x" x="{}" y="{}">{}</text>').format(_px(x_axis.place(value)), height - 8, compact(value))
        for value in x_axis.ticks
        if value == int(value)
    ]
    base = height - _BOTTOM
    lines.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(_LEFT, width - _RIGHT, y=base))
    return Markup("").join(lines)


def _markers(markers: Sequence[Marker], x_axis: _Axis, height: int) -> list[Markup]:
    base = height - _BOTTOM
    checkpoint = Markup('<path class="checkpoint" d="M{x} {base}l-4 7h8z"><title>{label}</title></path>')
    rule = Markup('<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{base}"><title>{label}</title></line>')
    drawn = []
    for marker in markers:
        form = checkpoint if marker.kind == "checkpoint" else rule
        x = _px(x_axis.place(marker.x))
        drawn.append(form.format(x=x, top=_TOP, base=base, kind=marker.kind, label=marker.label))
    stages = [marker for marker in markers if marker.kind == "stage"]
    starts = [float(x_axis.place(stage.x)) for stage in stages]
    for stage, start, end in zip(stages, starts, [*starts, x_axis.end][1:], strict=True):
        num_letters = max(1, int((end - start - 8) / _LETTER_WIDTH))
        label = stage.label if len(stage.label) <= num_letters else stage.label[: num_letters - 1] + "…"
        drawn.append(Markup('<text class="stage" x="{}" y="{}">{}</text>').format(_px(start + 5), _TOP - 3, label))
    return drawn


def _line(series: Series, x_axis: _Axis, y_axis: _Axis) -> Markup:
    xs, ys = x_axis.place(series.xs), y_axis.place(series.ys)
    pieces: list[list[str]] = [[]]  # a missing value ends one
    for i in _thin(series.ys):
        if math.isfinite(ys[i]):
            pieces[-1].append(f"{'L' if pieces[-1] else 'M'}{_px(xs[i])} {_px(ys[i])}")
        elif pieces[-1]:
            pieces.append([])
    for piece in pieces:
        if len(piece) == 1:
            piece.append("h0.01")  # a round line cap makes one point visible
    commands = [command for piece in pieces for command in piece]
    return Markup('<path class="line {}" d="{}"/>').format(series.css, "".join(commands))


def _thin(ys: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indexes to draw: all of a short series; of a long one the lowest, the highest and any gap of each bucket."""
    if len(ys) <= 2 * _NUM_BUCKETS:
        return np.arange(len(ys))
    kept = {0, len(ys) - 1}
    for bucket in np.array_split(np.arange(len(ys)), _NUM_BUCKETS):
        values = ys[bucket]
        finite = np.flatnonzero(np.isfinite(values))
        if len(finite):
            kept |= {int(bucket[finite[pick(values[finite])]]) for pick in (np.argmin, np.argmax)}
        kept |= {int(i) for i in bucket[~np.isfinite(values)][:1]}
    return np.array(sorted(kept))


def _hover_columns(
    series: Sequence[Series], x_axis: _Axis, y_axis: _Axis, width: int, height: int, y_format: Format
) -> list[Markup]:
    """Invisible columns across the plot; the one under the pointer shows its rule, points and values."""
    xs = np.unique(np.concatenate([one.xs for one in series]))
    xs = xs[np.unique(np.linspace(0, len(xs) - 1, min(len(xs), _NUM_HOVER_COLUMNS)).astype(int))]
    pixels = x_axis.place(xs)
    borders = np.concatenate([[_LEFT], (pixels[1:] + pixels[:-1]) / 2, [width - _RIGHT]])
    columns = []
    for i, x in enumerate(xs):
        points, said = Markup(""), [f"step {x:,.0f}"]
        for one in series:
            at = np.flatnonzero(one.xs == x)
            if len(at) and math.isfinite(value := float(one.ys[at[0]])):
                said.append(f"{one.name} {y_format(value)}")
                points += Markup('<circle class="{}" cx="{}" cy="{}" r="3"/>').format(
                    one.css, _px(pixels[i]), _px(y_axis.place(value))
                )
        columns.append(
            Markup(
                '<g class="hover"><rect x="{}" y="{}" width="{}" height="{}"/>'
                '<line x1="{x}" x2="{x}" y1="{}" y2="{}"/>{}<title>{}</title></g>'
            ).format(
                _px(borders[i]), _TOP, _px(borders[i + 1] - borders[i]), height - _BOTTOM - _TOP,
                _TOP, height - _BOTTOM, points, "\n".join(said), x=_px(pixels[i]),
            )
        )  # fmt: skip
    return columns


def _px(value: NDArray[np.float64] | float) -> str:
    return f"{float(value):.1f}"
