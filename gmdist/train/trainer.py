"""The step and the loop. Knows the contract of a family, and no family."""

import math
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from gmdist import storage
from gmdist.errors import ConfigError, DivergedError
from gmdist.families.family import INITIALIZE_SAMPLES, Family, Metrics
from gmdist.nets.finite import watched
from gmdist.rng import derive
from gmdist.train import checkpoint
from gmdist.train.blocks import prepare
from gmdist.train.checkpoint import Reader
from gmdist.train.config import TrainConfig, micro_batch_size
from gmdist.train.control import Clock, Control, Skips, is_sound
from gmdist.train.cost import FlopCount, Profile, explaining_memory, of_micro_batches, speed
from gmdist.train.ema import EMA
from gmdist.train.engine import Unit, computing, make_unit
from gmdist.train.held_out import Measure, held_out_means
from gmdist.train.hooks import Hooks, Outcome, Progress
from gmdist.train.metrics import Averages, MetricsLog, Quarantine
from gmdist.train.optim import OptimConfig, lazily, learning_rate, trained_children
from gmdist.train.preview import preview
from gmdist.train.saver import Saver
from gmdist.train.source import Loaded, Source, moved_ahead, split
from gmdist.train.state import (
    RunIdentity,
    check_identity,
    load_state,
    shapes_of,
    share_frozen,
    state_tensors,
    worker_shapes_of,
)
from gmdist.workers import all_gathered_objects, rank, total, world_size


