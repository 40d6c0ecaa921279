"""A rank-aware logger: rank 0 speaks, the others only warn. ``once`` keeps a repeated remark to one line."""

import functools
import logging
import sys

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def get_logger(name: str = "mimo_megatron") -> logging.Logger:
    return logging.getLogger(name)


def set_up(rank: int = 0, level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr; ranks above 0 print warnings only, with their rank."""
    logger = get_logger()
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False


@functools.cache
def once(message: str, level: int = logging.INFO) -> None:
    """Log ``message`` the first time it is given in this process."""
    get_logger().log(level, message)
