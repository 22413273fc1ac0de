"""The step and the loop. Knows the contract of a family, and no family."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from gmdist import images, storage
from gmdist.errors import ConfigError
from gmdist.families.family import Batch, Family, Metrics
from gmdist.rng import derive
from gmdist.train import checkpoint
from gmdist.train.checkpoint import Reader, Saver
from gmdist.train.config import TrainConfig, micro_batch_size
from gmdist.train.control import Clock, Control
from gmdist.train.ema import EMA
from gmdist.train.engine import Unit, make_unit, rank, world_size
from gmdist.train.hooks import Hooks, Outcome, Progress
from gmdist.train.metrics import Averages, MetricsLog
from gmdist.train.optim import OptimConfig, learning_rate
from gmdist.train.source import Loaded, Source
from gmdist.train.state import Fingerprint, RunIdentity, check_identity, load_state, shapes_of, state_tensors

_INITIALIZE_SAMPLES = 256
_MASK64 = (1 << 64) - 1


class Trainer:
    """Trains a family on one worker; all workers run the same."""

    def __init__(
        self,
        family: Family,
        config: TrainConfig,
        optim: dict[str, OptimConfig],
        identity: RunIdentity,
        fingerprint: Fingerprint | None,
        run_dir: str,
        data: Source,
        test_data: Source | None = None,
        device: torch.device | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        """Set up engines and resume from the newest sound checkpoint in `run_dir`, if there is one.

        Raises:
            ConfigError: the workers do not divide the batch, or a trained child has no optimizer.
            CheckpointError, DataError: the checkpoint belongs to another run.
        """
        self.device = device or torch.device("cpu")
        self.config, self.optim, self.identity = config, optim, identity
        self.run_dir, self.data, self.test_data, self.hooks = run_dir, data, test_data, hooks or Hooks()
        self.batch_size = identity.batch_size
        self.micro_batch_size = micro_batch_size(config, self.batch_size, world_size())
        self.step, self.seen, self._digest = 0, 0, 0

        found = self._find_checkpoint()
        if found is not None:
            check_identity(found, identity, config.seed, fingerprint)

        self.family = family.to(self.device)
        self.phases = family.phases()
        self._trained = trained_children(family, optim)
        if found is None:
            self.family.initialize(data.first(min(_INITIALIZE_SAMPLES, data.num_samples)).batch_on(self.device))
        self._set_mode(training=True)
        self.units: dict[str, Unit] = {
            name: make_unit(
                family, name, optim[name], stage=config.zero_stage, precision=config.precision, device=self.device
            )
            for name in self._trained
        }
        self.ema = EMA([self.units[name] for name in family.averaged], config.ema_halflife_kimg, config.ema_ramp)
        if found is not None:
            self._load(found)
        self._averages = Averages(self.device)
        self._saver = Saver(run_dir, config.keep_checkpoints)
        self._control = Control()
        self._quarantined: list[dict[str, Any]] = []
        self._waited_s = 0.0
        self._counted = data.counters()
        self._log = MetricsLog(run_dir, self.step) if rank() == 0 else None

    # The step

    def train_step(self, loaded: Loaded) -> None:
        """One optimizer step on this worker's part of a batch."""
        batch = loaded.batch_on(self.device)
        micro_batches = split(batch, self.micro_batch_size)
        for number, phase in enumerate(self.phases):
            if self.step % phase.every:
                continue
            unit = self.units[phase.trains]
            for i, micro_batch in enumerate(micro_batches):
                # Dropout is the one user of torch's generator: begun anew, it does not depend on where a run resumed.
                torch.manual_seed(derive(self.config.seed, f"dropout/{number}/{i}/{rank()}", self.step))
                self._averages.add(unit.accumulate(phase, micro_batch, self.seen, 1.0 / len(micro_batches)))
            unit.step(learning_rate(self.optim[phase.trains], self.step, self.config.num_steps))
        self.family.after_step(self.seen)
        self.ema.update(self.batch_size, self.seen)
        self.step += 1
        self.seen += self.batch_size
        self._digest += loaded.digest
        self._quarantined += loaded.quarantined

    # The loop

    def fit(self) -> Outcome:
        """Train to the last step, or until a stop is requested; either way the last step done is saved."""
        config = self.config
        if self.step == 0 and config.sample_every:
            self._write_preview()
        clock = Clock(self.step)
        batches = self.data.batches(self.seen)
        stopping = False
        saved_step = self.step
        while self.step < config.num_steps and not stopping:
            asked_s = time.monotonic()
            loaded = next(batches)
            self._waited_s += time.monotonic() - asked_s
            self.train_step(loaded)
            last = self.step == config.num_steps
            if self.step % config.log_every == 0 or last:
                self._write_metrics(clock)
            if config.evaluate_every and self.test_data and (self.step % config.evaluate_every == 0 or last):
                with clock.paused():
                    self._evaluate()
            if config.sample_every and (self.step % config.sample_every == 0 or last):
                with clock.paused():
                    self._write_preview()
            stop, failed = self._control.exchange(self.hooks.stop_requested() and rank() == 0, self._saver.failed())
            stopping = stop and not last
            if failed:
                self._saver.wait()
            if self.step % config.checkpoint_every == 0 or last or stopping:
                with clock.paused():
                    self._save()
                saved_step = self.step
        assert saved_step == self.step
        self._saver.wait()
        return Outcome(self.step, self.seen, self._total_digest(), finished=self.step >= config.num_steps)

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
        self._averages.add(self._data_metrics())
        line: dict[str, Any] = {"step": self.step, "images": self.seen, **self._averages.reduce()}
        for name, optim in self.optim.items():
            line[f"lr/{name}"] = learning_rate(optim, self.step - 1, self.config.num_steps)
        line["order_digest"] = self._total_digest()
        steps, seconds = clock.lap(self.step)
        line["images_per_s"] = steps * self.batch_size / seconds
        quarantined = self._gather_quarantined()
        if self._log is None:
            return
        self._log.write(line)
        self._write_quarantine(quarantined)
        for note in self.data.notes():
            self.hooks.on_message(note)
        loss = next((value for name, value in line.items() if name.endswith("/loss")), float("nan"))
        left = (self.config.num_steps - self.step) * clock.seconds_a_step(self.step)
        self.hooks.on_progress(Progress(self.step, self.config.num_steps, line["images_per_s"], loss, left))

    def _data_metrics(self) -> Metrics:
        """What a worker waited for data, and what reading cost it, since the last line."""
        now, before = self.data.counters() | {"wait_s": self._waited_s}, self._counted
        self._counted = now
        return {f"data/{name}": torch.tensor(value - before.get(name, 0.0)) for name, value in now.items()}

    def _gather_quarantined(self) -> list[dict[str, Any]]:
        lines, self._quarantined = self._quarantined, []
        if world_size() == 1:
            return lines
        count = torch.tensor([len(lines)], device=self.device)
        dist.all_reduce(count)
        if count.item() == 0:
            return []
        parts: list[list[dict[str, Any]]] = [[] for _ in range(world_size())]
        dist.all_gather_object(parts, lines)
        return sorted((line for part in parts for line in part), key=lambda line: line["number"])

    def _write_quarantine(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        location = storage.join(self.run_dir, "quarantine.jsonl")
        before = storage.read(location).decode().splitlines() if storage.exists(location) else []
        # Steps that are made again after a resume meet the same samples again.
        texts = dict.fromkeys([*before, *(json.dumps(line) for line in lines)])
        storage.write(location, "".join(text + "\n" for text in texts).encode())
        first = lines[0]
        self.hooks.on_message(
            f"replaced {len(lines)} undecodable samples ({first['shard']}: {first['sample']}: {first['reason']}); "
            f"they are listed in {location}"
        )

    @torch.no_grad()
    def _write_preview(self) -> None:
        source = self.test_data or self.data
        batch = source.first(min(self.config.num_preview_images, source.num_samples)).batch_on(self.device)
        # Every worker makes an equal part; the last ones repeat a sample where the count does not divide.
        count = len(batch["key"])
        each = -(-count // world_size())
        places = torch.arange(rank() * each, (rank() + 1) * each, device=self.device).clamp(max=count - 1)
        part = {name: tensor[places] for name, tensor in batch.items()}
        with self._averaged_weights():
            pictures = images.to_uint8(self.family.preview(part))
        if world_size() > 1:
            gathered = [torch.empty_like(pictures, device=self.device) for _ in range(world_size())]
            dist.all_gather(gathered, pictures.to(self.device))
            pictures = torch.cat(gathered).cpu()
        if rank() == 0:
            name = f"{checkpoint.folder_name(self.step)}.png"
            storage.write(storage.join(self.run_dir, "samples", name), images.png(images.grid(pictures[:count])))

    @torch.no_grad()
    def _evaluate(self) -> None:
        assert self.test_data is not None
        averages = Averages(self.device)
        with self._averaged_weights():
            for loaded in self.test_data.sweep(self.micro_batch_size):
                batch = loaded.batch_on(self.device)
                averages.add(self.family.evaluate(batch), weight=float(len(batch["key"])))
        line = {f"test/{name}": value for name, value in averages.reduce().items()}
        if self._log is not None and line:
            self._log.write({"step": self.step, **line})

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        self._set_mode(training=False)
        try:
            with self.ema.applied():
                yield
        finally:
            self._set_mode(training=True)

    # Checkpoints

    def _save(self) -> None:
        meta = {
            "family": self.identity.family,
            "images": self.seen,
            "batch_size": self.batch_size,
            "order_digest": self._total_digest(),
            "data": self.identity.data,
            "train_seed": self.config.seed,
            "world_size": world_size(),
            "updates": {name: unit.num_updates for name, unit in self.units.items()},
            "shapes": shapes_of(self.family),
            "worker_shapes": {name: list(state.shape) for name, state in self.family.worker_state().items()},
        }
        self._saver.save(self.step, state_tensors(self.family, self.units, self.ema), meta)
        if self._log is not None:
            self._log.flush()

    def _find_checkpoint(self) -> checkpoint.Found | None:
        """The newest sound checkpoint, chosen by rank 0 for all."""
        choice: list[Any] = [None]
        if rank() == 0:
            found, warnings = checkpoint.find_newest(self.run_dir)
            for warning in warnings:
                self.hooks.on_message(warning)
            choice = [found]
        if world_size() > 1:
            dist.broadcast_object_list(choice, src=0)
        return choice[0]

    def _load(self, found: checkpoint.Found) -> None:
        meta = found.meta
        checkpoint.check_shapes(found.location, meta, shapes_of(self.family))
        with Reader(found.location, meta) as reader:
            load_state(reader, self.family, self.units, self.ema)
        self.step, self.seen = meta["step"], meta["images"]
        # The digest is a sum over workers: one of them carries what was there before.
        self._digest = int(meta["order_digest"], 16) if rank() == 0 else 0

    def _total_digest(self) -> str:
        total = self._digest & _MASK64
        if world_size() > 1:
            signed = torch.tensor([total - (1 << 64) if total >> 63 else total], device=self.device)
            dist.all_reduce(signed)
            total = int(signed.item()) & _MASK64
        return f"{total:016x}"

    def _set_mode(self, training: bool) -> None:
        """Trained children train; frozen ones never do."""
        for name, child in self.family.named_children():
            child.train(training and name in self._trained)


def trained_children(family: Family, optim: dict[str, OptimConfig]) -> list[str]:
    """The children that the phases train, each of which must have an optimizer, and no other may."""
    assert not list(family.parameters(recurse=False)), "a family's parameters live in its children"
    names = list(dict.fromkeys(phase.trains for phase in family.phases()))
    for name in names:
        if name not in optim:
            raise ConfigError(f"optim.{name}: missing; the family trains {', '.join(names)}")
    for name in optim:
        if name not in names:
            raise ConfigError(f"optim.{name}: no such child; the family trains {', '.join(names)}")
    assert set(family.averaged) <= set(names), "only trained children are averaged"
    return names


def split(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into micro-batches of `size` samples."""
    count = len(batch["key"])
    return [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, count, size)]
