"""One training run, from its config to its last checkpoint: the only module that knows all the others.

What a step computes is a pure function of the config, the data and the step: batches are found by (seed, step), samples
are drawn by a generator of their own. So a run that was killed goes on with the very same losses.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import nanochat_native
from nanochat_native import ops
from nanochat_native.data import Batch, BatchLoader, Corpus, iterate_val, prepare
from nanochat_native.evaluation.bits_per_byte import Evaluation, measure_text
from nanochat_native.inference.engine import complete
from nanochat_native.inference.sampling import Sampling
from nanochat_native.model.config import GPTConfig
from nanochat_native.model.gpt import GPT
from nanochat_native.optim import Muon, buckets_of, clip_reduced_, overlap_backward, setup_optimizers
from nanochat_native.optim.schedule import lr_at, momentum_at
from nanochat_native.runs import checkpoint, run_folder
from nanochat_native.runs.config import LEARNING_RATE_FLAGS, MUON_OPTIONS, STDLIB, WITH_MUON, TrainConfig, horizon
from nanochat_native.runs.metrics_log import MetricsLog, SilentLog, finite, value_of
from nanochat_native.runtime import hardware
from nanochat_native.runtime.console import Console
from nanochat_native.runtime.distributed import RankError, World, require_same_bits
from nanochat_native.runtime.errors import ConfigError
from nanochat_native.runtime.flags import UNSET
from nanochat_native.runtime.signals import StopSignals
from nanochat_native.training import report, sizing
from nanochat_native.training.diagnosis import ROWS, Diagnosis
from nanochat_native.training.resolve import model_config
from nanochat_native.training.spikes import SpikeGuard

PYTHON_PROMPTS = ("def __init__(self", "import os\n", "class")
PROMPT_TOKENS = 16  # of the validation text, where it is not known to be Python
SAMPLE_TOKENS = 96
PEAK_SECONDS = 10.0  # between measurements of a CPU's peak rate, each a tenth of a second


class Trainer:
    """Holds a run. Making one checks everything, prepares data and model, and touches no run folder; train() does.

    corpus: the prepared data, where another run has it already.

    Raises ConfigError and what the modules it asks raise for bad flags or data: ValueError, OSError, RuntimeError.
    """

    def __init__(
        self, config: TrainConfig, console: Console, world: World | None = None, corpus: Corpus | None = None
    ) -> None:
        self.console = console
        self.world = world or World()
        self.device = torch.device(config.device)
        if self.device.type == "cuda" and self.world.size > 1:
            self.device = torch.device("cuda", self.world.local_rank)
        self.dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        try:
            ops.use_backend(config.backend)
        except RuntimeError as error:
            raise ConfigError(str(error)) from None
        shape = self.model_config(config, config.vocab_size)
        self.row_bytes = sizing.row_bytes(
            config,
            n_embd=shape.n_embd,
            kv_channels=shape.n_kv_head * shape.head_dim,
            element_bytes=self.dtype.itemsize,
        )
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        if free is not None:
            free = min(self.world.all_gather_object(free))
        config = sizing.size_batch(config, row_bytes=self.row_bytes, free_bytes=free, world_size=self.world.size)
        self.accumulation_steps = sizing.accumulation_steps(config, self.world.size)
        self.corpus = corpus or self._prepare_data(config)

        torch.manual_seed(config.seed)
        with torch.device("meta"):
            shape = self.model_config(config, self.corpus.vocab_size)
            self.model = GPT(shape, grad_checkpoint=config.grad_checkpoint)
        self.flops_per_token = self.model.estimate_flops()
        self.config = config = self.plan(config)
        self.loader = BatchLoader(
            self.corpus.train,
            batch_rows=config.total_batch_size // config.max_seq_len,
            sequence_len=config.max_seq_len,
            seed=config.seed,
            device=self.device,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.model.to_empty(device=self.device)
        self.init_weights()
        muon = {name: getattr(config, name) for name in MUON_OPTIONS}
        if config.optimizer in WITH_MUON:
            muon |= {"ns_steps": config.ns_steps, "coefficients": config.ns_coefficients}
        self.optimizers = setup_optimizers(
            self.model,
            **{name: rate for name in LEARNING_RATE_FLAGS if (rate := getattr(config, name)) != UNSET},
            weight_decay=config.weight_decay,
            matrix_weight_decay=config.matrix_weight_decay,
            optimizer=config.optimizer,
            process_group=self.world.group,
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bfloat16" else None,
            gather_dtype=torch.bfloat16 if config.gather_dtype == "bfloat16" else None,
            **muon,
        )
        self.buckets = buckets_of(self.optimizers)
        self.overlap = overlap_backward(self.buckets, self.model.parameters())
        self.peak = hardware.peak(self.device, self.dtype)
        self.peak_measured = time.monotonic()

        self.diagnosis = Diagnosis(self.model, self.optimizers, self.world) if config.diagnose else None
        self.step = 0  # optimizer steps done
        self.stop_signal = 0  # that a rank was sent
        self.saving: checkpoint.ShardedSave | None = None
        self.saving_meta: dict[str, Any] | None = None  # until it is sealed
        self.saved_step = -1
        self.skipped = self.skipped_in_a_row = 0
        self.spikes = SpikeGuard(config.skip_spikes)
        self.last_loss = math.nan
        self.last_bpb: float | None = None
        self.measured_step = -1  # of last_bpb
        self.seconds_per_step = self.diagnosed_seconds = 0.0

    # What fine-tuning does in its own way.

    def model_config(self, config: TrainConfig, vocab_size: int) -> GPTConfig:
        return model_config(config, vocab_size)

    def plan(self, config: TrainConfig) -> TrainConfig:
        """The config with its horizon."""
        return horizon(config, num_params=self.model.num_params(), flops_per_token=self.flops_per_token)

    def init_weights(self) -> None:
        self.model.init_weights(seed=self.config.seed)

    def divisors(self, batch: Batch) -> Iterator[float]:
        """What each micro-batch's mean loss is divided by, so that their sum, averaged over the ranks, is the mean over
        all targets of the step."""
        return itertools.repeat(self.accumulation_steps)

    def origin(self) -> dict[str, Any]:
        """What a checkpoint's meta says beside what every run's does."""
        return {}

    def _prepare_data(self, config: TrainConfig) -> Corpus:
        data = None if config.data == STDLIB else config.data
        assert config.cache_dir is not None
        cache_dir = config.cache_dir

        def run() -> Corpus:
            say = self.console.say
            try:
                return prepare(
                    data,
                    vocab_size=config.vocab_size,
                    cache_dir=cache_dir,
                    text_column=config.text_column,
                    log=lambda note: say(f"data     {note}"),
                )
            except FileNotFoundError as error:
                if config.resume is None:
                    raise
                raise FileNotFoundError(f"{error}; if the data has moved, give its new path with --data") from None

        # One rank of a machine builds the shards, the others find them.
        corpus = self.world.run_collectively(
            run if self.world.local_rank == 0 else lambda: None, ValueError, OSError, long_running=True
        )
        return corpus if corpus is not None else run()

    def train(self) -> int:
        """Run to the horizon or to a signal. Returns the exit code: 0, 1 diverged, 130 SIGINT, 143 SIGTERM."""
        config = self.config
        claim = (lambda: run_folder.claim(config)) if self.world.is_rank0 else lambda: None
        lock = self.world.run_collectively(claim, ConfigError, OSError)
        with contextlib.ExitStack() as stack:
            if lock is not None:
                stack.callback(os.close, lock)
            self.world.run_collectively(lambda: self._open_run(stack), ConfigError, checkpoint.CheckpointError, OSError)
            self.world.require_same({"the checkpoint's step": self.step})
            stopping = stack.enter_context(StopSignals())
            batches = stack.enter_context(self.loader.iterate(self.step))
            began, first_step = time.perf_counter(), self.step
            self._catch_up()
            while self.step < config.num_iterations and not self.stop_signal and not self.diverged:
                self.train_step(batches)
                self.stop_signal = self.world.all_reduce_max(stopping.signal)
                self.continue_save()
                last = self.step == config.num_iterations or self.stop_signal
                if (last or self._due(config.save_every)) and not self.diverged:
                    self.save()  # before what may fail
                if last:
                    self.finish_save()
                if self._due(config.eval_every):
                    self.evaluate()
                if self._due(config.sample_every):
                    self._sample()
            self.finish_save()
            if not self.diverged and self.saved_step != self.step:
                self.save()
            self.finish_save()
            self.log.sync()
        if self.world.is_rank0:
            with self.console.isolated("summary"):
                self.console.record(report.summarize(self, time.perf_counter() - began, self.step - first_step))
        self.world.barrier()  # torchrun ends all ranks once one of them leaves with another code than 0
        return self._exit_code()

    def _catch_up(self) -> None:
        """Measure and sample at the step that the run begins or goes on with, where its log lacks that: a run may have
        been killed after its checkpoint and before its reports."""
        recorded = self.world.all_gather_object(self.log.recorded)[0]
        if "val" in recorded:
            self.last_bpb, self.measured_step = value_of(recorded["val"], "bpb"), self.step
            self._add_to_checkpoint()
        elif self.step == 0 or self._due(self.config.eval_every):
            self.evaluate()
        if self.step > 0 and self._due(self.config.sample_every) and "sample" not in recorded:
            self._sample()

    def _exit_code(self) -> int:
        if self.diverged or self.saved_step != self.step:
            return 1
        return 128 + self.stop_signal if self.stop_signal else 0

    @property
    def diverged(self) -> bool:
        return self.skipped_in_a_row >= self.config.max_skipped_steps

    def _due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last, is due."""
        return self.step == self.config.num_iterations or (every > 0 and self.step % every == 0)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on the next batch: forward and backward in micro-batches, clip, update, log."""
        start = time.perf_counter()
        self.diagnosed_seconds = 0.0
        batch = next(batches)
        waited = time.perf_counter() - start

        self.last_loss, norm = self.compute_gradients(batch)
        rate, momentum = self._set_schedules()
        if self.spikes.is_spike(self.last_loss, norm):
            self._skip(f"a spike, loss {self.last_loss:.3f}, gradient norm {norm:.3f}")
        elif math.isfinite(norm):
            self._update_and_diagnose(norm)
            self.skipped_in_a_row = 0
        else:
            self._skip(f"the gradient's norm is {norm} ({self._not_finite()})")
        self.zero_grad()
        self.step += 1
        check_every = self.config.check_replicas_every
        if self.world.size > 1 and check_every and self.step % check_every == 0:
            require_same_bits(self.world, list(self.model.named_parameters()))
        self._log_step(norm, rate, momentum, waited, time.perf_counter() - start - self.diagnosed_seconds)

    def compute_gradients(self, batch: Batch) -> tuple[float, float]:
        """Loss and gradients of a step's batch in micro-batches, averaged over the ranks and clipped.

        Returns (the mean loss in nats, the gradients' norm before clipping).
        """
        loss = torch.zeros((), device=self.device)
        steps = self.accumulation_steps
        for i, ((x, y), divisor) in enumerate(zip(self.micro_batches(batch), self.divisors(batch), strict=False)):
            with self.autocast():
                micro_loss = self.model(x, y) / divisor
            with self.overlap if i + 1 == steps else contextlib.nullcontext():
                micro_loss.backward()
            loss += micro_loss.detach()
        norm = clip_reduced_(self.optimizers, self.config.grad_clip or math.inf).item()
        return (self.world.all_reduce_sum_(loss) / self.world.size).item(), norm

    def micro_batches(self, batch: Batch) -> Iterator[Batch]:
        inputs, targets = batch
        yield from zip(inputs.chunk(self.accumulation_steps), targets.chunk(self.accumulation_steps), strict=True)

    def _update_and_diagnose(self, norm: float) -> None:
        every = self.config.diagnose_every
        if self.diagnosis is None or (self.step + 1) % every:
            self.update()
            return
        before = self.diagnosis.seconds
        begun = False
        with self._isolated("diagnosis"):
            self.diagnosis.begin(norm, self.config.grad_clip or math.inf)
            begun = True
        self.update()
        if not begun:
            return
        with self.console.isolated("diagnosis"), self.autocast():
            probe, _ = next(self.validation_batches(ROWS * self.config.max_seq_len, World()))
            quantities = {name: finite(value) for name, value in self.diagnosis.finish(probe).items()}
            self.console.record(self.log.write("diagnosis", self.step + 1, **quantities))
        self.diagnosed_seconds = self.diagnosis.seconds - before

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _set_schedules(self) -> tuple[float, float]:
        """Set learning rates and momentum of the step that comes; returns the rates' multiplier and the momentum."""
        rate, momentum = lr_at(self.step, self.config), momentum_at(self.step, self.config)
        self.set_rates(rate, momentum)
        return rate, momentum

    @contextlib.contextmanager
    def _isolated(self, name: str) -> Iterator[None]:
        """Within the block an error ends the block alone, as a failed report. The block is one that all ranks run: an
        error that only some of them know of (a rank is gone) still ends the run."""
        try:
            yield
        except Exception as error:
            if self.world.group is not None and not isinstance(error, RankError):
                raise
            self.console.failed(name, error)

    def set_rates(self, multiplier: float, momentum: float) -> None:
        """Of the next update: every group's learning rate, by its initial one, and Muon's momentum."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum

    def _skip(self, why: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        counts = f"{self.skipped_in_a_row} in a row, {self.skipped} in all"
        self.console.say(f"step {self.step + 1}: {why}: no update; {counts}")

    def _not_finite(self) -> str:
        own = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        bad = list(dict.fromkeys(name for names in self.world.all_gather_object(own) for name in names))
        return f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else "".join(bad)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure bits per byte on the validation text; nats a token where the tokenizer is not known."""
        if self.saving is not None and self.saving.step == self.measured_step:
            self.finish_save()  # which adds what was measured on it
        self.last_bpb, self.measured_step = None, self.step
        result = None
        with self._isolated("evaluation"):
            result = self.measure(self.validation_batches(self.config.eval_tokens))
        if result is None:
            return
        tokenizer = self.corpus.tokenizer
        self.last_bpb = finite(result.bpb) if tokenizer else None
        self.console.record(self.log.write("val", self.step, loss=finite(result.loss), bpb=self.last_bpb))
        measured = f"{result.bpb:.4f} bits per byte" if tokenizer else f"{result.loss:.4f} nats a token"
        self.console.say(f"step {self.step}: validation {measured} on {result.targets:,} tokens")
        self._add_to_checkpoint()
        with self.console.isolated("measurement of the peak"):
            self._measure_peak_again()

    def validation_batches(self, max_tokens: int, world: World | None = None) -> Iterator[Batch]:
        """Of the first max_tokens of the validation text, this rank's part; or all that a `world` of its own gives."""
        world = world or self.world
        return iterate_val(
            self.corpus.val,
            batch_rows=self.config.device_batch_size,
            sequence_len=self.config.max_seq_len,
            max_tokens=max_tokens,
            device=self.device,
            rank=world.rank,
            world_size=world.size,
        )

    def measure(self, batches: Iterable[Batch]) -> Evaluation:
        """Of all ranks' batches together; without a tokenizer a token counts as a byte."""
        tokenizer = self.corpus.tokenizer
        lengths = torch.ones(self.corpus.vocab_size) if tokenizer is None else tokenizer.token_bytes
        with self.autocast():
            return measure_text(self.model, batches, lengths, self.world)

    def _measure_peak_again(self) -> None:
        """The best of several moments counts for a CPU, which other programs may have kept busy at the first."""
        if time.monotonic() - self.peak_measured < PEAK_SECONDS:
            return
        self.peak_measured = time.monotonic()
        again = hardware.peak(self.device, self.dtype)
        if self.peak.flops is not None and again.flops is not None and again.flops > self.peak.flops:
            self.peak = again

    def _sample(self) -> None:
        if self.world.is_rank0:
            with self.console.isolated("sample"):
                self.sample()

    def sample(self) -> None:
        """Continue one of the prompts, the next each time, drawn by a generator of its own. On the first rank alone."""
        tokenizer = self.corpus.tokenizer
        if tokenizer is None:
            return
        positions = self.model.max_positions
        prompts = list(PYTHON_PROMPTS)
        if self.config.data != STDLIB:
            count = min(PROMPT_TOKENS, len(self.corpus.val) - 1, positions // 2)
            prompts = [tokenizer.decode(self.corpus.val.read(1, 1 + count))]
        prompt = prompts[self.step // max(1, self.config.sample_every) % len(prompts)]
        while len(tokenizer.encode(prompt)) > positions - 2:  # broken characters take more tokens than were read
            prompt = prompt[: len(prompt) // 2]
        tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        seed = self.config.seed & 0xFFFFFFFF  # torch's generator takes these bits of a seed, and no other
        sampling = Sampling(min(SAMPLE_TOKENS, positions - len(tokens)), temperature=0.7, top_k=50, seed=seed)
        with self.autocast():
            pieces = complete(self.model, tokenizer, tokens, sampling)
        text = prompt + "".join(piece.text for piece in pieces)
        self.console.record(self.log.write("sample", self.step, prompt=prompt, text=text))
        self.console.say(f"step {self.step}: sample\n    " + text.rstrip().replace("\n", "\n    "))

    def save(self) -> None:
        """Write a checkpoint, unless something in it is not finite: then the earlier ones stay what they are.

        On many ranks it is only begun: continue_save() brings it to its end while training goes on.
        """
        self.finish_save()
        named = list(self.model.named_parameters())
        weights = {name: parameter.detach() for name, parameter in named}
        state, scalars = checkpoint.flatten_optimizers(named, self.optimizers)
        own = [name for name, tensor in {**weights, **state}.items() if not tensor.isfinite().all()]
        bad = [name for names in self.world.all_gather_object(own) for name in names]
        if bad:
            self.console.say(f"step {self.step}: no checkpoint, {bad[0]} is not finite; the earlier ones are kept")
            return
        meta = {
            "nanochat_native": nanochat_native.__version__,
            "model_config": dataclasses.asdict(self.model.config),
            "tokenizer_hash": self.corpus.tokenizer.hash if self.corpus.tokenizer else None,
            "data_hash": self.corpus.hash,
            "optimizer": scalars,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spike_history": list(self.spikes.history),
            "validation_bpb": self.last_bpb,
            **self.origin(),
        }
        self.log.sync()
        folder = self.config.run_dir / "checkpoints"
        if self.world.size > 1:
            self._begin_save(folder, weights, state, meta)
            return
        try:
            checkpoint.save(folder, self.step, {"model": weights, "optimizer": state}, meta, keep=self.config.keep)
        except OSError as error:
            self.console.say(f"warning: {error}")
            return
        self.saved_step = self.step
        self._add_to_checkpoint()

    def _add_to_checkpoint(self) -> None:
        """Put what was measured beside the checkpoint that it was measured on, once there are both."""
        if self.world.is_rank0 and self.last_bpb is not None and self.measured_step == self.saved_step:
            with self.console.isolated("note of the validation"):
                checkpoint.add_measurement(self.config.run_dir / "checkpoints", self.saved_step, self.last_bpb)

    def _begin_save(
        self, folder: Path, weights: dict[str, Tensor], state: dict[str, Tensor], meta: dict[str, Any]
    ) -> None:
        world = self.world
        assert world.background is not None
        saving = checkpoint.ShardedSave(folder, self.step, rank=world.rank, keep=self.config.keep)
        needed = sum(world.all_gather_object(sum(tensor.nbytes for tensor in state.values())))
        needed += sum(tensor.nbytes for tensor in weights.values())
        try:
            world.run_collectively((lambda: saving.prepare(needed)) if world.is_rank0 else lambda: None, OSError)
        except RankError as error:
            self.console.say(f"warning: {error}")
            return
        saving.start(weights, self._with_shards(state), world.background)
        self.saving, self.saving_meta = saving, meta

    def _with_shards(self, state: dict[str, Tensor]) -> dict[str, Tensor | DTensor]:
        """This rank's state, that which is cut by rows as its part of tensors that all ranks have."""
        cut = {id(bucket.parameters[0]) for bucket in self.buckets if not bucket.whole}
        names = {name for name, parameter in self.model.named_parameters() if id(parameter) in cut}
        own = {key: t for key, t in state.items() if t.ndim and key.rsplit(".", 1)[0] in names}
        everyone = self.world.all_gather_object({key: (tuple(t.shape), t.dtype) for key, t in own.items()})
        mesh = init_device_mesh("cpu", (self.world.size,))
        found: dict[str, Tensor | DTensor] = {key: t.cpu() for key, t in state.items() if key not in own}
        for key in dict.fromkeys(key for keys in everyone for key in keys):
            (_, *rest), dtype = next(shapes[key] for shapes in everyone if key in shapes)
            whole = torch.Size((sum(shapes[key][0][0] for shapes in everyone if key in shapes), *rest))
            local = own[key].cpu() if key in own else torch.empty((0, *rest), dtype=dtype)
            stride = torch.empty(whole, device="meta").stride()
            found[key] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole, stride=stride)
        return found

    def continue_save(self) -> None:
        """Takes a checkpoint that is being written on to its next part, if all ranks have come so far."""
        if self.saving is None or self.world.all_reduce_max(not self.saving.done):
            return
        failed = next((message for message in self.world.all_gather_object(self.saving.failed) if message), "")
        if not failed and self.saving_meta is not None:
            if self.world.is_rank0:
                self.saving.seal(self.saving_meta)
            self.saving_meta = None
            return
        self.saving.close()
        if failed:
            self.console.say(f"warning: {failed}")
        else:
            self.saved_step = self.saving.step
            self._add_to_checkpoint()
        self.saving = None

    def finish_save(self) -> None:
        """Waits for the checkpoint that is being written."""
        while self.saving is not None:
            self.continue_save()
            time.sleep(0.01)

    def _open_run(self, stack: contextlib.ExitStack) -> None:
        """Start the run's folder, or go on from its newest intact checkpoint; open its log."""
        run_dir = self.config.run_dir
        resumed = self.config.resume is not None
        if resumed and checkpoint.steps(run_dir / "checkpoints"):
            self._load()
        elif resumed and self.world.is_rank0:
            run_folder.require_same_data(self.config, self.corpus.hash)
        if self.world.is_rank0:
            run_folder.save_config(self.config, self.corpus.hash)
            if self.corpus.tokenizer is not None and not (run_dir / "tokenizer").exists():
                self.corpus.tokenizer.save(run_dir / "tokenizer")
        self.log = MetricsLog(run_dir, self.step or -1, self.console) if self.world.is_rank0 else SilentLog()
        stack.callback(self.log.close)
        if resumed:
            self.console.say(f"resume   {run_dir} from step {self.step}")

    def _load(self) -> None:
        folder = self.config.run_dir / "checkpoints"
        tensors, meta = checkpoint.load(folder, warn=lambda message: self.console.say(f"warning: {message}"))
        if meta.get("imported"):
            raise ConfigError(f"{folder} was imported: it has no optimizer's state to go on with")
        if meta["data_hash"] != self.corpus.hash:
            raise run_folder.other_data(self.config)
        if meta["step"] > self.config.num_iterations:
            raise ConfigError(f"{folder}: step {meta['step']} is beyond --num-iterations {self.config.num_iterations}")
        self.model.load_state_dict(tensors["model"])
        checkpoint.restore_optimizers(
            list(self.model.named_parameters()), self.optimizers, tensors["optimizer"], meta["optimizer"]
        )
        self.step = self.saved_step = meta["step"]
        self.skipped, self.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]
        self.spikes = SpikeGuard(self.config.skip_spikes, meta.get("spike_history", ()))
        self.last_bpb, self.measured_step = meta["validation_bpb"], meta.get("measured_step", -1)

    def _log_step(self, norm: float, rate: float, momentum: float, waited: float, seconds: float) -> None:
        self.seconds_per_step += (0.1 if self.seconds_per_step else 1.0) * (seconds - self.seconds_per_step)
        with self.console.isolated("log of a step"):
            config = self.config
            tokens_per_second = config.total_batch_size / seconds
            mfu = None
            if self.peak.flops is not None:
                mfu = self.flops_per_token * tokens_per_second / (self.peak.flops * self.world.size)
            bits = None
            if self.corpus.bytes_per_token:
                bits = finite(self.last_loss / (math.log(2) * self.corpus.bytes_per_token))
            record = self.log.write(
                "train",
                self.step,
                loss=finite(self.last_loss),
                bpb=bits,
                grad_norm=finite(norm),
                lr_multiplier=rate,
                momentum=momentum,
                skipped=self.skipped,
                seconds=seconds,
                tokens_per_second=tokens_per_second,
                mfu=mfu,
                memory_bytes=hardware.memory(self.device)[0],
                data_seconds=waited,
            )
            self.console.record(record)
            self.console.live(report.live_line(record, self), last=self.step == config.num_iterations)
