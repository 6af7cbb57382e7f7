"""Fixtures: a small prepared set, a tiny recipe, and a way to run it in this process."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Threads change the order of sums, and two test processes share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub; those with a stand-in unset it themselves
for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
    del os.environ[name]

from tests.support import write_corpus  # noqa: E402
from toolkit.config import (  # noqa: E402 - after the environment is set
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GPT2Config,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    ScheduleConfig,
    TrainConfig,
    TrainingConfig,
    WandbConfig,
)

# Two test processes share two cores with whatever else runs there: no deadlines, and the same examples every time.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of bytes: several training shards and a validation split."""
    from toolkit.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    out = folder / "set"
    prepare(
        [str(write_corpus(folder / "text"))],
        out=out,
        tokenizer="bytes",
        workers=1,
        shard_tokens=8192,
        val_fraction=0.2,
        progress=False,
    )
    return out


@pytest.fixture
def tiny(data_dir: Path, tmp_path: Path) -> TrainConfig:
    """A recipe of 8 steps of 8 windows of 32 tokens each, for a model of 30,000 parameters."""
    return TrainConfig(
        run=RunConfig(dir=str(tmp_path / "run")),
        model=GPT2Config(n_layer=2, n_head=2, n_embd=32, context_length=32, vocab_size=257),
        data=DataConfig(path=(str(data_dir),), sequence_length=32, shuffle_group_shards=2),
        training=TrainingConfig(
            max_steps=8,
            tokens_per_step=256,
            micro_batch_size=2,
            eval_every=4,
            checkpoint_every=2,
            sample_every=4,
            seed=7,
            precision="fp32",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=2, decay_steps=20),
        evaluation=EvaluationConfig(max_tokens=1024, micro_batch_size=4),
        sampling=SamplingConfig(prompt="the ", num_samples=1, max_new_tokens=8),
        checkpoint=CheckpointConfig(keep_last=8),
        wandb=WandbConfig(mode="disabled"),
    )


@pytest.fixture
def fit() -> Iterator[Callable[[TrainConfig], Path]]:
    """Runs a recipe in this process and returns its run folder."""
    from accelerate.state import AcceleratorState

    def run(config: TrainConfig) -> Path:
        from toolkit.training.trainer import Trainer

        AcceleratorState._reset_state(True)
        Trainer(config).fit()
        return Path(config.run.dir)

    yield run
    AcceleratorState._reset_state(True)
