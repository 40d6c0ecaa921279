"""Rewards: pure rules for verifiable tasks, the service that serves them, its client. Never imports torch."""
