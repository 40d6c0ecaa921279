"""The sections of ``gpu_suite.py`` (docs/gpu-suite.md)."""
