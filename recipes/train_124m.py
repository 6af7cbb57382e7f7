"""GPT-2 124M on 10 billion tokens of FineWeb-Edu.

One 12 GB GPU, or any number with DDP: the tokens per step, and so the result, stay the same.

    accelerate launch recipes/train_124m.py                          as below
    accelerate launch recipes/train_124m.py --run.dir runs/b --optimizer.learning-rate 3e-4
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
    run=RunConfig(dir="runs/gpt2-124m"),
    model=gpt2_config("124M", context_length=1024),
    data=DataConfig(path=("data/fineweb-edu-10b",), sequence_length=1024),
    training=TrainingConfig(
        tokens_per_step=2**19,  # 524,288: GPT-3 Small's half a million
        max_steps=19_073,  # 2**19 * 19,073 = 10.0 billion tokens: one epoch
        micro_batch_size=16,  # what `toolkit plan` finds for 12 GB; 2**19 / (16 * 1024) = 32 accumulation steps on one GPU
        eval_every=250,
        checkpoint_every=250,  # 131M tokens: about 2.5 hours on an RTX 3060
        sample_every=1000,
    ),
    optimizer=OptimizerConfig(learning_rate=6e-4, weight_decay=0.1),  # GPT-3 Small: Brown et al. 2020, table 2.1
    schedule=ScheduleConfig(
        name="cosine",
        warmup_steps=715,  # 715 * 2**19 = 375M tokens, as GPT-3
        decay_steps=19_073 - 715,  # to the last step
        final_ratio=0.1,
    ),
    evaluation=EvaluationConfig(max_tokens=10_485_760),
    checkpoint=CheckpointConfig(keep_last=2, keep_every=5000),
)

if __name__ == "__main__":
    run(CONFIG)
