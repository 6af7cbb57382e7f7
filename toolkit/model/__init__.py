"""Batches to loss: GPT-2 and its exchange format. Never imports the data."""
