"""Optimizer, schedule, checkpoints, metrics, and the trainer that ties them together."""
