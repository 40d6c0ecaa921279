"""The seamless rollout scheduler: which prompts to generate now, when a batch is full, which groups are in it."""
