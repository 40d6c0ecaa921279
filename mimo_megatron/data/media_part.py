"""Which media of a pack one rank decodes: those that it encodes, and no others.

The ranks that train on one pack all read it, and know each medium's size from its header; so each finds the pieces that
it encodes before any is decoded. A piece is an image or one temporal step of a video (``model/vision_share.py``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mimo_megatron import _packing
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.vision_flops import piece_flops


@dataclass(frozen=True)
class MediaPart:
    """The pieces that rank ``rank`` gets when they are spread by predicted FLOPs over ``size`` ranks; where ``rank`` is
    None, none of them."""

    rank: int | None
    size: int

    def pieces(self, grids_I3: Sequence[tuple[int, int, int]], model: ModelConfig) -> tuple[int, ...]:
        """Their numbers among those of media with these patch grids, ascending."""
        if self.rank is None or not grids_I3:
            return ()
        assert model.vision is not None, "a text model has no media"
        costs = piece_flops(model.vision, model.text.width, grids_I3)
        ranks_U = _packing.spread(np.array(costs, np.int64), self.size)
        return tuple(np.flatnonzero(ranks_U == self.rank).tolist())


ALL_MEDIA = MediaPart(0, 1)
NO_MEDIA = MediaPart(None, 1)
