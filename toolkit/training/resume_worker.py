"""One start of a run for `verify_resume`: trains the recipe in the file that it is given, saving what it resumed from.

Run as `python -m toolkit.training.resume_worker RECIPE.json`, also by `accelerate launch -m`.
"""

import sys
from pathlib import Path

from toolkit.config import load_recipe
from toolkit.errors import one_line_errors
from toolkit.training import checkpoint
from toolkit.training.trainer import Trainer
from toolkit.training.verify_resume import RESUMED


def main(recipe: Path) -> None:
    """Trains, after saving the resumed state apart from the run's checkpoints if there is one."""
    config = load_recipe(recipe)
    with Trainer(config) as trainer:
        trainer.resume()
        if trainer.step > 0:
            records = trainer.records
            if records is not None:
                writer = records.writer
                records.writer = checkpoint.CheckpointWriter(records.folder.path / RESUMED, config.checkpoint)
            trainer.save()
            if records is not None:
                records.writer = writer
        while trainer.step < config.training.max_steps:
            result = trainer.train_step()
            trainer.log(result)
            trainer.spiked(result)  # the losses that it compares with are part of the state
            if trainer.due(config.training.eval_every):
                trainer.evaluate()
            if trainer.due(config.training.checkpoint_every):
                trainer.save()
        trainer.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(Path(sys.argv[1]))
