"""Train MiMo-VL-7B-class vision-language models on Megatron-core; every layout is proven equal to one process."""

__version__ = "0.1.0"
