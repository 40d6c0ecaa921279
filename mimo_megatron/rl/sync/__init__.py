"""Weights from the trainer to the engines, every tensor accounted for."""
