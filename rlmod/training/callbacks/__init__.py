"""Displays and records of a run. Callbacks only watch: none changes what is trained."""
