"""`clearshard train CONFIG --ray N`: the same run, its ranks placed and watched over by Ray Train.

Ray places the ranks, joins them to a process group and starts them again when a node is lost. Checkpoints, logs and
the order of samples are the run's own, on a disk that all machines share, so `clearshard train`, torchrun and Ray may
take turns at one run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from degrade.strict import ConfigError, check
from pipeline.cluster import Cluster
from pipeline.lock import WorkspaceBusy
from pipeline.storage import WorkspaceError

from .commands import go, held, say, stopped_by

if TYPE_CHECKING:           # the networks' libraries take seconds to load, and only the ranks need them
    from .config import Training

RETRIES = 3             # of all ranks together, from the last checkpoint
LOOK_S = 0.5
MENDABLE = (ConfigError, WorkspaceError, WorkspaceBusy)     # a repetition cannot mend these, a user can


class RanksFailed(WorkspaceError):
    """The ranks failed more often than they are started again."""


class Desk:
    """What the ranks and the command say to each other: an actor beside the command, which outlives the ranks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stop_asked = False
        self.end: BaseException | None = None
        self.begun = 0

    def begin(self) -> int:
        """Counts how often the first rank has begun."""
        self.begun += 1
        return self.begun

    def say(self, text: str) -> None:
        self.lines.append(text)

    def heard(self) -> list[str]:
        """The lines that are new."""
        lines, self.lines = self.lines, []
        return lines

    def stop(self) -> None:
        """Asks the ranks to save and end."""
        self.stop_asked = True

    def stopping(self) -> bool:
        return self.stop_asked

    def ends(self, error: BaseException) -> None:
        """A rank ended by something that a repetition would meet again."""
        self.end = self.end or error

    def ended(self) -> BaseException | None:
        return self.end


def launch(config: Training, workers: int, address: str | None = None, device: str = "auto", accept: bool = False,
           stop_at: int | None = None) -> None:
    """A run of so many ranks on this machine, or on the Ray cluster at `address`, until it ends.

    device: auto (GPUs where the cluster has any), cpu or cuda.

    Raises:
        ConfigError: a configuration that cannot be used, or more ranks than this machine has room for.
        RanksFailed: the ranks failed again and again.
        KeyboardInterrupt: it was asked to stop, and has saved.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")      # the default only of newer Rays; read at import
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: with --ray it is auto, cpu or cuda, and Ray chooses the card")
    config.task.check()
    cluster = Cluster(address)
    with held(config):
        cluster.start()
        try:
            follow(config, workers, cluster, device, {"accept": accept, "stop_at": stop_at})
        finally:
            cluster.stop()


def follow(config: Training, workers: int, cluster: Cluster, device: str, options: dict[str, Any]) -> None:
    """Starts the ranks, shows what they say, and passes on a signal."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote()
    given = {"config": absolute(config).model_dump(mode="json", exclude_unset=True), "folder": os.getcwd(),
             "desk": desk, "options": options}
    trainer = trainer_of(config, workers, cluster, device, given)
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)
    # In a thread, because Ray Train would take Ctrl-C for itself and end the ranks without a checkpoint.
    fitting = threading.Thread(target=fit, daemon=True)
    asked = threading.Event()
    previous = stopped_by(asked.set)
    fitting.start()
    while fitting.is_alive():
        fitting.join(LOOK_S)
        if asked.is_set():
            ray.get(desk.stop.remote())
        for line in ray.get(desk.heard.remote()):
            say(line)
    for number, handler in previous.items():
        signal.signal(number, handler)
    ended = ray.get(desk.ended.remote())
    if ended is not None:
        raise ended
    if failed:
        raise RanksFailed(f"the ranks failed {RETRIES + 1} times, at last by: {str(failed[0])[-4000:]}\nThe last "
                          f"checkpoint in {config.out} stands; the same command goes on from it") from failed[0]


def trainer_of(config: Training, workers: int, cluster: Cluster, device: str, given: dict[str, Any]) -> Any:
    """Ray Train's trainer. Each rank gets a processor for itself and one for each of its data workers.

    Raises:
        ConfigError: this machine has not so much, and would wait for ever.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    have = ray.cluster_resources()
    gpu = device == "cuda" or (device == "auto" and have.get("GPU", 0) > 0)
    each = {"CPU": 1 + config.data.workers} | ({"GPU": 1} if gpu else {})
    for kind, number in each.items():
        if workers * number > have.get(kind, 0) and not cluster.address:
            raise ConfigError(f"--ray {workers}: {workers} ranks ask for {workers * number} {kind} and this machine "
                              f"has {have.get(kind, 0):g}; take fewer"
                              + (", or a smaller data.workers" if kind == "CPU" else ", or --device cpu"))
    say(f"ranks by Ray: {workers}, with {' and '.join(f'{number} {kind}' for kind, number in each.items())} each")
    return TorchTrainer(
        work, train_loop_config=given,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=each),
        run_config=RunConfig(name="ray", storage_path=str(config.out.absolute()),
                             failure_config=FailureConfig(max_failures=RETRIES)))


def work(given: dict[str, Any]) -> None:
    """One rank, in a process of Ray's; the process group is there already."""
    import ray
    from ray.train.torch import get_device

    from .config import Training
    from .ranks import Ranks
    config, desk = check(Training, given["config"], "the configuration"), given["desk"]
    if ray.get(desk.ended.remote()) is not None:        # Ray starts the ranks again whatever ended them
        return
    with contextlib.suppress(OSError):
        os.chdir(given["folder"])       # for files that the configuration names otherwise than as a path: recipes
    ranks = Ranks.start(str(get_device()))

    def tell(text: str) -> None:
        ray.get(desk.say.remote(text))
    if ranks.first and (times := ray.get(desk.begin.remote())) > 1:
        tell(f"the ranks are started again, {times - 1} of {RETRIES} times, from the last checkpoint")
    try:
        go(config, ranks, tell, lambda stop: stopped_from(desk, stop), **given["options"])
    except KeyboardInterrupt as error:      # all ranks stop after the same step, so this is an ordinary end
        ray.get(desk.ends.remote(error))
    except MENDABLE as error:
        ray.get(desk.ends.remote(error))
        raise
    except Exception as error:
        tell(f"rank {ranks.rank} failed: {type(error).__name__}: {error}")
        raise


def stopped_from(desk: Any, stop: Any) -> dict:
    """Looks every moment whether the command was asked to stop."""
    import ray

    def look() -> None:
        while not ray.get(desk.stopping.remote()):
            time.sleep(LOOK_S)
        stop()
    threading.Thread(target=look, daemon=True).start()
    return {}


def absolute(model: Any) -> Any:
    """The configuration with absolute paths: the ranks start in a folder of Ray's."""
    changes: dict[str, Any] = {}
    for name in model.model_fields_set:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            changes[name] = absolute(value)
        elif isinstance(value, Path):
            changes[name] = value.absolute()
        elif name == "corpus" and value:
            changes[name] = [entry if "://" in entry else str(Path(entry).absolute()) for entry in value]
    return model.model_copy(update=changes)
