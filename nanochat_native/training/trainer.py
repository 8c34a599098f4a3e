"""One training run, from its config to its last checkpoint.

A step is a pure function of the weights, the config, the data and the number of the step: batches are found by
(seed, step), and samples have their own random generator. A run that was killed therefore resumes with exactly the same
losses.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import nanochat_native
from nanochat_native import ops
from nanochat_native.data import Batch, Loader, iterate_validation, make_loader
from nanochat_native.evaluation.bits_per_byte import Evaluation, measure_text
from nanochat_native.model.documents import Documents
from nanochat_native.model.gpt import GPT
from nanochat_native.ops import float8
from nanochat_native.ops.dtypes import widest_dtype
from nanochat_native.optim import Muon, buckets_of, clip_reduced_, overlap_backward, setup_optimizers
from nanochat_native.optim.schedule import lr_at, momentum_at, weight_decay_at
from nanochat_native.runs import checkpoint, loggers, run_folder
from nanochat_native.runs.config import MUON_SWITCHES, WITH_MUON, TrainConfig, resolve_horizon
from nanochat_native.runs.metrics_log import MetricsLog, SilentLog, none_if_nonfinite, value_of
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import Console, bar, duration
from nanochat_native.runtime.distributed import RankError, World, require_same_bits
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import is_unset
from nanochat_native.runtime.signals import StopSignals
from nanochat_native.training import report, resolve, scaling_laws, sizing
from nanochat_native.training.checkpointer import Checkpointer
from nanochat_native.training.diagnosis import ROWS, Diagnosis
from nanochat_native.training.graphs import StepGraphs, why_not
from nanochat_native.training.loss_scaling import LossScale
from nanochat_native.training.pretraining import Pretraining
from nanochat_native.training.scores import Score, scores_of
from nanochat_native.training.spikes import SpikeGuard
from nanochat_native.training.task import Task
from nanochat_native.training.throughput import Throughput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of --dtype


class Trainer:
    """A run. The constructor checks everything and prepares data and model; train() alone touches the run's folder.

    Args:
        world: the ranks; default: this process alone.
        task: what to train on; default: pretraining.

    Raises:
        ConfigError, ValueError, OSError, RuntimeError: for wrong flags or data.
    """

    def __init__(
        self, config: TrainConfig, console: Console, world: World | None = None, task: Task | None = None
    ) -> None:
        self.console = console
        self.world = world = world or World()
        self.task = task = task or Pretraining()
        self.scores = world.run_collectively(lambda: self._prepare_reports(config), ValueError, OSError, ImportError)
        self.device = torch.device(config.device)
        if self.device.type == "cuda" and world.size > 1:
            self.device = torch.device("cuda", world.local_rank)
        self.dtype = DTYPES[config.dtype]
        try:
            ops.use_backend(config.backend)
        except RuntimeError as error:
            raise ConfigError(str(error)) from None
        shape = task.model_config(config)
        self.row_bytes = sizing.row_bytes(config, shape, element_bytes=self.dtype.itemsize)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        if free is not None:
            free = min(world.all_gather_object(free))
        batch: dict[str, Any] = {"row_bytes": self.row_bytes, "free_bytes": free, "world_size": world.size}
        if not is_unset(config, "total_batch_size"):  # an error then comes before the data is prepared
            config = sizing.resolve_batch_size(config, **batch)
        self.corpus = task.prepare_data(config, console, world)
        shape = dataclasses.replace(shape, vocab_size=self.corpus.vocab_size)
        for score in self.scores:
            description = score.prepare(self.corpus.tokenizer, shape.sequence_len)
            console.say(f"{score.title.lower():8} {description}")
        config = sizing.resolve_batch_size(resolve.with_batch(config, shape), **batch)
        self.accumulation_steps = sizing.accumulation_steps(config, world.size)

        torch.manual_seed(config.seed)
        with torch.device("meta"):
            self.model = GPT(shape, grad_checkpoint=config.grad_checkpoint)
        if config.fp8 != "off":
            self._use_float8(config)
        self.flops_per_token = self.model.estimate_flops()
        counted = scaling_laws.scaling_params(shape) if config.recipe == "today" else self.model.num_params()
        config = resolve_horizon(config, num_params=counted, flops_per_token=self.flops_per_token)
        self.config = config
        self.loader = self.make_loader()
        self.model.to_empty(device=self.device)
        task.init_weights(self.model, config.seed)
        rates: dict[str, Any] = {**resolve.learning_rates(config)}
        muon: dict[str, Any] = {}
        if config.optimizer in WITH_MUON:
            muon = {name: getattr(config, name) == "on" for name in MUON_SWITCHES}
            muon |= {"ns_steps": config.ns_steps, "coefficients": config.ns_coefficients, "beta2": config.normuon_beta2}
            muon |= {"muon_form": config.muon_form, "per_head": config.per_head}
            muon["ns_bfloat16"] = config.ns_bfloat16 == "on"
        self.optimizers = setup_optimizers(
            self.model,
            recipe=config.recipe,
            **rates,
            smear_lr=resolve.smear_rate(config),
            batch_lr_scale=resolve.rate_factor(config),
            weight_decay=None if is_unset(config, "weight_decay") else config.weight_decay,
            matrix_weight_decay=resolve.matrix_weight_decay(config, shape),
            optimizer=config.optimizer,
            process_group=world.group,
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bfloat16" else None,
            gather_dtype=torch.bfloat16 if config.gather_dtype == "bfloat16" else None,
            **muon,
        )
        task.init_optimizers(self.model, self.optimizers)
        self.overlap = overlap_backward(buckets_of(self.optimizers), self.model.parameters())
        self.checkpointer = Checkpointer(
            config.run_dir / "checkpoints", self.model, self.optimizers, world, console, keep=config.keep
        )
        self.throughput = Throughput(self.device, self.dtype)
        self.graphs: StepGraphs | None = None  # of train()
        self.why_no_graphs = why_not(self.device, self.dtype, self.optimizers, world.size)
        if self.why_no_graphs is None and config.packing == "best-fit":
            self.why_no_graphs = "--packing is best-fit, whose batches for attention differ between steps"
        if config.cuda_graphs == "on" and self.why_no_graphs is not None:
            raise ConfigError(f"--cuda-graphs must be auto or off here: {self.why_no_graphs}")
        self.diagnosis = Diagnosis(self.model, self.optimizers, world) if config.diagnose else None

        self.step = 0  # optimizer steps done
        self.stop_signal = 0  # the signal that a rank has received
        self.skipped = self.skipped_in_a_row = 0
        self.loss_scale = LossScale() if self.dtype == torch.float16 else None
        self.spikes = SpikeGuard(config.skip_spikes)
        self.last_loss = math.nan
        self.last_bpb: float | None = None
        self.last_scores: dict[str, float] = {}  # by title
        self.tokens = 0  # that train() has trained on
        self.measured: dict[str, float] = {}  # what a kind of training adds to the record of a step

    def _prepare_reports(self, config: TrainConfig) -> list[Score]:
        """Check the loggers on the rank that logs, and return the scores, whose files are read."""
        if self.world.is_rank0:
            loggers.require_packages(config)
        return scores_of(config)

    def make_loader(self) -> Loader:
        """Return the loader of the run's batches."""
        config = self.config
        return make_loader(
            self.corpus,
            packing=config.order,
            batch_rows=config.total_batch_size // config.max_seq_len,
            sequence_len=config.max_seq_len,
            seed=config.seed,
            device=self.device,
            rank=self.world.rank,
            world_size=self.world.size,
            cache_dir=config.cache_dir,
        )

    def _use_float8(self, config: TrainConfig) -> None:
        """Let the model multiply in FP8 in training. Raise ConfigError for a batch or a model that does not suit it."""
        rows = config.device_batch_size * config.max_seq_len
        if rows % float8.MULTIPLE:
            raise ConfigError(
                f"--device-batch-size x --max-seq-len must be a multiple of {float8.MULTIPLE} tokens with --fp8, "
                f"got {rows}"
            )
        count = self.model.use_float8(config.fp8)
        if count == 0:
            raise ConfigError(
                f"--fp8 must be off for this model, got {config.fp8}: a linear layer in FP8 needs sizes that are "
                f"multiples of {float8.MULTIPLE} and at least {float8.SMALLEST_SIZE}"
            )
        self.console.say(f"fp8      {config.fp8}, {count} of {self.model.num_linears} linear layers")

    @property
    def setup(self) -> report.Setup:
        """The plan of the run, for its announcement."""
        return report.Setup(
            config=self.config,
            world_size=self.world.size,
            device=self.device,
            peak=self.throughput.peak,
            corpus=self.corpus,
            loader=self.loader,
            model=self.model,
            optimizers=self.optimizers,
            row_bytes=self.row_bytes,
            accumulation_steps=self.accumulation_steps,
        )

    def train(self) -> int:
        """Train to the horizon or to a signal.

        Returns:
            The exit code: 0; 1 if the run diverged or its last step was not saved; 130 for SIGINT, 143 for SIGTERM.
        """
        config = self.config
        claim = (lambda: run_folder.claim(config)) if self.world.is_rank0 else lambda: None
        lock = self.world.run_collectively(claim, ConfigError, OSError)
        with contextlib.ExitStack() as stack:
            if lock is not None:
                stack.callback(os.close, lock)
            self.world.run_collectively(lambda: self._open_run(stack), ConfigError, checkpoint.CheckpointError, OSError)
            self.world.require_same({"the checkpoint's step": self.step})
            self._stopping = stopping = stack.enter_context(StopSignals())
            batches = stack.enter_context(self.loader.iterate(self.step))
            began, first_step = time.perf_counter(), self.step
            self._catch_up()
            self._prepare_graphs()
            while self.step < config.num_iterations and not self.stop_signal and not self.diverged:
                self.train_step(batches)
                self.stop_signal = self.world.all_reduce_max(stopping.signal)
                self.checkpointer.poll()
                last = self.step == config.num_iterations or self.stop_signal
                if (last or self._due(config.save_every)) and not self.diverged:
                    self.save()  # first: an evaluation or a sample may fail
                if last:
                    self.checkpointer.wait()
                if self._due(config.eval_every):
                    self.evaluate()
                if self._due(config.sample_every):
                    self.sample()
                for score in self.scores:
                    if self._is_due(score) and not self.diverged:
                        self.measure_score(score)
            self.checkpointer.wait()
            if not self.diverged and self.checkpointer.saved_step != self.step:
                self.save()
            self.checkpointer.wait()
            self.log.sync()
            outcome = self._outcome(time.perf_counter() - began, self.step - first_step)
            self.log.end(report.figures(outcome), self._exit_code())
        if self.world.is_rank0:
            with self.console.isolated("summary"):
                self.console.record(report.summarize(outcome, self.console))
        self.world.barrier()  # torchrun ends all ranks when one of them exits with a code other than 0
        return self._exit_code()

    def _catch_up(self) -> None:
        """Evaluate and sample at the first step of this call if the log has no record of it: a run may have been killed
        after its checkpoint and before its reports. Evaluate too if the log has no record of that step at all: the run
        begins here, with new weights or as a fork of another one."""
        recorded = self.world.all_gather_object(self.log.recorded)[0]
        if "val" in recorded:
            self.last_bpb = value_of(recorded["val"], "bpb")
            if self.last_bpb is not None:
                self.checkpointer.add_measurement(self.step, self.last_bpb)
        elif not recorded or self._due(self.config.eval_every):
            self.evaluate()
        if self.step > 0 and self._due(self.config.sample_every) and "sample" not in recorded:
            self.sample()
        for score in self.scores:
            kept = value_of(recorded.get(score.title.lower(), {}), "score")
            if kept is not None:
                self.last_scores[score.title] = kept
            elif self.step > 0 and self._is_due(score):
                self.measure_score(score)

    def _prepare_graphs(self) -> None:
        """Let the steps be captured as CUDA graphs, or say why not."""
        if self.config.cuda_graphs == "off":
            return
        if self.why_no_graphs is not None:
            if self.device.type == "cuda":
                self.console.say(f"graphs   off: {self.why_no_graphs}")
            return
        required = self.config.cuda_graphs == "on"
        self.graphs = StepGraphs(self.model, self.optimizers, self.autocast, self.console, required=required)

    def _exit_code(self) -> int:
        if self.diverged or self.checkpointer.saved_step != self.step:
            return 1
        return 128 + self.stop_signal if self.stop_signal else 0

    def _outcome(self, seconds: float, steps: int) -> report.Outcome:
        """Return how this call of train() ended, after `steps` steps in `seconds`."""
        measured = self.diagnosis
        return report.Outcome(
            config=self.config,
            step=self.step,
            steps=steps,
            seconds=seconds,
            tokens=self.tokens,
            diverged=self.diverged,
            saved_step=self.checkpointer.saved_step,
            skipped=self.skipped,
            skipped_in_a_row=self.skipped_in_a_row,
            validation_bpb=self.last_bpb,
            scores=self.last_scores,
            diagnosed=0 if measured is None else measured.count,
            diagnosis_seconds=0.0 if measured is None else measured.seconds,
            has_tokenizer=self.corpus.tokenizer is not None,
        )

    @property
    def diverged(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.skipped_in_a_row >= self.config.max_skipped_steps

    def _due(self, every: int) -> bool:
        """Return whether something is due that is done after every `every` steps and after the last."""
        return self.step == self.config.num_iterations or (every > 0 and self.step % every == 0)

    def _is_due(self, score: Score) -> bool:
        """Return whether a score is due, and no signal has asked the run to stop. A run that is resumed
        after a signal measures it."""
        return self._due(score.every) and not self.stop_signal

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Do one optimizer step on the next batch: forward and backward in micro-batches, clip, update, log."""
        start = time.perf_counter()
        diagnosed = 0.0
        batch = next(batches)
        waited = time.perf_counter() - start

        self.last_loss, norm = self.compute_gradients(batch)
        rate, momentum = self._set_schedules()
        scale = None if self.loss_scale is None else self.loss_scale.scale
        if self.loss_scale is not None and self.loss_scale.update(norm):
            self.console.say(
                f"step {self.step + 1}: the gradients overflow float16 at the loss scale {scale:g}: no update; "
                f"the scale is {self.loss_scale.scale:g} now"
            )
        elif self.spikes.is_spike(self.last_loss, norm):
            self._skip(f"a spike, loss {self.last_loss:.3f}, gradient norm {norm:.3f}")
        elif math.isfinite(norm):
            diagnosed = self._update_and_diagnose(norm)
            self.skipped_in_a_row = 0
        else:
            self._skip(f"the gradient's norm is {norm} ({self._not_finite()})")
        self.zero_grad()
        self.step += 1
        check_every = self.config.check_replicas_every
        if self.world.size > 1 and check_every and self.step % check_every == 0:
            require_same_bits(self.world, list(self.model.named_parameters()))
        self._log_step(norm, rate, momentum, scale, waited, time.perf_counter() - start - diagnosed)

    def compute_gradients(self, batch: Batch) -> tuple[float, float]:
        """Compute the gradients of a step's batch in micro-batches, averaged over the ranks and clipped.

        Returns:
            (the mean loss in nats, the norm of the gradients before clipping).
        """
        loss = torch.zeros((), device=self.device)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        micro_batches = list(self.micro_batches(batch))
        documents = [self.task.documents_of(x) for x, *_ in micro_batches]  # before the device has work to wait for
        divisors = self.task.loss_divisors(micro_batches, self.world)
        for i, (micro_batch, divisor) in enumerate(zip(micro_batches, divisors, strict=True)):
            if self.graphs is not None:
                loss += self.graphs.forward_backward(micro_batch, divisor, first=i == 0)
                continue
            with self.autocast():
                micro_loss = self.micro_loss(micro_batch, documents[i]) / divisor
            with self.overlap if i + 1 == len(micro_batches) else contextlib.nullcontext():
                (micro_loss if scale == 1 else micro_loss * scale).backward()
            loss += micro_loss.detach()
        norm = clip_reduced_(self.optimizers, self.config.grad_clip or math.inf, loss_scale=scale)
        mean = self.world.all_reduce_sum_(loss) / self.world.size
        return read_numbers(mean, norm)

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """Divide a batch into micro-batches."""
        inputs, targets = batch
        yield from zip(inputs.chunk(self.accumulation_steps), targets.chunk(self.accumulation_steps), strict=True)

    def micro_loss(self, micro_batch: Batch, documents: Documents | None) -> Tensor:
        """Return the mean loss of a micro-batch in nats, 0-d. documents: those of Task.documents_of."""
        inputs, targets = micro_batch
        loss: Tensor = self.model(inputs, targets, documents=documents)
        return loss

    @property
    def tokens_of_step(self) -> int:
        """The number of tokens that the last step was trained on, over all ranks."""
        return self.config.total_batch_size

    def _update_and_diagnose(self, norm: float) -> float:
        """Update the weights, and measure the layers if that is due. Return the seconds that it took to measure."""
        if self.diagnosis is None or (self.step + 1) % self.config.diagnose_every:
            self.update()
            return 0.0
        before = self.diagnosis.seconds
        begun = False
        with self._isolated("diagnosis"):
            self.diagnosis.begin(norm, self.config.grad_clip or math.inf)
            begun = True
        self.update()
        if not begun:
            return 0.0
        with self.console.isolated("diagnosis"), self.autocast():
            probe, _ = next(self.validation_batches(ROWS * self.config.max_seq_len, World()))
            quantities = {name: none_if_nonfinite(value) for name, value in self.diagnosis.finish(probe).items()}
            self.console.record(self.log.write("diagnosis", self.step + 1, **quantities))
        return self.diagnosis.seconds - before

    def update(self) -> None:
        """Update the weights by their gradients."""
        if self.graphs is not None:
            self.graphs.update()
            return
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Clear the gradients, unless the next step overwrites them."""
        if self.graphs is not None and self.graphs.keeps_gradients:
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def autocast(self) -> torch.autocast:
        """Return the context in which the model runs in --dtype."""
        is_float32 = self.dtype == torch.float32  # which autocast does not take
        return torch.autocast(self.device.type, torch.bfloat16 if is_float32 else self.dtype, enabled=not is_float32)

    def _set_schedules(self) -> tuple[float, float]:
        """Set the learning rates, the momentum and the weight decay of this step. Return the rates' multiplier and the
        momentum."""
        rate, momentum = lr_at(self.step, self.config), momentum_at(self.step, self.config)
        self.set_rates(rate, momentum, weight_decay_at(self.step, self.config))
        return rate, momentum

    @contextlib.contextmanager
    def _isolated(self, name: str) -> Iterator[None]:
        """Turn an error in a block that all ranks run into a failed report.

        An error that not all ranks share, as when a rank is lost, still ends the run.
        """
        try:
            yield
        except Exception as error:
            if self.world.group is not None and not isinstance(error, RankError):
                raise
            self.console.failed(name, error)

    def refuse_loss_scaling(self) -> None:
        """Raise ConfigError for a run in float16, for an experiment that takes every step."""
        if self.loss_scale is not None:
            raise ConfigError("--dtype must be float32 or bfloat16 for this experiment, got float16: it skips steps")

    def set_rates(self, multiplier: float, momentum: float, decay: float = 1.0) -> None:
        """Set each group's learning rate to its initial one times `multiplier`, Muon's momentum, and its weight decay
        to the initial one times `decay`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum
                    group["weight_decay"] = group["initial_weight_decay"] * decay

    def _skip(self, why: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        counts = f"{self.skipped_in_a_row} in a row, {self.skipped} in all"
        self.console.say(f"step {self.step + 1}: {why}: no update; {counts}")

    def _not_finite(self) -> str:
        """Return the names of the gradients that are not finite on some rank, in short."""
        own = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        bad = list(dict.fromkeys(name for names in self.world.all_gather_object(own) for name in names))
        return f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else "".join(bad)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure and log bits per byte on the validation text, or nats per token without a tokenizer."""
        self.last_bpb = None
        result = None
        with self._isolated("evaluation"):
            result = self.measure(self.validation_batches(self.config.eval_tokens))
        if result is None:
            return
        tokenizer = self.corpus.tokenizer
        self.last_bpb = none_if_nonfinite(result.bpb) if tokenizer else None
        self.console.record(self.log.write("val", self.step, loss=none_if_nonfinite(result.loss), bpb=self.last_bpb))
        measured = f"{result.bpb:.4f} bits per byte" if tokenizer else f"{result.loss:.4f} nats a token"
        self.console.say(f"step {self.step}: validation {measured} on {result.targets:,} tokens")
        if self.last_bpb is not None:
            self.checkpointer.add_measurement(self.step, self.last_bpb)
        with self.console.isolated("measurement of the peak"):
            self.throughput.measure_peak_again()

    def measure_score(self, score: Score) -> None:
        """Measure and log a score. A signal ends it after a part, without a record."""
        self.last_scores.pop(score.title, None)
        start = time.perf_counter()
        results: list[Any] = []
        tokenizer, parts = self.corpus.tokenizer, len(score.parts)
        assert tokenizer is not None
        with self._isolated(score.title):
            for part, name in enumerate(score.parts):

                def show(done: int, total: int, what: str = f"{part + 1}/{parts} {name}") -> None:
                    self.console.live(f"step {self.step}: {score.title} {what} {bar(done, total)}")

                with self.autocast():
                    result = score.measure(
                        part,
                        self.model,
                        tokenizer,
                        batch_tokens=self.config.device_batch_size * self.config.max_seq_len,
                        world=self.world,
                        progress=show,
                    )
                results.append(result)
                self.stop_signal = self.world.all_reduce_max(self._stopping.signal)
                if self.stop_signal:
                    return
        if len(results) < parts:
            return
        figures, seconds = score.figures(results), time.perf_counter() - start
        self.last_scores[score.title] = figures["score"]
        self.console.record(self.log.write(score.title.lower(), self.step, **figures, seconds=seconds))
        self.console.say(f"step {self.step}: {score.title} {figures['score']:.4f} in {duration(seconds)}")

    def validation_batches(self, max_tokens: int, world: World | None = None) -> Iterator[Batch]:
        """Yield this rank's part of the first max_tokens of the validation text. world: default: the run's."""
        world = world or self.world
        return iterate_validation(
            self.corpus,
            packing=self.config.order,
            batch_rows=self.config.device_batch_size,
            sequence_len=self.config.max_seq_len,
            max_tokens=max_tokens,
            device=self.device,
            rank=world.rank,
            world_size=world.size,
        )

    def measure(self, batches: Iterable[Batch]) -> Evaluation:
        """Return the loss on the batches of all ranks. Without a tokenizer each token counts as one byte."""
        tokenizer = self.corpus.tokenizer
        lengths = torch.ones(self.corpus.vocab_size) if tokenizer is None else tokenizer.token_bytes
        with self.autocast():
            return measure_text(self.model, batches, lengths, self.world, self.task.documents_of)

    def sample(self) -> None:
        """Generate and log a sample of text, on rank 0."""
        if not self.world.is_rank0:
            return
        with self.console.isolated("sample"):
            found = self.task.sample(self.model, self.corpus, self.config, self.step, self.autocast())
            if found is not None:
                self.console.record(self.log.write("sample", self.step, prompt=found.prompt, text=found.text))
                self.console.say(f"step {self.step}: {found.message}")

    def save(self) -> None:
        """Write a checkpoint; on many ranks, begin one."""
        tokenizer = self.corpus.tokenizer
        meta = {
            "nanochat_native": nanochat_native.__version__,
            "model_config": dataclasses.asdict(self.model.config),
            "tokenizer_hash": tokenizer.hash if tokenizer else None,
            "data_hash": self.corpus.hash,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spike_history": list(self.spikes.history),
            **({} if self.loss_scale is None else {"loss_scale": dataclasses.asdict(self.loss_scale)}),
            "validation_bpb": self.last_bpb,
            **self.task.checkpoint_metadata(),
        }
        self.log.sync()
        self.checkpointer.save(self.step, meta, self.loader.state(self.step))

    def _open_run(self, stack: contextlib.ExitStack) -> None:
        """Create the run's folder, or resume from its newest intact checkpoint, and open its log."""
        run_dir = self.config.run_dir
        resumed = self.config.resume is not None
        if resumed and checkpoint.steps(run_dir / "checkpoints"):
            self._load()
        elif resumed and self.world.is_rank0:
            run_folder.require_same_data(self.config, self.corpus.hash)
        if self.world.is_rank0:
            if self.corpus.files:
                run_folder.save_data_files(self.config, self.corpus.files)
            run_folder.save_config(self.config, self.corpus.hash)
            if self.corpus.tokenizer is not None and not (run_dir / "tokenizer").exists():
                self.corpus.tokenizer.save(run_dir / "tokenizer")
        self.log = self._open_log() if self.world.is_rank0 else SilentLog()
        stack.callback(self.log.close)
        if resumed:
            self.console.say(f"resume   {run_dir} from step {self.step}")

    def _open_log(self) -> MetricsLog:
        last_step = self.step or -1
        facts = {
            "nanochat_native": nanochat_native.__version__,
            "torch": torch.__version__,
            "machine": hardware.describe(self.device),
            "ranks": self.world.size,
            "parameters": self.model.num_params(),
            "flops_per_token": self.flops_per_token,
        }
        openers = loggers.openers(self.config, facts, last_step)
        return MetricsLog(self.config.run_dir, last_step, self.console, openers)

    def _load(self) -> None:
        meta, loader_state = self.checkpointer.load(self._check_resumable)
        self.step = meta["step"]
        self.skipped, self.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]
        self.spikes = SpikeGuard(self.config.skip_spikes, meta.get("spike_history", ()))
        if self.loss_scale is not None:
            self.loss_scale = LossScale(**meta.get("loss_scale", {}))
        self.last_bpb = meta["validation_bpb"]
        if loader_state:
            self.loader.restore(self.step, loader_state)

    def _check_resumable(self, meta: dict[str, Any]) -> None:
        """Raise ConfigError for the meta of a checkpoint of other data, or of a step beyond the horizon."""
        if meta["data_hash"] != self.corpus.hash:
            raise run_folder.other_data(self.config)
        if meta["step"] > self.config.num_iterations:
            raise ConfigError(
                f"--num-iterations must be >= {meta['step']}, the step of the newest checkpoint in "
                f"{self.config.run_dir / 'checkpoints'}, got {self.config.num_iterations}"
            )

    def _log_step(
        self, norm: float, rate: float, momentum: float, scale: float | None, waited: float, seconds: float
    ) -> None:
        self.throughput.add_step(seconds)
        self.tokens += self.tokens_of_step
        with self.console.isolated("log of a step"):
            tokens_per_second = self.tokens_of_step / seconds
            memory_bytes, available = hardware.memory(self.device)
            bits = None
            if self.corpus.bytes_per_token:
                bits = none_if_nonfinite(self.last_loss / (math.log(2) * self.corpus.bytes_per_token))
            record = self.log.write(
                "train",
                self.step,
                loss=none_if_nonfinite(self.last_loss),
                bpb=bits,
                grad_norm=none_if_nonfinite(norm),
                lr_multiplier=rate,
                momentum=momentum,
                skipped=self.skipped,
                **({} if scale is None else {"loss_scale": scale}),
                seconds=seconds,
                tokens_per_second=tokens_per_second,
                mfu=self.throughput.share_of_peak(self.flops_per_token * tokens_per_second, self.world.size),
                memory_bytes=memory_bytes,
                data_seconds=waited,
                **self.measured,
            )
            self.console.record(record)
            line = report.live_line(
                record,
                num_iterations=self.config.num_iterations,
                seconds_per_step=self.throughput.seconds_per_step,
                available_bytes=available,
            )
            self.console.live(line, last=self.step == self.config.num_iterations)


def read_numbers(loss: Tensor, norm: Tensor) -> tuple[float, float]:
    """Return two 0-d tensors as numbers. On a GPU this is the only place of a training step where the host waits."""
    wide = widest_dtype(loss.device)
    first, second = torch.stack((loss.to(wide), norm.to(wide))).tolist()
    return first, second
