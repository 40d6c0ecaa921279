"""The reward service: an HTTP face, three lanes, and workers that are killed and replaced (docs/rewards.md)."""
