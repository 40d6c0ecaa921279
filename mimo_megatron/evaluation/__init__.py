"""What a trained model says: log-probabilities of given text (``score``), and text of its own (``generate``)."""
