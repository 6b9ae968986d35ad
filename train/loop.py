"""The loop: batches in, weights out. It knows objectives by their interface, and nothing of SUPIR.

Position, order, draws and rate are functions of the number of images seen, so what a checkpoint keeps is that number
and the tensors: weights, their running mean, the optimizer's states.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from degrade.strict import ConfigError
from models.whole import whole as whole_folder

from . import failures, optimizer
from .arithmetic import operations, peak_tflops
from .batches import Batch, Loader
from .checkpoint import Checkpoint, Checkpoints
from .config import Training, changes, identity
from .ema import RunningMean
from .meters import Log, Meters, check_wandb, told
from .named import Named
from .parallel import Parallel, full
from .pieces import replace
from .profile import Profile
from .ranks import Ranks
from .tensors import Tensors, on_host, shared_out
from .validation import Validator

Say = Callable[[str], None]


class Trainer:
    """One run, from wherever it was stopped.

    accept: go on from a checkpoint of another configuration or corpus; stop_at: step at which to stop in between.

    Raises:
        ConfigError: a configuration that cannot be used, or that is not the checkpoint's.
    """

    def __init__(self, config: Training, ranks: Ranks, say: Say = print, *, accept: bool = False,
                 stop_at: int | None = None, profile: int = 0) -> None:
        self.config, self.ranks, self.say = config, ranks, say if ranks.first else lambda text: None
        self.micro = config.micro(ranks.count)
        config.task.check()
        check_wandb(config.wandb)
        self.accumulation = config.batch // (ranks.count * self.micro)
        self.last_step = min(config.steps, stop_at or config.steps)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and ranks.device.type == "cuda")
        self.stopping = False
        set_deterministic(config.deterministic, ranks.device)
        self.loader = Loader(config.data, config.seed, batch=config.batch, micro_batch=self.micro, rank=ranks.rank,
                             ranks=ranks.count, device=ranks.device)
        self.checkpoints = Checkpoints(config.out / "checkpoints", ranks, config.checkpoints.keep,
                                       config.checkpoints.milestone)
        found = self.checkpoints.latest()
        if found is not None:
            refuse_another(config, self.loader, found[0], accept, self.say)
        self.validator = Validator(config, ranks)
        self._networks()
        self.step = 0
        if found is not None:
            self.step = found[0].step
            self.tensors.restore(found[1])
        self.profile = Profile(profile, config.out, ranks)

    def _networks(self) -> None:
        config, ranks = self.config, self.ranks
        objective = config.task.build(ranks.device)
        self.parallel = Parallel(objective, ranks, kind=config.parallel, bf16=self.bf16, compiled=config.compile,
                                 checkpointing=config.checkpointing)
        self.objective, self.trained = objective, self.parallel.trained
        if not self.trained:
            raise ConfigError(f"task {config.task.name} trains nothing as configured")
        self.optimizer = optimizer.make(config.optimizer, self.trained)
        owners = shared_out(self.trained, ranks.count)
        self.ema = RunningMean(config.ema, self.trained, owners, ranks, self.parallel.sharded) if config.ema else None
        self.tensors = Tensors(self.trained, self.optimizer, self.ema, owners, ranks, self.parallel.sharded)

    # Running.

    def fit(self) -> bool:
        """Trains until the end, a stop, or a signal; whether the end was reached.

        Raises:
            failures.NotFinite: a loss or gradient is NaN or infinite; nothing was updated with it.
            failures.OutOfMemory: the batch does not fit.
        """
        config, parameters = self.config, sum(parameter.numel() for parameter in self.trained.values())
        self.say(f"{config.task.name}: {parameters / 1e6:,.2f} million parameters on {self.ranks.count} x "
                 f"{self.ranks.device.type}, batch {config.batch} = {self.ranks.count} x {self.micro} x "
                 f"{self.accumulation}, {config.steps:,} steps"
                 + (f", going on from step {self.step:,}" if self.step else ""))
        meters = Meters(self.ranks.device, operations(config), peak_tflops(self.ranks.device, self.bf16))
        log = Log(config.out, self.step, config.wandb, config.model_dump(mode="json")) if self.ranks.first else None
        batches = self.loader.batches(self.step)
        try:
            with failures.memory_named(config, self.micro):
                self._steps(batches, meters, log)
            self.save()
            self.checkpoints.wait()
            return self.step >= config.steps
        finally:
            self.loader.close()
            if log is not None:
                log.close()

    def _steps(self, batches: Any, meters: Meters, log: Log | None) -> None:
        config = self.config
        while self.step < self.last_step and not self.stopping:
            waited = self.loader.waited
            values = self._step(batches)
            meters.add(config.batch, values, self.loader.waited - waited)
            self.profile.stepped()
            before = time.perf_counter()
            if self._due(config.log_every * config.batch) or self.step == self.last_step:
                line = {"rate": self.rate(), **meters.line(self.ranks.count)}
                self.say(told(self.step, config.steps, line, config.batch))
                if log is not None:
                    log.line(self.step, self.seen, line)
                before = time.perf_counter()
            if self._due(config.validation.every) or self.step == self.last_step:
                self.validate(log)
            if self._due(config.checkpoints.every) and self.step < self.last_step:
                self.save()
            meters.exclude(time.perf_counter() - before)

    def _step(self, batches: Any) -> dict[str, float]:
        """One update. Raises failures.NotFinite before the weights change."""
        taken, sums = [], {}
        for number in range(self.accumulation):
            batch = next(batches)
            losses = self.losses(batch, last=number == self.accumulation - 1)
            (losses["loss"].sum() * self.ranks.count / self.config.batch).backward()
            for name, values in losses.items():
                sums[name] = sums.get(name, 0) + values.detach().sum()
            taken.append((batch, losses["loss"].detach()))
        norm = self._norm()
        values = self._agreed(sums, norm)
        if values["not_finite"]:
            failures.explain(self, taken, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.config.batch, self.seen)
        self.stopping = values["stopping"] > 0
        return {name: values[name] / self.config.batch for name in sums} | {"gradient": norm.item()}

    def losses(self, batch: Batch, last: bool = True, level: int | None = None) -> dict[str, Tensor]:
        """The losses of each sample of a micro-batch."""
        draws = Named(self.config.seed, batch.keys, batch.epochs)
        with torch.no_grad(), self.parallel.autocast():
            inputs = self.objective.prepare(batch, draws, level)
        return self.parallel(inputs, last)

    def _norm(self) -> Tensor:
        """The norm of the whole gradient, which is clipped."""
        limit = self.config.optimizer.clip or float("inf")
        return full(torch.nn.utils.clip_grad_norm_(list(self.trained.values()), limit))

    def _agreed(self, sums: Mapping[str, Tensor], norm: Tensor) -> dict[str, float]:
        """Sums over all ranks, whether anyone was asked to stop, and whether all is finite: one exchange a step."""
        stack = torch.stack([*(value.float() for value in sums.values()),
                             (~torch.isfinite(norm)).float().to(self.ranks.device),
                             torch.tensor(float(self.stop_asked), device=self.ranks.device)])
        total = self.ranks.summed(stack).tolist()
        values = dict(zip([*sums, "not_finite", "stopping"], total, strict=True))
        values["not_finite"] += any(value != value or abs(value) == float("inf") for value in total[:-2])
        return values

    stop_asked = False

    def stop(self) -> None:
        """Asks for a checkpoint and the end, after this step; for signal handlers."""
        self.stop_asked = True

    @property
    def seen(self) -> int:
        """Images so far."""
        return self.step * self.config.batch

    def rate(self) -> float:
        return optimizer.rate(self.config.optimizer, self.config.images, self.seen)

    def _due(self, every: int) -> bool:
        """Whether a multiple of so many images was reached in this step."""
        return self.seen // every > (self.seen - self.config.batch) // every

    # Validation and what is saved.

    def means(self) -> Any:
        """A block in which the weights are their running means."""
        return self.ema.applied() if self.ema is not None else contextlib.nullcontext()

    def validate(self, log: Log | None) -> None:
        with self.means():
            values = self.validator.losses(self)
            self.say("validation: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            sheet = self.validator.previews(self)
        if log is not None:
            log.line(self.step, self.seen, values)
            if sheet is not None:
                log.picture(self.step, "previews", sheet)

    def save(self) -> None:
        """Begins a checkpoint of this step, unless there is one."""
        self.checkpoints.wait()
        if any(found.step == self.step for found in self.checkpoints.all()):
            return
        state = {"step": self.step, "images": self.seen, "identity": identity(self.config),
                 "corpus": self.loader.reader.fingerprint(), "made_from": self.config.task.made_from()}
        self.checkpoints.save(state, self.tensors.pieces())

    def export(self) -> None:
        """Writes `model/`: the running mean of the weights, in the layout that the task's users expect."""
        with self.means():
            gathered = {name: on_host(whole) if self.ranks.first else None for name, parameter in self.trained.items()
                        if (whole := full(parameter)) is not None}
        if self.ranks.first:
            objective = self.config.task.build(torch.device("cpu"))     # whole, whatever the run has cut and wrapped
            with torch.no_grad(), whole_folder(self.config.out / "model") as folder:
                for name, parameter in objective.named_parameters():
                    if name in gathered:
                        parameter.copy_(gathered[name])
                batch = self.validator.batch().to(torch.device("cpu"))
                objective.save(folder, batch, getattr(torch, self.config.save_dtype))
                replace(folder / "trained.json", failures.as_json({
                    "task": self.config.task.name, "step": self.step, "images": self.seen,
                    "identity": identity(self.config), "corpus": self.loader.reader.fingerprint()}))
        self.ranks.barrier()


def set_deterministic(wanted: bool, device: torch.device) -> None:
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        torch.backends.cudnn.benchmark = not wanted


def refuse_another(config: Training, loader: Loader, found: Checkpoint, accept: bool, say: Say) -> None:
    """A checkpoint of another run is not gone on from by mistake.

    Raises:
        ConfigError: names what differs.
    """
    differences = changes(found.state["identity"], identity(config))
    differences += loader.reader.differences(found.state["corpus"])
    made_from = config.task.made_from()
    differences += [f"the {name} is another model than before" for name, was in found.state["made_from"].items()
                    if made_from.get(name) != was]
    if differences and not accept:
        raise ConfigError(f"{found.folder} is of another run: {'; '.join(differences)}. Choose another `out`, undo the "
                          "change, or go on with it by --accept-changes")
    for difference in differences:
        say(f"changed since the checkpoint, as accepted: {difference}")

