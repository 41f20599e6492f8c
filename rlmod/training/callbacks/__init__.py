"""Displays and records of a run. Callbacks only observe: none changes the training."""
