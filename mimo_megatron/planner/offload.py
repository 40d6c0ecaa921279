"""Where saved tensors lie over a forward and a backward pass, with and without ``train.offload_activations``.

The layers of a row of parts are numbered in the order of their forward, those of the encoder first. On the device are
the layer at work, in the forward pass the ``IN_FLIGHT`` before it, in the backward pass the one that it will come to
next; all are on the host from their forward until their backward (``mimo_megatron/offload.py``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from mimo_megatron.config.run import Offload
from mimo_megatron.planner.setting import Part

IN_FLIGHT = 2
_VISION = {"vision attention": True, "vision mlp": False, "vision block": True}
_TEXT = {"attention": True, "mlp": False, "layer": True, "join": True, "prediction": True, "norm": False}
"""Parts whose saved tensors leave, and whether a layer begins with them. A prediction layer is one, with the decoder
layer inside it."""
_LAYERS: dict[Offload, dict[str, bool]] = {
    "none": {}, "vision": _VISION, "text": _TEXT, "all": _VISION | _TEXT,
}  # fmt: skip

Moment = tuple[int, int]
"""(saved and on the device, needed beside it)."""


@dataclass(frozen=True)
class Row:
    """A stage's parts."""

    parts: tuple[Part, ...]
    offload: Offload

    @cached_property
    def numbers(self) -> list[int | None]:
        """The layer that a part leaves with; None where its tensors stay."""
        begins, number, is_prediction, found = _LAYERS[self.offload], -1, False, list[int | None]()
        for part in self.parts:
            starts = begins.get(part.name)
            is_prediction = part.name == "join" or (is_prediction and part.name in ("attention", "mlp"))
            number += bool(starts) and not (is_prediction and part.name != "join")
            found.append(number if starts is not None and number >= 0 else None)
        return found

    @cached_property
    def sizes(self) -> dict[int, int]:
        """What every layer saves."""
        sizes: dict[int, int] = {}
        for part, number in zip(self.parts, self.numbers, strict=True):
            if number is not None:
                sizes[number] = sizes.get(number, 0) + part.saved
        return sizes

    @property
    def stays(self) -> int:
        """On the device from forward to backward."""
        return sum(part.saved for part, number in zip(self.parts, self.numbers, strict=True) if number is None)

    @property
    def on_host(self) -> int:
        return sum(self.sizes.values())

    def leaving_after(self, leaving: Sequence[int]) -> list[int]:
        """Sizes of the newest layers after this forward, which were ``leaving`` before it."""
        return [*leaving, *self.sizes.values()][-IN_FLIGHT:]

    def forward(self, leaving: Sequence[int]) -> Iterator[Moment]:
        for saved, number, last, part in self._walk():
            finished = last if number is None else last - 1
            older = [*leaving, *(size for one, size in self.sizes.items() if one <= finished)]
            yield saved + sum(older[-IN_FLIGHT:]), part.forward

    def backward(self, leaving: Sequence[int]) -> Iterator[Moment]:
        """``leaving`` are this row's own newest layers where it was the last one to run forward, else none."""
        for saved, number, last, part in self._walk():
            if number is None and last + 1 == len(self.sizes):  # no layer's backward has come
                back = sum(leaving)
            else:
                back = self.sizes.get(last if number is None else number - 1, 0)
            yield saved + back, part.backward

    def _walk(self) -> Iterator[tuple[int, int | None, int, Part]]:
        """(saved up to and with the part, by what stays and by its own layer; its number; the last layer's up to here,
        -1 before the first; the part)."""
        stays = at_work = 0
        last = -1
        for part, number in zip(self.parts, self.numbers, strict=True):
            if number is None:
                stays += part.saved
                at_work = 0
            else:
                at_work = (at_work if number == last else 0) + part.saved
                last = number
            yield stays + at_work, number, last, part
