"""Batches to weights: the run, from the first step to the last checkpoint, on any number of processes.

`fit()` is the whole run in one screen, `train_step()` the whole step in another; everything else here serves one of the
two. This is the only file that knows Accelerate, which supplies the process group, the device, DDP, autocast, the
GradScaler and the division of micro-batches among processes. What a step computes is a function of the recipe, the step
number and the position in the data alone, so that a resumed run repeats an uninterrupted one.
"""

import gc
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

from toolkit.config import (
    MAY_DIFFER_BETWEEN_MACHINES,
    Precision,
    TrainConfig,
    differences,
    from_dict,
    grad_accum_steps,
    to_dict,
)
from toolkit.data.loader import Data, open_data, sample_order, training_loader, validation_loader, window_counts
from toolkit.data.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import UserError
from toolkit.evaluation.generate import generate
from toolkit.evaluation.loss import evaluate
from toolkit.failpoint import failpoint, is_set
from toolkit.model.gpt2 import (
    GPT2,
    canonical_tensors,
    flops_per_token,
    load_canonical,
    num_parameters,
)
from toolkit.model.huggingface import config_json, is_padded, load_weights
from toolkit.training import checkpoint
from toolkit.training.compatibility import refuse_unsavable, refuse_unsteppable
from toolkit.training.environment import (
    configure_torch,
    cpu_is_asked_for,
    device_memory_bytes,
    device_name,
    idle_cores,
    is_out_of_memory,
    keep_freed_memory,
    library_versions,
    peak_memory_gib,
    refuse_environment,
    resolve_precision,
    should_compile,
    slow_precision,
)
from toolkit.training.hardware import peak_flops
from toolkit.training.optimizer import (
    allocate_state,
    build_optimizer,
    load_optimizer,
    optimizer_scalars,
    optimizer_tensors,
    set_learning_rate,
    total_norm,
)
from toolkit.training.plan import largest_micro_batch, memory_estimate
from toolkit.training.processes import Processes, restartable_init_method
from toolkit.training.progress import Progress, configure_logging
from toolkit.training.records import RunRecords
from toolkit.training.schedule import learning_rate_multiplier
from toolkit.training.seeds import mixed_seed, seed_generators
from toolkit.training.spikes import SpikeDetector
from toolkit.training.supervision import StopRequests, Watchdog

logger = logging.getLogger(__name__)

