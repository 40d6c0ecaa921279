"""A run (``run``, ``model``), models by name (``presets``), recipes and overrides (``load``), rules (``check``)."""
