"""Mixed on-policy reinforcement learning (MORL): rollouts, rewards, one update, weights back to the engines."""
