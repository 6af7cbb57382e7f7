"""Text to tokens, tokens to shards, shards to batches. Never imports the model."""
