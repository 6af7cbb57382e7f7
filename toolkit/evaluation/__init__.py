"""A model to numbers or text."""
