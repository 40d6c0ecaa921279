"""Doors and recipes: what a user runs."""
