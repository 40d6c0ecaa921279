"""Reinforcement learning on the trainer of this package: rollouts, rewards, advantages, one step, weights back."""
