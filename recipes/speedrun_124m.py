"""GPT-2 124M with Muon: meant to reach the loss of `train_124m.py` on 0.4 of its tokens.

The architecture is GPT-2's, so the weights load in `transformers` as ever; what differs is how they are trained. For a small
model 0.4 of the tokens sufficed, see README.md; at 124M that is an expectation.

    accelerate launch recipes/speedrun_124m.py
"""

from toolkit.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    TrainingConfig,
    gpt2_config,
)
from toolkit.recipe import run

CONFIG = TrainConfig(
    run=RunConfig(dir="runs/speedrun-124m"),
    # Residual projections start at zero: every block begins as the identity, and no warm-up has to undo its noise.
    model=gpt2_config("124M", context_length=1024, zero_init_residual=True),
    data=DataConfig(path=("data/fineweb-edu-10b",), sequence_length=1024),
    training=TrainingConfig(
        tokens_per_step=2**19,  # as train_124m.py
        max_steps=7_629,  # 2**19 * 7,629 = 4.0 billion tokens: 0.4 of train_124m.py's
        micro_batch_size=16,  # what `toolkit plan` finds for 12 GB
        eval_every=250,
        checkpoint_every=250,
        sample_every=1000,
    ),
    optimizer=OptimizerConfig(
        name="muon",
        muon_learning_rate=0.02,  # others' for 124M at this batch: Jordan et al. 2024
        learning_rate=2e-3,  # AdamW's, for embeddings, biases and gains
        weight_decay=0.1,
        muon_weight_decay=0.1,  # a small model was better with it: tests/benchmarks/tokens_to_loss.py
    ),
    schedule=ScheduleConfig(
        name="linear",  # the whole run after a short warm-up, down to zero
        warmup_steps=150,
        decay_steps=7_629 - 150,  # to the last step
        final_ratio=0.0,
    ),
    evaluation=EvaluationConfig(max_tokens=10_485_760),
    checkpoint=CheckpointConfig(keep_last=2, keep_every=2500),
)

if __name__ == "__main__":
    run(CONFIG)
