"""Lets a torchvision built for CUDA be imported beside a CPU torch; `make vllm-env` installs it only where needed.

Such a torchvision cannot load its compiled operators, and then declares the shapes of their results without the
operators themselves being known. vLLM wants the package for its Python parts alone, so it is enough to name the two
operators just before the import. A ``.pth`` file of one line imports this module when the interpreter starts.
"""

import importlib.abc
import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; notices the first import of torchvision."""

    library = None

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            import torch  # not before it is asked for: every start of this interpreter runs this file

            sys.meta_path.remove(self)
            _BeforeTorchvision.library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                _BeforeTorchvision.library.define(schema)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
