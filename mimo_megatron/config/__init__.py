"""What a run is (``run``, ``model``), models by name (``presets``), recipes and overrides (``load``), layouts (``check``)."""
