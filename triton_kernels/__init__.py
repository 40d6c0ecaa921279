"""GPU kernels in Triton, one op per file: reference, kernels, autograd, public op. Imports torch and triton only.

Installed under the import name ``mimo_triton_kernels``, because ``triton_kernels`` is a name that vLLM looks for.
"""
