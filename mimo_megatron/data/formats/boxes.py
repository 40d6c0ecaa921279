"""Boxes and points in the answers of other sets, turned into marks in pixels of the stored image (``data/markup.py``).

A number says nothing of its frame, so the user does (``--boxes``): ``stored`` pixels of the file; ``resized`` pixels of
the image as Qwen's trainer resized it, which is what qwen-vl-finetune writes for Qwen2.5-VL; ``thousandths`` of width
and height, which are Qwen2-VL's and Qwen3-VL's; ``square`` for fractions of the image padded to a square, which are
LLaVA's; ``keep`` to leave the text alone. Recognised are ``"bbox_2d": [...]``, ``"point_2d": [...]``,
``<|box_start|>(x,y),(x,y)<|box_end|>``, and for ``square`` four fractions in brackets.
"""

import re
from collections.abc import Callable
from typing import Literal, get_args

from mimo_megatron.data.formats.chat import RowError
from mimo_megatron.data.image import smart_resize

BoxFrame = Literal["stored", "resized", "thousandths", "square", "keep"]
FRAMES: tuple[str, ...] = get_args(BoxFrame)
RESIZED_PIXELS = (3136, 1_003_520)
"""The limits of qwen-vl-finetune's process_bbox: 56 * 56 and 14 * 14 * 4 * 1280; sides are multiples of 28."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_JSON_BOX = re.compile(rf'("bbox_2d"\s*:\s*){_BOX}')
_JSON_POINT = re.compile(rf'("point_2d"\s*:\s*)\[{_NUMBER},{_NUMBER}\]')
_TOKEN_BOX = re.compile(rf"(<\|box_start\|>)\({_NUMBER},{_NUMBER}\),\({_NUMBER},{_NUMBER}\)<\|box_end\|>")
_FRACTION = r"\s*([01]\.\d+)\s*"
_FRACTION_BOX = re.compile(rf"()\[{_FRACTION},{_FRACTION},{_FRACTION},{_FRACTION}\]")
_REFERENCE = re.compile(r"<\|object_ref_(?:start|end)\|>")
_PIXEL_FORMS = (_JSON_BOX, _JSON_POINT, _TOKEN_BOX)


def holds_boxes(text: str) -> bool:
    """Whether the text holds coordinates that we know how to read."""
    return any(form.search(text) for form in (*_PIXEL_FORMS, _FRACTION_BOX))


def mark_boxes(
    text: str,
    frame: BoxFrame,
    stored: tuple[int, int] | None,
    field: str,
    resized_pixels: tuple[int, int] = RESIZED_PIXELS,
) -> str:
    """The text with every box and point as a mark. ``stored`` is (height, width) of the last image before it."""
    if frame == "keep":
        return text
    forms, others = (_PIXEL_FORMS, (_FRACTION_BOX,)) if frame != "square" else ((_FRACTION_BOX,), _PIXEL_FORMS)
    if stray := next((found for form in others if (found := form.search(text))), None):
        raise RowError(field, "box_frame", f"{stray[0]!r} is no box of the frame {frame!r}")
    text = _REFERENCE.sub("", text)
    if not any(form.search(text) for form in forms):
        return text
    if stored is None:
        raise RowError(field, "coordinates", "no image stands before the box")
    to_pixels = _to_pixels(frame, *stored, resized_pixels)

    def mark(found: re.Match[str]) -> str:
        values = [float(one) for one in found.groups()[1:]]
        pixels = [round(to_pixels(value, place % 2), 2) for place, value in enumerate(values)]
        _check(found[0], pixels, stored, field)
        name = "box" if len(pixels) == 4 else "point"
        listed = ",".join(f"{value:.2f}".rstrip("0").rstrip(".") for value in pixels)
        return f"{'' if found[1].startswith('<') else found[1]}<|{name}|>{listed}<|/{name}|>"

    for form in forms:
        text = form.sub(mark, text)
    return text


def _to_pixels(
    frame: BoxFrame, height: int, width: int, resized_pixels: tuple[int, int]
) -> Callable[[float, int], float]:
    """A function of (value, 0 for x and 1 for y) to pixels of the stored image."""
    sides = (width, height)
    if frame == "stored":
        return lambda value, axis: value
    if frame == "thousandths":
        return lambda value, axis: value * sides[axis] / 1000
    if frame == "square":
        longest = max(sides)
        return lambda value, axis: min(max(value * longest - (longest - sides[axis]) / 2, 0.0), float(sides[axis]))
    fewest, most = resized_pixels
    resized = smart_resize(height, width, multiple=28, min_pixels=fewest, max_pixels=most)[::-1]
    return lambda value, axis: value * sides[axis] / resized[axis]


def _check(found: str, pixels: list[float], stored: tuple[int, int], field: str) -> None:
    height, width = stored
    is_inside = all(0 <= x <= width for x in pixels[0::2]) and all(0 <= y <= height for y in pixels[1::2])
    if not is_inside or pixels[0] > pixels[-2] or pixels[1] > pixels[-1]:
        raise RowError(
            field,
            "coordinates",
            f"{found!r} is {pixels} in pixels of its image of {width} x {height}: outside, or its corners are swapped; "
            "is --boxes right?",
        )
