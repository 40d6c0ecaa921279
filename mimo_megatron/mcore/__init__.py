"""The only folder that imports megatron (with ``platform``, which makes it run on the CPU).

Megatron warns about every optional package it does without; ``mimo-megatron doctor`` reports those instead.
"""

import warnings

for _category in (UserWarning, FutureWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"megatron\.core\b.*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\b.*")
