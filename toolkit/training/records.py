"""What a run leaves behind, held by the main process alone: run folder, logs, checkpoints, the W&B mirror.

An error that only the main process can meet (a full disk, say) is kept as `trouble` until the next step's reduction
tells all processes to stop; then `check` raises it. metrics.jsonl is the truth and must be written; W&B mirrors it and
can fail without consequence.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from toolkit.config import TrainConfig, differences, load_recipe, to_dict
from toolkit.errors import UserError, describe_os_error
from toolkit.training import checkpoint
from toolkit.training.metrics import LogName, RunLog, log_path, read_rows
from toolkit.training.run_folder import RECIPE, RUN, RunFolder
from toolkit.training.wandb_mirror import WandbMirror

logger = logging.getLogger(__name__)

CURVE_POINTS = 8  # rows of the validation curve that are printed at the end


class RunRecords:
    """The open records of one run; its folder is locked from the first moment until `close`."""

    def __init__(self, config: TrainConfig, *, data_fingerprint: str, layout: Mapping[str, Any]) -> None:
        """Opens the folder and finds the checkpoint to start from.

        Raises: UserError if another process holds the folder, the recipe differs, or all checkpoints are damaged.
        """
        self.config = config
        self.trouble: Exception | None = None
        self.folder = RunFolder(Path(config.run.dir))
        self.log = RunLog(self.folder.path)
        self.wandb = WandbMirror(config.wandb)
        self._in_flight: int | None = None  # the step of a save in the background
        self._begun = False
        self._ended: Literal["finished", "preempted"] | None = None
        try:
            before = self.folder.status() or {}
            opened = self.folder.open(
                config,
                data_fingerprint=data_fingerprint,
                layout=layout,
                argv=sys.argv,
                last_logged_step=self.log.last_step(),
            )
            newest = opened.resolved.path
            self._loaded = opened.loaded
            self.writer = checkpoint.CheckpointWriter(
                self.folder.checkpoints, config.checkpoint, resolved=opened.resolved
            )
            self.resumed = newest is not None
            self._branched_from = opened.branched_from
            self.start = newest or self._other_run()
            if self.start is not None:
                self._refuse_other_data(self.start, data_fingerprint)
            for line in opened.lines:  # of a start that is not refused
                logger.info(line)
            step = checkpoint.step_of(newest.name) if newest is not None else None
            self.finished_at = step if before.get("status") == "finished" else None
            if self.finished_at is not None and self.finished_at >= config.training.max_steps:
                self.folder.record()  # nothing will begin
        except BaseException:
            self.folder.close()
            raise

    def _other_run(self) -> Path | None:
        """The checkpoint of another run that a new run starts from, if one was asked for."""
        if self._branched_from is None:
            return None
        start = checkpoint.find_checkpoint(Path(self._branched_from))
        step = checkpoint.read_manifest(start)["step"]
        if step >= self.config.training.max_steps:
            raise UserError(
                f"{start} is at step {step}, and training.max_steps={self.config.training.max_steps} leaves nothing to do; raise "
                "--training.max-steps"
            )
        if (start / RECIPE).exists():
            self._refuse_other_counts(start)
        return start

    def _refuse_other_counts(self, start: Path) -> None:
        """Raises UserError if the settings give a parent's counts of samples and tokens another meaning."""
        for name, old, new in differences(load_recipe(start / RECIPE), self.config):
            if name in ("training.tokens_per_step", "data.sequence_length"):
                raise UserError(
                    f"{start} counts its steps in {name}={old} and this run would go on with {new}; use {old}, or take the "
                    "weights alone (`toolkit export`, then --model.init-from)"
                )
            if name in ("training.seed", "data.shuffle_group_shards"):
                logger.info(
                    f"{start} was trained with {name}={old}, this run goes on with {new}: another order, in which windows of "
                    "that epoch come again"
                )

    def _refuse_other_data(self, start: Path, data_fingerprint: str) -> None:
        trained_on = checkpoint.read_manifest(start)["data_fingerprint"]
        if trained_on != data_fingerprint:
            raise UserError(
                f"{start} was trained on data with fingerprint {trained_on[:12]}, but {', '.join(self.config.data.path)} "
                f"has {data_fingerprint[:12]}; point --data.path at the same sets, with the same weights"
            )

    def load(self, path: Path) -> checkpoint.Loaded:
        """A checkpoint in memory, every check passed; the one found at the start is not read a second time."""
        found, self._loaded = self._loaded, None
        return found if found is not None and found.path == path else checkpoint.load(path)

    def begin(self, step: int, *, evaluation_due: bool = False, sampling_due: bool = False) -> None:
        """Records this start, brings the logs back to the step that the run starts from, and starts the W&B mirror.

        What is still due at that step will be written, so that rows of it from an earlier attempt are dropped.
        """

        def again(name: LogName, row: Mapping[str, Any]) -> bool:
            due = (sampling_due and name == "samples") or (evaluation_due and name == "metrics" and "loss/val" in row)
            return due and row["step"] == step

        self.folder.record()
        self._begun = True
        first = 1 if self._branched_from is None else None  # a branch begins where its first start began
        for line in self.log.truncate_after(step, first=first, again=again):
            logger.info(line)
        self.folder.set_status("running", step=step)
        self.wandb.start(to_dict(self.config), self.folder.run_id, folder=self.folder.path)
        if self.wandb.pid is not None:
            self._send_again(step)

    def _send_again(self, step: int) -> None:
        """Sends W&B the kept rows of the step that this start begins with: an earlier start may have held them back."""
        metrics, samples = (
            [row for row in read_rows(log_path(self.folder.path, name)) if row["step"] == step]
            for name in ("metrics", "samples")
        )
        for row in metrics:
            self.wandb.log(row, again=True)
        if samples:
            self.wandb.log_samples(step, samples, again=True)

    @contextmanager
    def noting_trouble(self) -> Iterator[None]:
        """Keeps an error until all processes can stop for it."""
        try:
            yield
        except (UserError, OSError) as error:
            self.trouble = self.trouble or error

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One row of metrics, into metrics.jsonl and W&B."""
        with self.noting_trouble():
            self.log.append("metrics", row)
        self.wandb.log(row)

    def append_ledger(self, row: Mapping[str, Any]) -> None:
        """One row of the ledger: what a step was trained on."""
        with self.noting_trouble():
            self.log.append("ledger", row)

    def append_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Texts that the model wrote, into samples.jsonl and W&B."""
        with self.noting_trouble():
            for row in rows:
                self.log.append("samples", row)
        self.wandb.log_samples(step, rows)

    def in_trouble(self) -> bool:
        """True if something has failed that must end the run, also a save in the background."""
        if self.trouble is None:
            self.trouble = self.writer.error
        return self.trouble is not None

    def check(self) -> None:
        """Raises what has failed, as a `UserError` where the user can do something about it."""
        if self.in_trouble():
            assert self.trouble is not None
            raise self.trouble

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        config_json: Mapping[str, Any],
        manifest: Mapping[str, Any],
        validation_loss: float | None,
        tokenizer_file: Path | None,
        blocking: bool,
    ) -> None:
        """A checkpoint; unless `blocking`, this returns when the copy in memory is made.

        Raises: UserError if this save (blocking) or the one before (in the background) failed.
        """
        self.folder.refuse_replaced()
        self.log.sync()  # the rows up to a checkpoint are as durable as the checkpoint
        extra = self.folder.copies()
        if tokenizer_file is not None:  # one of the user's own; the built-in ones are known by name
            extra["tokenizer.json"] = tokenizer_file.read_bytes()
        self.writer.snapshot(
            step,
            model=model,
            optimizer=optimizer,
            state=state,
            config_json=config_json,
            manifest=manifest,
            validation_loss=validation_loss,
            extra=extra,
        )
        self._note_complete_save()  # `snapshot` has waited for the one before
        self._in_flight = step
        self.writer.write(blocking=blocking)
        if blocking:
            self._note_complete_save()
        self.folder.set_status("running", step=step)

    def _note_complete_save(self) -> None:
        if self._in_flight is not None:
            self.folder.saved_step, self._in_flight = self._in_flight, None

    def newest_checkpoint(self) -> Path | None:
        """The newest valid checkpoint, once the save in flight is done."""
        self.writer.wait()
        self.writer.raise_error()
        return checkpoint.resolve(self.folder.checkpoints).path

    def finish(self, ended: Literal["finished", "preempted"], *, step: int, reason: str) -> None:
        """Waits until the last checkpoint is on the disk, then writes the status that says how the run ended."""
        self.writer.wait()
        self.check()
        self._note_complete_save()
        self.log.sync()
        self.folder.set_status(ended, step=step, reason=reason)
        self._ended = ended

    def curve(self) -> Iterator[str]:
        """The main points of the validation curve so far, as the lines of a table; nothing if there is no validation."""
        points = [row for row in read_rows(log_path(self.folder.path, "metrics")) if "loss/val" in row]
        if points:
            yield "    step    validation loss    bits per byte"
        shown = min(len(points), CURVE_POINTS)
        for index in range(shown):  # evenly spread, with the first and the last
            row = points[index * (len(points) - 1) // max(1, shown - 1)]
            yield f"{row['step']:>8}    {row['loss/val']:>15.4f}    {row['bits_per_byte/val']:>13.4f}"

    def close(self, *, step: int, failure: str | None, step_is_complete: bool) -> None:
        """Ends W&B's run, closes the logs and lets go of the folder; never raises.

        Unless `step_is_complete`, an evaluation or samples of this step are still to be made, by the next start.
        """
        self.writer.wait()
        self.wandb.finish(self._ended or "failed", step_is_complete=self._ended == "finished" or step_is_complete)
        try:
            if self._in_flight in checkpoint.steps_in(self.folder.checkpoints):
                self._note_complete_save()  # it is whole, though the run has failed since
            self.log.close()
            has_run = self._begun or (self.folder.path / RUN).exists()  # else the folder stays as it was: free for any
            if failure is not None and has_run and self._ended is None:
                self.folder.set_status("failed", step=step, reason=failure)
        except OSError as error:  # the disk that made the run fail cannot take the status either
            logger.error("status.json could not be written: %s", describe_os_error(error))
        except UserError as error:
            logger.error("status.json was not written: %s", error)
        self.folder.close()