class Trainer:
    """Trains a family on one worker; all workers run the same."""

    def __init__(
        self,
        family: Family,
        config: TrainConfig,
        optim: dict[str, OptimConfig],
        identity: RunIdentity,
        run_dir: str,
        data: Source,
        test_data: Source | None = None,
        device: torch.device | None = None,
        hooks: Hooks | None = None,
        measure: Measure | None = None,
    ) -> None:
        """Set up engines and resume from the newest sound checkpoint in `run_dir`, if there is one.

        `measure` finds what an evaluation says beside the family's own metrics, from its averaged weights.

        Raises:
            ConfigError: the workers do not divide the batch, or a trained child has no optimizer.
            CheckpointError, DataError: the checkpoint belongs to another run.
        """
        self.device = device or torch.device("cpu")
        self.config, self.identity = config, identity
        self.run_dir, self.data, self.test_data, self.hooks = run_dir, data, test_data, hooks or Hooks()
        self._measure = measure
        self.batch_size = identity.batch_size
        self.micro_batch_size = micro_batch_size(config, self.batch_size, world_size(), family.compared)
        self.step, self.seen, self._digest = 0, 0, 0
        self._cursor = 0  # the next sample's number; `seen` and the samples that were left out
        self._left_out: list[tuple[int, int]] = []  # numbers of samples: first, last + 1
        self._skips = Skips(self.device)

        found = checkpoint.find_together(run_dir, self.hooks.on_message)
        if found is not None:
            check_identity(found, identity, config.seed)

        self.family = family.to(self.device)
        self.phases = family.phases()
        self._trained = trained_children(family, optim)
        self.optim = {name: lazily(optim[name], [p for p in self.phases if p.trains == name]) for name in self._trained}
        if found is None:
            self.family.initialize(data.first(min(INITIALIZE_SAMPLES, data.num_samples)).batch_on(self.device))
            share_frozen(family, self._trained)
        self._shapes = shapes_of(family)  # before stage 3 shares the weights out
        self._set_mode(training=True)
        prepare(family, self._trained, config)
        self.units: dict[str, Unit] = {
            name: make_unit(
                family,
                name,
                self.optim[name],
                stage=config.zero_stage,
                precision=config.precision,
                device=self.device,
                offload=config.offload_optimizer,
            )
            for name in self._trained
        }
        self.ema = EMA([self.units[name] for name in family.averaged], config.ema_halflife_kimg, config.ema_ramp)
        self._averages = Averages(self.device)
        self._flops = FlopCount()
        if found is not None:
            self._load(found)
        best, largest = config.best_metric, config.best_order == "max"
        self._saver = Saver(run_dir, config.keep_checkpoints, is_sound, best, self.step, largest=largest)
        self._saver.prepare(state_tensors(family, self.units, self.ema))
        self._evaluated: tuple[int, dict[str, float]] = -1, {}  # a step, and the metrics of its evaluation
        self._control = Control()
        self._quarantine = Quarantine(run_dir, data.max_bad)
        self._waited_s = 0.0
        self._counted = data.counters()
        self._log = MetricsLog(run_dir, self.step) if rank() == 0 else None

    # The step

    def train_step(self, loaded: Loaded) -> None:
        """One optimizer step on this worker's part of a batch."""
        batch = loaded.batch_on(self.device)
        before = {name: buffer.clone() for name, buffer in self.family.named_buffers()}
        micro_batches = split(batch, self.micro_batch_size)
        share = 1.0 / world_size()  # of a step: those before a resume count as much, on however many workers
        norms = []
        for number, phase in enumerate(self.phases):
            if not phase.is_due(self.step, self.seen):
                continue
            unit = self.units[phase.trains]
            for i, micro_batch in enumerate(micro_batches):
                # Dropout is the one user of torch's generator: begun anew, it does not depend on where a run resumed.
                torch.manual_seed(derive(self.config.seed, f"dropout/{number}/{i}/{rank()}", self.step))
                with self._flops.counting(phase, len(micro_batch["key"]), self.seen):
                    metrics = unit.accumulate(phase, micro_batch, self.seen, 1.0 / len(micro_batches))
                self._averages.add(metrics, share / len(micro_batches))
            norm = unit.step(learning_rate(self.optim[phase.trains], self.step, self.config.num_steps))
            self._averages.add({f"{phase.name}/grad_norm": norm}, share)
            norms.append(norm)
        self._averages.add(self.family.after_step(self.seen), share)
        self.ema.update(self.batch_size, self.seen)
        is_bad = self._skips.note(norms, self._cursor)
        for name, buffer in self.family.named_buffers():  # what made the gradients NaN is in statistics too
            buffer.copy_(torch.where(is_bad, before[name], buffer))
        self.step += 1
        self.seen += self.batch_size
        self._cursor = self._past_left_out(self._cursor + self.batch_size)
        self._digest += loaded.digest
        self._quarantine.add(loaded.quarantined)

    # The loop

    def fit(self) -> Outcome:
        """Train to the last step, or until a stop is requested; either way the last step done is saved.

        Raises:
            DivergedError: the gradients are not finite, and going back to the last checkpoint did not help.
            MemoryExceededError: a micro-batch does not fit into the memory.
            CheckpointError: a checkpoint cannot be written.
        """
        config = self.config
        if self.step == 0:
            self._check_best_metric()
            if config.sample_every:
                self._write_preview()
        clock = Clock(self.step)
        profile = Profile(self.run_dir, config.profile_steps if rank() == 0 else None)
        batches = moved_ahead(self._batches(), self.device)
        stopping = self.step == self.hooks.last_step
        saved_step, saving, is_due = self.step, False, False
        with profile:
            while self.step < config.num_steps and not stopping:
                asked_s = time.monotonic()
                loaded = next(batches)
                self._waited_s += time.monotonic() - asked_s
                with explaining_memory(self.step, *of_micro_batches(self.micro_batch_size)):
                    self.train_step(loaded)
                self.hooks.beat()
                profile.step()
                last = self.step == config.num_steps
                if self._skips.in_a_row >= config.rollback_after:
                    before = self.step
                    with clock.paused():
                        self._go_back(loaded)
                        batches = moved_ahead(self._batches(), self.device)
                    clock.rewind(before - self.step)
                    is_due = False
                    continue
                if self.step % config.log_every == 0 or last:
                    self._write_metrics(clock)
                if config.evaluate_every and (self.step % config.evaluate_every == 0 or last):
                    with clock.paused():
                        self._evaluate()
                if config.sample_every and (self.step % config.sample_every == 0 or last):
                    with clock.paused():
                        self._write_preview()
                asked = rank() == 0 and self.hooks.stop_requested(), rank() == 0 and self.hooks.save_requested()
                stop, failed, save = self._control.exchange(asked[0], self._saver.failed(), asked[1])
                stopping = (stop or self.step == self.hooks.last_step) and not last
                if failed:
                    self._saver.wait()
                saving, is_due = saving or save, is_due or self.step % config.checkpoint_every == 0
                # While updates are left out, the weights may be what is wrong: such a checkpoint would not help.
                if ((saving or is_due) and not self._skips.look()) or last or stopping:
                    with clock.paused():
                        self._save()
                    saved_step, saving, is_due = self.step, False, False
        assert saved_step == self.step
        self._saver.wait()
        return Outcome(self.step, self.seen, self._total_digest(), finished=self.step >= config.num_steps)

    def _batches(self) -> Iterator[Loaded]:
        """This worker's parts of the batches from the cursor on, without those that are left out."""
        position = self._cursor
        batches = self.data.batches(position)
        while True:
            yield next(batches)
            following = self._past_left_out(position + self.batch_size)
            if following != position + self.batch_size:
                batches = self.data.batches(following)
            position = following

    def _past_left_out(self, position: int) -> int:
        """The next sample that is not left out."""
        for first, stop in self._left_out:
            position = stop if position == first else position
        return position

    def _go_back(self, loaded: Loaded) -> None:
        """Load the last checkpoint, and from then on leave the samples out whose updates were left out.

        `loaded` is this worker's part of the last of them.
        """
        window = self._skips.since, self._cursor
        problem = f"the gradients of {self._skips.in_a_row} steps in a row, up to step {self.step}, were not finite"
        if (layer := self._first_not_finite(loaded)) is not None:
            problem += f" (in the last, the first output that is not is that of {layer})"
        advice = "lower the learning rate, or set optim.*.clip_norm or a longer optim.*.warmup_steps"
        self._saver.wait()
        found = checkpoint.find_together(self.run_dir, self.hooks.on_message, is_sound)
        if found is None:
            raise DivergedError(f"{self.run_dir}: {problem}, and there is no checkpoint to go back to; {advice}")
        before = [(first, stop) for first, stop in self._left_out if first >= found.meta["cursor"]]
        if before:
            raise DivergedError(
                f"{self.run_dir}: {problem}, again after the run went back to step {found.meta['step']} and left out "
                f"the samples {before[-1][0]} to {before[-1][1] - 1}; {advice}"
            )
        left_out = sorted([*self._left_out, window])
        self._load(found)
        self._saver.delete_after(self.step)  # they belong to what did not go well
        self._left_out = left_out
        self._cursor = self._past_left_out(self._cursor)
        self._quarantine.clear()
        if self._log is not None:
            self._log.close()
            self._log = MetricsLog(self.run_dir, self.step)
        self.hooks.on_message(
            f"{problem}: back to the checkpoint of step {self.step}; the samples {window[0]} to {window[1] - 1} are "
            "left out"
        )

    def _first_not_finite(self, loaded: Loaded) -> str | None:
        """The first layer on any worker whose output is not finite on the last micro-batch; None if all are.

        The gradients and buffers that it leaves are those of a run that ends or goes back.
        """
        micro_batch = split(loaded.batch_on(self.device), self.micro_batch_size)[-1]
        begun = [phase for phase in self.phases if self.seen >= phase.begins_at]
        with watched(self.family) as watch:
            for phase in begun:
                self.units[phase.trains].accumulate(phase, micro_batch, self.seen, 1.0)
        for name in dict.fromkeys(phase.trains for phase in begun):
            self.units[name].step(0.0)
        return next((name for name in all_gathered_objects(watch.first()) if name is not None), None)

    def close(self) -> None:
        """End threads, files and engines."""
        try:
            self._saver.close()
        finally:
            self._control.close()
            if self._log is not None:
                self._log.close()
            for unit in self.units.values():
                unit.close()

    # What is written

    def _write_metrics(self, clock: Clock) -> None:
        # A last line that comes early leaves the sums to a run that goes on.
        means = self._averages.reduce(begin_anew=self.step % self.config.log_every == 0)
        reading = Averages(self.device)
        reading.add(self._data_metrics())
        line: dict[str, Any] = {"step": self.step, "images": self.seen, **means, **reading.reduce()}
        for name, optim in self.optim.items():
            line[f"lr/{name}"] = learning_rate(optim, self.step - 1, self.config.num_steps)
        line["order_digest"] = self._total_digest()
        line["skipped_steps"] = self._skips.total
        flops = self._flops.a_sample()
        line |= speed(*clock.lap(self.step), self.batch_size, flops, self.device, self.config.precision)
        self._write_quarantine()
        if self._log is None:
            return
        self._log.write(line)
        if self.step == self.config.num_steps and (self.config.evaluate_every is None or self.test_data is None):
            self._tell_concerns(line)
        for note in self.data.notes():
            self.hooks.on_message(note)
        loss = next((value for name, value in line.items() if name.endswith("/loss")), float("nan"))
        left = (self.config.num_steps - self.step) * clock.seconds_a_step(self.step)
        self.hooks.on_progress(Progress(self.step, self.config.num_steps, line["images_per_s"], loss, left))

    def _write_quarantine(self) -> None:
        replaced = self._quarantine.gather()
        if replaced and rank() == 0:
            self.hooks.on_message(self._quarantine.write(replaced))
        self._quarantine.check()

    def _data_metrics(self) -> Metrics:
        """What a worker waited for data, and what reading cost it, since the last line."""
        now, before = self.data.counters() | {"wait_s": self._waited_s}, self._counted
        self._counted = now
        return {f"data/{name}": torch.tensor(value - before.get(name, 0.0)) for name, value in now.items()}

    def _write_preview(self) -> None:
        what = f"at a preview of {self.config.num_preview_images} images"
        advice = "set a smaller train.num_preview_images, or train.sample_every=null"
        with explaining_memory(self.step, what, advice), self._averaged_weights():
            picture = preview(self.family, self.test_data or self.data, self.config.num_preview_images, self.device)
        if rank() == 0:
            name = f"{checkpoint.folder_name(self.step)}.png"
            storage.write(storage.join(self.run_dir, "samples", name), picture)

    @torch.no_grad()
    def _evaluate(self) -> None:
        with self._averaged_weights():
            found: dict[str, float] = {}
            size, beat = self.micro_batch_size, self.hooks.beat
            if self.test_data is not None:
                with explaining_memory(self.step, *of_micro_batches(size)):
                    found = held_out_means(self.family, self.test_data, size, self.device, beat)
            if self._measure is not None:
                what = "at an evaluation of generated images"
                with explaining_memory(self.step, what, "set a smaller evaluation.batch_size"):
                    found |= self._measure(self.family, beat)
        self._tell_concerns(found)
        line = {f"test/{name}": float(value) for name, value in found.items()}  # a family may count
        best = self.config.best_metric
        if best is not None:
            self._check_measured(best, line)
        if self.step % (self.config.evaluate_every or 1) == 0:
            self._evaluated = self.step, {name: value for name, value in line.items() if math.isfinite(value)}
        if self._log is not None and line:
            self._log.write({"step": self.step, **line})

    def _tell_concerns(self, found: Mapping[str, float]) -> None:
        if rank() == 0:
            for concern in self.family.concerns(found):
                self.hooks.on_message(f"step {self.step}: {concern}")

    @torch.no_grad()
    def _check_best_metric(self) -> None:
        """Refuse one that no evaluation will have before the run has gone as far as its first."""
        best = self.config.best_metric
        if best is None or self.test_data is None or self._measure is not None:
            return
        with self._averaged_weights():
            means = self.family.evaluate(self.test_data.first(1).batch_on(self.device))
        names = self.family.summarize({name: mean.double().cpu() for name, mean in means.items()})
        self._check_measured(best, [f"test/{name}" for name in names])

    @staticmethod
    def _check_measured(best: str, names: Collection[str]) -> None:
        if best not in names:
            raise ConfigError(f"train.best_metric: '{best}'; the evaluation has {', '.join(names) or 'no metric'}")

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        self._set_mode(training=False)
        is_bf16 = self.config.precision == "bf16"  # its weights meet fp32 inputs
        try:
            with self.ema.applied(), computing(self.config.precision, self.device) if is_bf16 else nullcontext():
                yield
        finally:
            self._set_mode(training=True)

    # Checkpoints

    def _save(self) -> None:
        meta = {
            "family": self.identity.family,
            "images": self.seen,
            "cursor": self._cursor,
            "left_out": self._left_out,
            "skips": self._skips.state(),
            "averages": self._averages.gather(),
            "flops": self._flops.state(),
            "batch_size": self.batch_size,
            "order_digest": self._total_digest(),
            "evaluation": self._evaluated[1] if self._evaluated[0] == self.step else {},
            "data": {} if self.identity.order is None else self.identity.order.to_dict(),
            "train_seed": self.config.seed,
            "world_size": world_size(),
            "updates": {name: unit.num_updates for name, unit in self.units.items()},
            "shapes": self._shapes,
            "worker_shapes": worker_shapes_of(self.family),
        }
        self._write_quarantine()  # what comes before a checkpoint is not read again
        if self._log is not None:  # first: a run goes on after its checkpoint, and lines of before are not made again
            self._log.flush()
        self._saver.save(self.step, state_tensors(self.family, self.units, self.ema), meta)

    def _load(self, found: checkpoint.Found) -> None:
        meta = found.meta
        checkpoint.check_shapes(found.location, meta["shapes"], self._shapes)
        with Reader(found.location, meta) as reader:
            load_state(reader, self.family, self.units, self.ema)
        self.step, self.seen, self._cursor = meta["step"], meta["images"], meta["cursor"]
        self._left_out = [(first, stop) for first, stop in meta["left_out"]]
        self._skips.load(meta["skips"])
        self._averages.restore(meta["averages"])
        self._flops.load(meta["flops"])
        # The digest is a sum over workers: one of them carries what was there before.
        self._digest = int(meta["order_digest"], 16) if rank() == 0 else 0

    def _total_digest(self) -> str:
        return f"{total(self._digest, self.device):016x}"

    def _set_mode(self, training: bool) -> None:
        """Trained children train; frozen ones never do."""
        for name, child in self.family.named_children():
            child.train(training and name in self._trained)
