"""Bradley-Terry reward models in use: held-out accuracy, calibration to [0, 1], a server for the reward service."""
