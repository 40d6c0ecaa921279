"""JPEGs decoded by NVIDIA DALI's pipeline on the CPU. DALI is an extra: imported where ``data.decoder`` is ``dali``.

Its decoder there is libjpeg-turbo's, with Pillow's settings. A pipeline has threads and a state of its own, so each
thread has one, and a process that was forked makes its own; it must not even end those that it inherited, whose threads
it would wait for.
"""

import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

_pipelines: dict[tuple[int, int], Any] = {}  # by process and thread; those of other processes are kept unused


def decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """[height, width, 3]; None where DALI refuses the file. It reads some damaged ones without a complaint."""
    mine = os.getpid(), threading.get_ident()
    if mine not in _pipelines:
        _pipelines[mine] = _pipeline()
    try:
        _pipelines[mine].feed_input("jpeg", [np.frombuffer(data, np.uint8)])
        (images,) = _pipelines[mine].run()
    except RuntimeError:
        del _pipelines[mine]  # after a failure no pipeline works again
        return None
    return np.array(images.at(0))  # a copy: the next run writes over it


def _pipeline() -> Any:
    made = Pipeline(1, 1, None, exec_pipelined=False, exec_async=False, prefetch_queue_depth=1)
    with made:
        jpeg = fn.external_source(name="jpeg", device="cpu")
        made.set_outputs(fn.decoders.image(jpeg, device="cpu", output_type=types.RGB, adjust_orientation=False))
    made.build()
    return made