# Everything beside weights and moments that the next step depends on: a state that lacks one of these is refused.
STATE_PARTS = (
    *("step", "position", "skipped_steps", "skipped_in_a_row", "skipped_samples", "evaluated_step", "evaluation_due"),
    *("sampled_step", "sampling_due", "validation_loss", "loss_history", "scaler", "optimizer"),
)
GARBAGE_EVERY = 100  # steps between collections of cyclic garbage
# What the communication libraries say when another process has died. Source: messages of gloo's transport and of NCCL.
SIGNS_OF_A_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Timed out waiting",
    "ncclRemoteError",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step did, equal in every process."""

    step: int  # updates made so far, this one included
    loss: float  # mean over the step's tokens, before the update [nats per token]
    grad_norm: float  # global, before clipping
    learning_rate: float
    loss_scale: float | None  # that the gradients were made with; None: no GradScaler
    updated: bool  # False: the gradient was not finite and the weights stayed as they were
    stop: bool  # some process was asked to stop
    seconds: float  # from the start of the step to its one host synchronisation
    first_sample: int  # the step trained on the global samples [first_sample, end_sample)
    end_sample: int
    digest: int  # sum of the windows' 64-bit hashes, modulo 2**64


class Trainer:
    """A training run with five verbs: `train_step`, `evaluate`, `save`, `resume` and `log`; `fit` is their sentence.

    `model` and `optimizer` may be objects of your own: the model takes (input_ids, targets) and returns the mean loss,
    the optimizer is any `torch.optim.Optimizer` over its parameters. A trainer holds the lock of its run folder from
    the first moment: use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        stop_requests: StopRequests | None = None,
    ) -> None:
        """Checks everything that can be checked before the first step costs anything.

        Raises: UserError for settings, data, environment or a run folder that do not fit each other.
        """
        self.config = config
        refuse_environment()
        self.precision = resolve_precision(config.training.precision)
        self.accelerator = _accelerator(self.precision, watchdog_minutes=config.training.watchdog_minutes)
        self.device: torch.device = self.accelerator.device
        self.processes = Processes(self.device)
        self.is_main = self.processes.is_main
        configure_logging(is_main=self.is_main)
        configure_torch(self.device, deterministic=config.training.deterministic)
        self.stop_requests = stop_requests or StopRequests()
        self.watchdog = Watchdog(config.training.watchdog_minutes)
        self.records: RunRecords | None = None  # of the main process alone
        self.progress = Progress(config.training.max_steps)
        self._started = time.monotonic()

        self.step = 0
        self.position = 0  # global samples consumed
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.skipped_samples: list[list[int]] = []  # [first, end) of the samples skipped after a spike
        self.evaluated_step = 0
        self.evaluation_due = False  # an evaluation of this step was cut short by a stop request
        self.sampled_step = 0
        self.sampling_due = False  # so were its samples
        self.last_loss: float | None = None  # the latest validation's, if it was finite
        self.spikes = SpikeDetector(z_score=config.training.spike_z_score)
        self._rewound_to: Counter[str] = Counter()  # how often this start went back to each checkpoint
        self._told_to_stop = False  # by all processes together, in a step or an evaluation
        self._first_step: int | None = None  # what `step` will be after this start's first; None: before `resume`

        try:
            self.watchdog.feed()
            self._prepare(model, optimizer)
            self.watchdog.stop()  # nobody knows when its user will go on
        except BaseException as error:
            self._fail(error)
            raise

    def _prepare(self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
        """What takes all processes: data, records, weights."""
        config = self.config
        self._refuse_other_settings()
        self.data = self._open_data()
        self.order = sample_order(
            self.data,
            sequence_length=config.data.sequence_length,
            seed=config.training.seed,
            shuffle_group_shards=config.data.shuffle_group_shards,
        )
        self.tokenizer = self._load_tokenizer()
        self.compiled, compiling = should_compile(config.training.compile, self.device)
        for line in (compiling, slow_precision(self.precision, self.device), idle_cores(self.device)):
            if line:
                self._say(line)
        self.micro_batch_size = self._first_micro_batch_size()
        self.grad_accum_steps = self._derive_accumulation()
        self._start, self.finished = self._open_records()
        self._build(model, optimizer)

    # ------------------------------------------------------------------------------------------- the run in one screen

    def fit(self) -> None:
        """Trains until `max_steps`, a stop request or `max_hours`; resumes if the run folder holds a checkpoint."""
        with self:
            if self.finished:
                return
            self.resume()
            stop = not self._made_up()
            while self.step < self.config.training.max_steps and not stop:
                result = self.train_step()
                self.log(result)
                stop = result.stop
                if self.spiked(result) and self.config.training.on_spike == "rewind" and not stop and self.rewind():
                    continue
                if self.due(self.config.training.eval_every) and not stop:
                    stop = self.evaluate() is None
                if self.due(self.config.training.sample_every, at_end=False) and not stop:
                    self.sample()
                if self.due(self.config.training.checkpoint_every) or stop:
                    self.save(blocking=stop)
            self.finish(stopped=stop)

    # ------------------------------------------------------------------------------------------ the step in one screen

    def train_step(self) -> StepResult:
        """One optimizer step: G = tokens_per_step / T samples, one update (or none if the gradient is not finite).

        Why one host synchronisation: the GPU runs ahead of Python until `_reduce` reads the step's few numbers.
        """
        self._refuse_before_resume()
        self._tend()
        started = time.monotonic()
        multiplier = learning_rate_multiplier(self.step, self.config.schedule)
        learning_rate = set_learning_rate(self.raw_optimizer, multiplier)
        loss, digest = self._gradients()
        self.accelerator.unscale_gradients()
        grad_norm = total_norm(p.grad for p in self.parameters if p.grad is not None)
        facts = self._reduce(loss, grad_norm, digest)
        max_grad_norm = self.config.optimizer.max_grad_norm
        if facts.grad_norm > max_grad_norm:  # what is below the limit needs no pass over all gradients
            nn.utils.clip_grads_with_norm_(self.parameters, max_grad_norm, grad_norm)
        if facts.finite or self.accelerator.scaler is not None:  # a GradScaler skips by itself and lowers its scale
            self.optimizer.step()
        self._forget_gradients()
        first = self.position
        self.step += 1
        self.position += self.samples_per_step
        self.skipped_in_a_row = 0 if facts.finite else self.skipped_in_a_row + 1
        self.skipped_steps += not facts.finite
        self._told_to_stop |= facts.stop
        self.watchdog.feed()
        return StepResult(
            step=self.step,
            loss=facts.loss,
            grad_norm=facts.grad_norm,
            learning_rate=learning_rate,
            loss_scale=facts.loss_scale,
            updated=facts.finite,
            stop=facts.stop,
            seconds=time.monotonic() - started,
            first_sample=first,
            end_sample=self.position,
            digest=facts.digest,
        )

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """The step's gradients -> (mean loss (), digest () int64); one process out of memory tries a smaller micro-batch.

        Raises: UserError if several processes train: the others are already in the middle of their reduction.
        """
        while True:
            try:
                return self._accumulate_gradients()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._forget_gradients()
                if self.processes.count > 1:
                    with self.processes.telling():
                        raise UserError(
                            f"out of memory in step {self.step + 1}; what was saved before is intact: start again with "
                            f"--training.micro-batch-size {max(1, self.micro_batch_size // 2)}"
                        ) from None
            self._halve_micro_batch()
            self._start_loader()  # the same samples again, from the step's first

    def _accumulate_gradients(self) -> tuple[Tensor, Tensor]:
        """Forward and backward over this process's micro-batches of the step -> (mean loss (), digest () int64)."""
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        digest = torch.zeros((), dtype=torch.int64, device=self.device)
        for micro_step in range(self.grad_accum_steps):
            with self.processes.telling():
                batch = next(self.batches)
            self._seed(micro_step)
            last = micro_step == self.grad_accum_steps - 1
            # Gradients are summed over processes in the last backward pass alone.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(batch["input_ids"], batch["targets"])
                failpoint("trainer.before-backward")
                self.accelerator.backward(loss / self.grad_accum_steps)
            loss_sum += loss.detach()
            digest += batch["digest"].sum()
        return loss_sum / self.grad_accum_steps, digest

    def _loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a micro-batch -> ().

        Raises: UserError if a model of one's own returns something else.
        """
        loss = self.model(input_ids, targets)
        if isinstance(loss, Tensor) and loss.shape == () and loss.requires_grad:
            return loss
        found = type(loss).__name__
        if isinstance(loss, Tensor):
            found = f"a tensor of shape {tuple(loss.shape)}" if loss.shape else "a tensor without a gradient"
        raise UserError(
            f"{type(self.raw_model).__name__} returns {found} for (input_ids, targets); return the mean loss, a tensor of "
            "shape () that its parameters have a gradient of"
        )

    def _reduce(self, loss: Tensor, grad_norm: Tensor, digest: Tensor) -> "_Facts":
        """The step's one reduction over processes and its one host synchronisation."""
        wide = _wide(self.device)
        stop = torch.full((), float(self._wants_to_stop()), dtype=wide, device=self.device)
        # A float64 holds whole numbers up to 2**53 only: the digest travels in four parts of 16 bits.
        shifts = torch.arange(0, 64, 16, device=self.device)
        parts = (digest >> shifts) & 0xFFFF
        # Asked for by itself, the scale would be a synchronisation of its own, after the update.
        scale = torch.ones((), device=self.device)
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.scale(scale)
        values = torch.cat([torch.stack([loss.to(wide), grad_norm.to(wide), stop, scale.to(wide)]), parts.to(wide)])
        loss_sum, norm_sum, stops, scale_sum, *part_sums = self.processes.sum(values).tolist()
        return _Facts(
            loss=loss_sum / self.processes.count,
            grad_norm=norm_sum / self.processes.count,
            finite=math.isfinite(loss_sum) and math.isfinite(norm_sum),  # a sum is finite if every number in it is
            stop=stops > 0,
            loss_scale=scale_sum / self.processes.count if self.accelerator.scaler is not None else None,
            digest=sum(int(part) << 16 * place for place, part in enumerate(part_sums)) % 2**64,
        )

    def _seed(self, micro_step: int) -> None:
        """Seeds dropout from (seed, step, index of the micro-batch within the step over all processes).

        Why: there is no state of a random generator to save, and other numbers of processes draw the same masks.
        """
        index = micro_step * self.processes.count + self.processes.index
        seed_generators(mixed_seed(self.config.training.seed, self.step, index), self.device)

    # ---------------------------------------------------------------------------------------------- the other verbs

    def due(self, every: int | None, *, at_end: bool = True) -> bool:
        """True if something that happens `every` so many steps (and, by default, at the last step) is due now."""
        if at_end and self.step == self.config.training.max_steps:
            return True
        return every is not None and self.step > 0 and self.step % every == 0

    def evaluate(self) -> dict[str, float] | None:
        """The validation metrics at this step, logged; None if a stop request cut the evaluation short.

        The windows, their batches and the order of the sums do not depend on the number of processes, nor do the bits.
        """
        self._refuse_before_resume()
        started = time.monotonic()
        metrics: dict[str, float] = {}
        losses: list[tuple[float, float, float]] = []
        for data_set, batches in zip(self.data.sets, self.validation, strict=True):
            with self.processes.telling():
                result = evaluate(
                    self.raw_model,
                    batches,
                    self.tokenizer.token_bytes(),
                    autocast=self.accelerator.autocast,
                    process_index=self.processes.index,
                    num_processes=self.processes.count,
                    reduce=self.processes.sum,
                    should_stop=self._anyone_wants_to_stop,
                )
            if result is None:
                self._told_to_stop = True
                return None
            losses.append((data_set.weight, result.loss, result.bits_per_byte))
            if len(self.data.sets) > 1:
                metrics[f"loss/val/{data_set.name}"] = result.loss
                metrics[f"bits_per_byte/val/{data_set.name}"] = result.bits_per_byte
        metrics["loss/val"] = math.fsum(weight * loss for weight, loss, _ in losses)
        metrics["bits_per_byte/val"] = math.fsum(weight * bits for weight, _, bits in losses)
        metrics["time/evaluation_seconds"] = time.monotonic() - started
        self.evaluated_step = self.step
        self.last_loss = metrics["loss/val"] if math.isfinite(metrics["loss/val"]) else None
        self._append(metrics, step=self.step)
        self._say(
            f"step {self.step}: validation loss {metrics['loss/val']:.4f}, "
            f"{metrics['bits_per_byte/val']:.4f} bits per byte ({metrics['time/evaluation_seconds']:.0f} s)"
        )
        self.watchdog.feed()
        return metrics

    def sample(self) -> None:
        """Texts that the model writes now, into samples.jsonl and W&B; drawn by the main process alone."""
        self._refuse_before_resume()
        if self.records is None or not isinstance(self.raw_model, GPT2):
            self.sampled_step = self.step
            return
        with self.records.noting_trouble(), self.accelerator.autocast():
            rows = self._samples(self.raw_model)
            self.records.append_samples(self.step, rows)
            self._say(f"step {self.step}: sample: {rows[0]['text'][:200]!r}")
            self.sampled_step = self.step
        self.watchdog.feed()

    def _samples(self, model: GPT2) -> list[dict[str, Any]]:
        """One row for each text; written by the main process alone."""
        settings = self.config.sampling
        drawn: list[list[int]] = [[] for _ in range(settings.num_samples)]
        for index, token in generate(
            model,
            self.tokenizer.encode(settings.prompt),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=mixed_seed(self.config.training.seed, self.step, 0),
            num_samples=settings.num_samples,
            eot_id=self.tokenizer.eot_id,
        ):
            drawn[index].append(token)
        return [
            {
                "step": self.step,
                "tokens": self.tokens,
                "sample": index,
                "prompt": settings.prompt,
                "text": settings.prompt + self.tokenizer.decode(ids),
            }
            for index, ids in enumerate(drawn)
        ]

    def log(self, result: StepResult) -> None:
        """Writes the step's row to metrics.jsonl, W&B and the progress bar, and its ledger row; stops on bad numbers.

        Raises: UserError after too many steps in a row without a finite gradient, or when the loss scale collapsed.
        """
        step = result.step
        row: dict[str, Any] = {"loss/train": result.loss, "learning_rate": result.learning_rate}
        row["optimizer/grad_norm"] = result.grad_norm
        row["optimizer/skipped_steps"] = self.skipped_steps
        if result.loss_scale is not None:
            row["optimizer/loss_scale"] = result.loss_scale
        tokens_per_second = self.config.training.tokens_per_step / result.seconds
        row["throughput/tokens_per_second"] = tokens_per_second
        if self._peak_flops is not None:
            achieved = tokens_per_second * flops_per_token(self.config.model, self.config.data.sequence_length)
            row["throughput/mfu"] = achieved / (self._peak_flops * self.processes.count)
        row["memory/peak_gib"] = peak_memory_gib(self.device)
        row["time/step_seconds"] = result.seconds
        self._append(row, step=step)
        if self.records is not None:
            ledger = {"step": step, "first_sample": result.first_sample, "end_sample": result.end_sample}
            self.records.append_ledger({**ledger, "digest": f"{result.digest:016x}"})
            self.progress.show(
                step=step, loss=result.loss, tokens_per_second=tokens_per_second, step_seconds=result.seconds
            )
        self._report_epochs(result)
        if not result.updated:
            self._say(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: update skipped")
        limit = self.config.training.max_skipped_in_a_row
        if self.skipped_in_a_row >= limit:
            raise UserError(
                f"{limit} steps in a row had no finite gradient (the last at step {step}); the last good checkpoint "
                "is kept: start again from it with a lower --optimizer.learning-rate in a new run (--run.resume-from)"
            )
        if result.loss_scale is not None and result.loss_scale < self.config.training.min_loss_scale:
            raise UserError(
                f"the fp16 loss scale fell to {result.loss_scale}, below training.min_loss_scale={self.config.training.min_loss_scale}; "
                "the last good checkpoint is kept: use --training.precision bf16, or a lower learning rate"
            )

    def spiked(self, result: StepResult) -> bool:
        """True, and said aloud, if the step's loss jumped out of the losses before it; call it once a step."""
        if not self.spikes.is_spike(result.loss):
            return False
        self._say(
            f"step {result.step}: loss {result.loss:.4f} is a spike: more than {self.spikes.z_score} deviations above its median"
        )
        return True

    def save(self, *, blocking: bool = True) -> None:
        """A checkpoint of this step; unless `blocking`, training waits for the copy in memory only.

        Raises: UserError in every process if this or the previous checkpoint could not be written, or if the weights
        are not finite: such a checkpoint would only push out a good one.
        """
        self._refuse_before_resume()
        with self.processes.together():
            if self.records is not None:
                self.records.check()
                self._refuse_broken_weights()
                self.records.save(
                    self.step,
                    model=canonical_tensors(self.raw_model),
                    optimizer=optimizer_tensors(self.raw_optimizer, self.raw_model),
                    state=self._state(),
                    config_json=config_json(self.config.model, eot_id=self.tokenizer.eot_id),
                    manifest={
                        "tokens": self.tokens,
                        "data_fingerprint": self.data.fingerprint,
                        "tokenizer": {"name": self.tokenizer.name, "sha256": self.tokenizer.sha256},
                        "layout": self.layout(),
                    },
                    validation_loss=self.last_loss if self.evaluated_step == self.step else None,
                    tokenizer_file=self.tokenizer.path,
                    blocking=blocking,
                )
        self.watchdog.feed()

    def resume(self) -> None:
        """Brings the run to the newest valid checkpoint, or to step 0, and gets everything ready for `train_step`."""
        self.watchdog.feed()
        self._load(self._start)
        with self.processes.together(), self._naming_missing_memory("the optimizer's moments"):
            allocate_state(self.raw_optimizer)
        with self.processes.together():
            if self.records is not None:
                self.records.begin(self.step, evaluation_due=self.evaluation_due, sampling_due=self.sampling_due)
        self._fit_memory()
        self._start_loader()
        self._report_start()
        if not self.stop_requests.listen():
            self._say(
                "this is not the program's main thread: no signal reaches this run, and one that ends the program ends it "
                "without a checkpoint"
            )
        self.watchdog.feed()
        self._first_step = self.step + 1
        self._keep_what_exists()
        self._started = time.monotonic()

    def rewind(self) -> bool:
        """Goes back to the last checkpoint and goes on with the samples after those read since: they are skipped.

        False, and said aloud, if there is none to go back to.
        Raises: UserError where going back to the same checkpoint again and again has not helped.
        """
        self._refuse_before_resume()
        with self.processes.together():
            path = ""
            if self.records is not None:
                path = str(self.records.newest_checkpoint() or "")
        path = self.processes.share(path)
        if not path:
            self._say("no checkpoint to rewind to yet: training goes on")
            return False
        spiked_step, end = self.step, self.position
        self._rewound_to[path] += 1
        limit = self.config.training.max_skipped_in_a_row
        if self._rewound_to[path] > limit:
            raise UserError(
                f"rewound to {path} {limit} times, and step {spiked_step} is a spike still: start again from it with a lower "
                "--optimizer.learning-rate in a new run (--run.resume-from)"
            )
        self._load(Path(path))
        skipped = [self.position, end]
        self.position = end
        self.skipped_samples.append(skipped)
        with self.processes.together():
            if self.records is not None:
                self.records.log.truncate_after(self.step)
                # Of the next step, so that a start from this checkpoint, which does not know of it yet, drops it.
                row = {"step": self.step + 1, "skipped_first_sample": skipped[0], "skipped_end_sample": skipped[1]}
                self.records.append_ledger(row)
        self._start_loader()
        self._say(
            f"rewound from step {spiked_step} to step {self.step}; samples {skipped[0]} to {skipped[1] - 1} are skipped"
        )
        return True

    def finish(self, *, stopped: bool = False) -> None:
        """Waits for the last checkpoint, writes the run's status and says how it ended."""
        self._refuse_before_resume()
        saved_step = None
        with self.processes.together():
            if self.records is not None:
                reason = self._stop_reason() if stopped else ""
                self.records.finish("preempted" if stopped else "finished", step=self.step, reason=reason)
                saved_step = self.records.folder.saved_step
        if stopped:
            goes_on = "continues from there"
            if saved_step != self.step:
                goes_on = "begins anew" if saved_step is None else f"continues from step {saved_step}"
            self._say(f"stopped at step {self.step} ({self._stop_reason()}); the same command {goes_on}")
            return
        if self.records is not None:
            for line in self.records.curve():
                self._say(line)
        weights = f"weights: {self.config.run.dir}/checkpoints/step-{self.step:08d}"
        if saved_step != self.step:
            weights = f"nothing was saved since step {saved_step}" if saved_step is not None else "nothing was saved"
        self._say(f"finished at step {self.step}; {weights}")

    @contextmanager
    def _naming_missing_memory(self, what: str) -> Iterator[None]:
        """Says in one line that what no smaller micro-batch makes smaller does not fit.

        Raises: UserError.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            needed = memory_estimate(self.config, self.precision, micro_batch_size=1)
            raise UserError(
                f"{device_name(self.device)} has no memory left for {what}; weights, gradients and moments take "
                f"{needed.fixed / 2**30:.2f} GiB: end what else uses the device, or use a smaller model (`toolkit plan` tells what fits)"
            ) from None

    def close(self, *, failure: str | None = None) -> None:
        """Lets go of everything: logs, W&B, signal handlers, the run folder's lock, the process group."""
        self.watchdog.stop()
        self.stop_requests.stop_listening()
        gc.enable()
        gc.unfreeze()
        self.progress.close()
        if self.records is not None:
            is_complete = not self._evaluation_is_missing() and not self._samples_are_missing()
            self.records.close(step=self.step, failure=failure, step_is_complete=is_complete)
        self.processes.settle()
        if failure is None:  # after a failure, peers may be gone and taking leave of them would wait for ever
            self.accelerator.end_training()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Closes after an error; raises one line in its place if all that it says is where this process lost another."""
        lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_A_LOST_PEER)
        if lost:
            when = f"in step {self.step + 1}" if self._first_step is not None else "while starting"
            error = UserError(
                f"process {self.processes.index} lost the connection to another process {when}; what that process printed, or "
                "the launcher's report, names the first cause; what was saved before is intact"
            )
        self.close(failure=(str(error) or type(error).__name__).splitlines()[0])
        if lost:
            raise error from None

    # ------------------------------------------------------------------------------------------------ facts of the run

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.training.tokens_per_step

    @property
    def samples_per_step(self) -> int:
        """G, the samples (windows) of one step over all processes."""
        return self.config.training.tokens_per_step // self.config.data.sequence_length

    def layout(self) -> dict[str, Any]:
        """What promises of equal bits depend on: processes, micro-batch, threads, precision, device."""
        return {
            "num_processes": self.processes.count,
            "micro_batch_size": self.micro_batch_size,
            "grad_accum_steps": self.grad_accum_steps,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "device": device_name(self.device),
            "compiled": self.compiled,
            "deterministic": self.config.training.deterministic,
            "versions": library_versions(),
        }

    def _state(self) -> dict[str, Any]:
        """The `STATE_PARTS`, as JSON values."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "position": self.position,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_samples": self.skipped_samples,
            "evaluated_step": self.evaluated_step,
            "evaluation_due": self._evaluation_is_missing(),
            "sampled_step": self.sampled_step,
            "sampling_due": self._samples_are_missing(),
            "validation_loss": self.last_loss,
            "loss_history": list(self.spikes.history),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "optimizer": optimizer_scalars(self.raw_optimizer),
        }

    def _evaluation_is_missing(self) -> bool:
        return self.due(self.config.training.eval_every) and self.evaluated_step != self.step

    def _samples_are_missing(self) -> bool:
        return self.due(self.config.training.sample_every, at_end=False) and self.sampled_step != self.step

    # ----------------------------------------------------------------------------------------------------- preparations

    def _refuse_other_settings(self) -> None:
        """Raises UserError in every process if one was started with other settings than the main process.

        Why: each machine has a command line of its own, and with another learning rate or seed on one of them all would
        train on, each its own way.
        """
        main = self.processes.share({"config": to_dict(self.config), "precision": self.precision})
        with self.processes.together():
            found = differences(from_dict(TrainConfig, main["config"]), self.config)
            found += [("precision", main["precision"], self.precision)] if main["precision"] != self.precision else []
            different = [
                f"{name}={here!r} instead of {there!r}"
                for name, there, here in found
                # The weights may lie elsewhere on each machine, but all or none begin with them.
                if name not in MAY_DIFFER_BETWEEN_MACHINES or (name == "model.init_from" and None in (there, here))
            ]
            if different:
                raise UserError(
                    f"started with {', '.join(different)} of the main process; give every machine the same settings"
                )

    def _open_data(self) -> Data:
        """The data on this machine, the same on all (by fingerprint), and fitting the model.

        Raises: UserError in every process if it is missing or different on one of them, or does not fit.
        """
        with self.processes.together():
            data = open_data(
                self.config.data.path, cache_dir=self.config.data.cache_dir, cache_gib=self.config.data.cache_gib
            )
            model = self.config.model
            if data.vocab_size != model.vocab_size:
                fix = f"use --model.vocab-size {data.vocab_size}"
                if model.init_from is not None and is_padded(model.vocab_size, data.vocab_size):
                    fix += f", with which the padding of the weights in {model.init_from} is left out"
                elif model.init_from is not None:
                    fix = f"use data that is prepared with the tokenizer of the weights in {model.init_from}"
                raise UserError(
                    f"the data's tokenizer {data.tokenizer_info.name!r} has {data.vocab_size} ids but model.vocab_size="
                    f"{model.vocab_size}; {fix}"
                )
            # Opened now, so that a set without validation windows is refused before the first step and not after it.
            self.validation = [
                validation_loader(
                    data_set,
                    sequence_length=self.config.data.sequence_length,
                    max_tokens=self.config.evaluation.max_tokens,
                    micro_batch_size=self.config.evaluation.micro_batch_size,
                )
                for data_set in data.sets
            ]
        fingerprint = self.processes.share(data.fingerprint)
        with self.processes.together():
            if data.fingerprint != fingerprint:
                raise UserError(
                    f"the data in {', '.join(self.config.data.path)} has fingerprint {data.fingerprint[:12]} here and "
                    f"{fingerprint[:12]} on the main process; copy the same prepared set to every machine"
                )
        return data

    def _load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data.

        Raises: UserError in every process if its vocabulary is not the one that the manifest names.
        """
        with self.processes.together():
            info, file = self.data.tokenizer_info, self.data.sets[0].tokenizer_file
            tokenizer = load_tokenizer(str(file) if file is not None else info.name)
            if tokenizer.sha256 != info.sha256:
                raise UserError(
                    f"{self.data.sets[0].path} was made with a tokenizer {info.name!r} of sha256 {info.sha256[:12]}, but "
                    f"the one here has {tokenizer.sha256[:12]}; prepare the data again"
                )
        return tokenizer

    def _first_micro_batch_size(self) -> int:
        size = self.config.training.micro_batch_size
        if size != "auto":
            return size
        with self.processes.together():
            fitting = largest_micro_batch(
                self.config,
                precision=self.precision,
                memory_bytes=device_memory_bytes(self.device),
                num_processes=self.processes.count,
                on_cpu=self.device.type == "cpu",
            )
        return self.processes.smallest(fitting)

    def _derive_accumulation(self) -> int:
        return grad_accum_steps(self.config, micro_batch_size=self.micro_batch_size, num_processes=self.processes.count)

    def _build(self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Model and optimizer on their device, wrapped by Accelerate; weights from the seed or from `init_from`."""
        config = self.config
        if model is None:
            with self.processes.together(), self._naming_missing_memory("the weights"):
                model = GPT2(
                    config.model,
                    activation_checkpointing=config.training.activation_checkpointing,
                    loss_chunk_tokens=config.training.loss_chunk_tokens,
                    seed=config.training.seed,
                )
            if config.model.init_from is not None and self._start is None:
                self._init_from(model, config.model.init_from)
        refuse_unsavable(model, config.model)
        with self.processes.together(), self._naming_missing_memory("the weights"):
            self.raw_model: GPT2 = model.to(self.device)  # type: ignore[assignment]  # or one's own with the same verbs
        self.raw_optimizer = optimizer or build_optimizer(model, config.optimizer, device_type=self.device.type)
        refuse_unsteppable(self.raw_optimizer, model)
        updated = {id(parameter) for group in self.raw_optimizer.param_groups for parameter in group["params"]}
        for parameter in self.raw_model.parameters():
            if id(parameter) not in updated:  # an optimizer of one's own leaves it as it is: it needs no gradient
                parameter.requires_grad_(False)
        self.parameters = [parameter for parameter in self.raw_model.parameters() if parameter.requires_grad]
        if self.processes.count > 1:
            # DDP makes gradients that exist by now parts of its buffers, and otherwise only at the end of a first step
            # whose micro-batches have gradients of their own beside them.
            with self.processes.together(), self._naming_missing_memory("the gradients"):
                _allocate_gradients(self.parameters)
        self.model, self.optimizer = self.accelerator.prepare(self.raw_model, self.raw_optimizer)
        if self.compiled:
            # In place, so that names stay plain, and last, so that the autocast of `prepare` is compiled with it. Torch counts
            # the programs of a class, and after eight would leave further models of this process uncompiled.
            torch.compiler.reset()
            self.raw_model.compile()
        self._peak_flops = peak_flops(device_name(self.device), self.precision)

    def _init_from(self, model: GPT2, source: str) -> None:
        tensors = None
        with self.processes.together():
            if self.is_main:
                tensors = load_weights(source, self.config.model)
        load_canonical(model, self.processes.share_tensors(tensors))

    def _open_records(self) -> tuple[Path | None, bool]:
        """(the checkpoint to start from or None, whether the run is finished already), the same in every process.

        Raises: UserError in every process if another run holds the folder, the recipe differs, or all checkpoints are
        damaged.
        """
        start, finished_at = "", None
        with self.processes.together():
            if self.is_main:
                self.records = RunRecords(self.config, data_fingerprint=self.data.fingerprint, layout=self.layout())
                start, finished_at = str(self.records.start or ""), self.records.finished_at
        start, finished_at = self.processes.share([start, finished_at])
        finished = finished_at is not None and finished_at >= self.config.training.max_steps
        if finished:
            self._say(
                f"{self.config.run.dir}: finished at step {finished_at} already; raise --training.max-steps to train on, "
                "or use another --run.dir"
            )
        return (Path(start) if start else None), finished

    def _load(self, path: Path | None) -> None:
        """Weights, moments and counters from a checkpoint, read by the main process and sent to the others."""
        if path is None:
            return
        loaded: checkpoint.Loaded | None = None
        with self.processes.together():
            if self.records is not None:
                loaded = self.records.load(path)
                if missing := sorted(set(STATE_PARTS) - set(loaded.state)):
                    raise UserError(
                        f"{path / checkpoint.STATE} lacks {', '.join(missing)}, without which no run can be continued as "
                        "it was; use the version of the toolkit that wrote it"
                    )
        state = self.processes.share(loaded.state if loaded else None)
        weights = self.processes.share_tensors(loaded.model if loaded else None)
        moments = self.processes.share_tensors(loaded.optimizer if loaded else None)
        with self.processes.together(), self._naming_missing_memory("the optimizer's moments"):
            load_optimizer(self.raw_optimizer, self.raw_model, moments, state["optimizer"])
            load_canonical(self.raw_model, weights)
        self.step, self.position = state["step"], state["position"]
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self.skipped_samples = state["skipped_samples"]
        self.evaluated_step, self.evaluation_due = state["evaluated_step"], state["evaluation_due"]
        self.sampled_step, self.sampling_due = state["sampled_step"], state["sampling_due"]
        self.last_loss = state["validation_loss"]
        self.spikes = SpikeDetector(z_score=self.config.training.spike_z_score, history=state["loss_history"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _made_up(self) -> bool:
        """Does what a stop request had left out at this step, and saves it with it; False if another cuts it short again."""
        if not self.evaluation_due and not self.sampling_due:
            return True
        if self.evaluation_due and self.evaluate() is None:
            return False
        if self.sampling_due:
            self.sample()
        self.save(blocking=False)  # in place of the one that knows of neither, nor of its validation loss
        return True

    def _refuse_broken_weights(self) -> None:
        if not torch.isfinite(total_norm(self.raw_model.parameters())):
            way_out = (
                "there is no checkpoint yet: start anew with a lower --optimizer.learning-rate in another --run.dir"
            )
            if self.records is not None and self.records.newest_checkpoint() is not None:
                way_out = (
                    "the checkpoints before are intact: start again from one with a lower --optimizer.learning-rate in a new "
                    "run (--run.resume-from)"
                )
            raise UserError(f"the weights at step {self.step} are not finite and are not saved; {way_out}")

    def _start_loader(self) -> None:
        """Batches from the position on: Accelerate hands process r of N the micro-batches r, r + N, ..."""
        loader = training_loader(
            self.data,
            sequence_length=self.config.data.sequence_length,
            micro_batch_size=self.micro_batch_size,
            seed=self.config.training.seed,
            position=self.position,
            shuffle_group_shards=self.config.data.shuffle_group_shards,
            # Only from pinned memory is a copy non-blocking: it runs while the GPU computes and Python goes on.
            pin_memory=self.device.type == "cuda",
        )
        self.accelerator._dataloaders.clear()  # the one before a rewind or a smaller micro-batch
        self.batches: Iterator[Mapping[str, Tensor]] = iter(self.accelerator.prepare_data_loader(loader))

    def _fit_memory(self) -> None:
        """Halves the micro-batch (and doubles the accumulation) until one forward and backward fits in every process.

        Why without collectives: a process that runs out of memory would leave its peers waiting in one. A CPU is not
        tried: its system kills a process that takes too much instead of telling it.
        Raises: UserError if not even one window fits.
        """
        if self.device.type == "cpu" and not is_set("trainer.trial"):
            return
        while self.processes.smallest(int(self._trial())) == 0:
            self._halve_micro_batch()

    def _trial(self) -> bool:
        """True if forward and backward of one micro-batch fit into memory; changes no weights and no moments."""
        ids = torch.zeros(
            self.micro_batch_size, self.config.data.sequence_length, dtype=torch.int64, device=self.device
        )
        try:
            if self.grad_accum_steps > 1:  # from the second micro-batch on, gradients exist beside all activations
                _allocate_gradients(self.parameters)
            with self.accelerator.no_sync(self.model):
                failpoint("trainer.trial")
                # Two tensors, as in training: for one given twice, torch.compile would make a program of its own.
                self.accelerator.backward(self._loss(ids, ids.clone()))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self._forget_gradients()
        return True

    def _forget_gradients(self) -> None:
        """Frees the gradients; beside other processes sets them to zero, since they are parts of DDP's buffers."""
        self.optimizer.zero_grad(set_to_none=self.processes.count == 1)

    def _halve_micro_batch(self) -> None:
        smaller = [size for size in range(1, self.micro_batch_size // 2 + 1) if self._divides(size)]
        if not smaller:
            raise UserError(
                f"out of memory with micro_batch_size {self.micro_batch_size}, and nothing smaller divides the step; use "
                "--training.activation-checkpointing block, a shorter --data.sequence-length or a smaller model"
            )
        self.micro_batch_size = smaller[-1]
        self.grad_accum_steps = self._derive_accumulation()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._say(
            f"out of memory: going on with micro_batch_size {self.micro_batch_size} and {self.grad_accum_steps} "
            "accumulation steps; tokens per step, and so the recipe, stay the same"
        )

    def _divides(self, micro_batch_size: int) -> bool:
        return self.samples_per_step % (micro_batch_size * self.processes.count) == 0

    def _report_start(self) -> None:
        config, count, threads = self.config, self.processes.count, torch.get_num_threads()
        self._say(
            f"{config.run.dir}: {num_parameters(config.model):,} parameters, {count} process{'es' * (count > 1)} on "
            f"{device_name(self.device)}, {self.precision}, {threads} thread{'s' * (threads > 1)} each"
            + (", compiled" if self.compiled else "")
        )
        self._say(
            f"{config.training.tokens_per_step:,} tokens a step = {self.micro_batch_size} windows x "
            f"{config.data.sequence_length} tokens x {count} process{'es' * (count > 1)} x "
            f"{self.grad_accum_steps} accumulation step{'s' * (self.grad_accum_steps > 1)}"
        )
        windows = sum(
            int(window_counts(data_set, "train", sequence_length=config.data.sequence_length).sum())
            for data_set in self.data.sets
        )
        epochs = config.training.max_steps * self.samples_per_step / windows
        begin = f"from step {self.step}" if self.step else "from the start"
        self._say(f"{begin} to step {config.training.max_steps:,}, which is {epochs:.2f} epochs of the training data")

    # ------------------------------------------------------------------------------------------------ small necessities

    def _report_epochs(self, result: StepResult) -> None:
        """Says when a data set begins another epoch."""
        if not self.is_main:
            return
        before, now = self.order.epoch_of(result.first_sample), self.order.epoch_of(result.end_sample)
        for data_set, old, new in zip(self.data.sets, before, now, strict=True):
            if new > old:
                self._say(
                    f"step {result.step}: {data_set.path} has been read {new} time{'s' * (new > 1)} and is repeated"
                )

    def _append(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """A row of metrics with its step and tokens, into metrics.jsonl (the truth) and W&B (the mirror)."""
        if self.records is not None:
            tokens = step * self.config.training.tokens_per_step
            self.records.append_metrics({"step": step, "tokens": tokens, **metrics})

    def _wants_to_stop(self) -> bool:
        """True if this process was asked to stop, has used up its time, or met an error that must end the run."""
        in_trouble = self.records is not None and self.records.in_trouble()
        return in_trouble or self.stop_requests.asked() or self._time_is_up()

    def _anyone_wants_to_stop(self) -> bool:
        """The same over all processes; also tells the watchdog that this process is alive."""
        self.watchdog.feed()
        flag = torch.full((), float(self._wants_to_stop()), device=self.device)
        return bool(self.processes.sum(flag).item() > 0)

    def _time_is_up(self) -> bool:
        hours = self.config.training.max_hours
        return hours is not None and time.monotonic() - self._started > hours * 3600

    def _refuse_before_resume(self) -> None:
        """Raises UserError where this start has not looked yet where the run stands."""
        if self._first_step is None:
            raise UserError(
                "call the trainer's resume() before its other verbs: it loads the newest checkpoint, if there is one"
            )

    def _stop_reason(self) -> str:
        if self._time_is_up():
            return f"training.max_hours={self.config.training.max_hours} is over"
        return self.stop_requests.reason or (
            "another process was asked to stop" if self._told_to_stop else "the loop ended early"
        )

    def _say(self, line: str) -> None:
        """One line for the user, above the progress bar."""
        if self.is_main:
            logger.info(line)

    def _tend(self) -> None:
        """What is due between steps: collects garbage, by all processes together and not whenever one of them likes.

        After the first step also says what becomes of freed memory, and refuses an optimizer whose state, which exists only
        now, no checkpoint could hold. That step's garbage is left to Python: torch.compile
        drops half a million objects in it, whose memory the step's activations take if they are collected at once (124M,
        8 x 1024 tokens on a CPU: a peak of 5.12 GiB, not 5.17).
        """
        if self.step == self._first_step:
            optimizer_tensors(self.raw_optimizer, self.raw_model)
            gc.disable()
            self._keep_what_exists()
            keep_freed_memory(self.device)
        elif self.step % GARBAGE_EVERY == 0:
            gc.collect()

    @staticmethod
    def _keep_what_exists() -> None:
        """Collects garbage; what is left lives as long as the run, and later collections need not look at it."""
        gc.collect()
        gc.freeze()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What the processes agreed on in the step's reduction."""

    loss: float
    grad_norm: float
    finite: bool
    stop: bool
    loss_scale: float | None
    digest: int


def _allocate_gradients(parameters: list[nn.Parameter]) -> None:
    """Gives every parameter that has none a gradient of zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _accelerator(precision: Precision, *, watchdog_minutes: float) -> Accelerator:
    """Accelerate, told everything explicitly, and checked to have listened.

    Why `cpu=`: without it two launched CPU processes each believe that they are alone. Why the buckets: gradients are
    views into DDP's communication buffers, so that they exist once (see `_build`). No static graph: it fails under `no_sync`.
    """
    mixed_precision = "no" if precision == "fp32" else precision
    try:
        accelerator = Accelerator(
            cpu=cpu_is_asked_for() or not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=1,
            dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
            kwargs_handlers=[
                # The watchdogs end a stuck job first and name the line; this is what ends it if they cannot.
                InitProcessGroupKwargs(
                    init_method=restartable_init_method(), timeout=timedelta(minutes=2 * watchdog_minutes)
                ),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except UserError:  # from our rendezvous
        raise
    except ValueError as error:  # a variable that no launcher sets so
        if "already been initialized" in str(error):
            raise UserError(
                f"Accelerate was set up with another precision than {precision} in this process already, and keeps to the "
                "first; start another process"
            ) from None
        reason = " ".join(str(error).split())
        raise UserError(
            f"Accelerate refuses its environment: {reason}; unset that variable, or use a launcher"
        ) from None
    if accelerator.mixed_precision != mixed_precision or accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"Accelerate uses mixed precision {accelerator.mixed_precision} and {accelerator.gradient_accumulation_steps} "
            f"accumulation steps instead of {mixed_precision} and 1; an Accelerator made earlier in this process, or an "
            "environment variable ACCELERATE_*, set them"
        )
    return accelerator


def _wide(device: torch.device) -> torch.dtype:
    """The floating-point type in which numbers of a step are summed: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
