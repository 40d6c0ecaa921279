from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MAX_CAPACITY: int

def pack_one(lengths: NDArray[np.integer], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def pack_two(
    tokens: NDArray[np.integer], patches: NDArray[np.integer], token_capacity: int, patch_capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def pack_balanced(
    tokens: NDArray[np.integer],
    patches: NDArray[np.integer],
    costs: NDArray[np.integer],
    vision_costs: NDArray[np.integer],
    token_capacity: int,
    patch_capacity: int,
    is_cancelled: Callable[[], bool] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def deal(
    costs: NDArray[np.integer], vision_costs: NDArray[np.integer], num_ranks: int, proposals_per_pack: int
) -> NDArray[np.int64]: ...
def spread(costs: NDArray[np.integer], num_ranks: int) -> NDArray[np.int64]: ...
def resize_ways() -> list[str]: ...
def resize_to_patches(
    frame: NDArray[np.uint8],
    height: int,
    width: int,
    patch: int,
    merge: int,
    frames: int,
    number: int,
    out: NDArray[np.uint8],
    way: str = "",
) -> None: ...
