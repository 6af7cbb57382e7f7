"""GPT-2 pretraining: text -> tokens -> shards -> batches -> loss -> weights that anyone can load."""
