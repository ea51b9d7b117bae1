"""Training checkpoints: everything the next step depends on, written aside and published whole.

    <folder>/checkpoints/<step>/
        state    parameters, optimiser, averages, random key, what the stage carries from step to step
        data     every process's place in the data: how many batches it has seen
        about    stage and settings

Orbax writes in the background and renames at the end, so a run that is killed at any moment finds its last
complete checkpoint. A checkpoint whose settings differ from the run's is refused.
"""

import contextlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from longlive_jax.errors import UserError, require
from longlive_jax.training.config import EvaluationConfig, RunConfig, Training
from longlive_jax.training.config_file import differing, to_json

FOLDER = "checkpoints"

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run; use it as a context manager so that the last one is finished.

    Args:
      config: the run's config; it is stored with every checkpoint.
    """

    def __init__(self, config: Training) -> None:
        self._about = to_json(config)
        self._folder = pathlib.Path(config.run.folder).absolute() / FOLDER
        self._score = _score_of(config.evaluation)
        self._manager = ocp.CheckpointManager(
            self._folder, options=_options(config.run, self._score), item_names=("state", "data", "about")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the best evaluated checkpoint that is still there; None if none was evaluated."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, data: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Copies the state to the host and writes it in the background.

        Args:
          step: steps made so far.
          state: a tree of arrays; may be donated as soon as this returns.
          data: the iterator the batches come from.
          metrics: results of an evaluation of this state.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(data),
            about=ocp.args.JsonSave(self._about),
        )
        with _without_remarks():
            self._manager.save(step, args=items, metrics=dict(metrics) if metrics else None, force=True)

    def restore(self, state: T, data: Any, *, step: int | None = None) -> T:
        """Reads a checkpoint back.

        Args:
          state: a state of the same shapes and shardings (arrays or shapes with shardings).
          data: the iterator; it is moved to where it was.
          step: which one; default the newest.

        Raises:
          UserError: there is none, or its settings differ in what matters; the differing ones are named.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"run.folder={self._folder.parent} holds no checkpoint to resume from")
        self.check(step)
        self._restore_data(step, data)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)),
        )
        return self._manager.restore(step, args=items)["state"]

    def _restore_data(self, step: int, data: Any) -> None:
        """Moves the data's iterator to where it was.

        A place counts batches of all processes together, so it is the same for each of them, and one that
        has none of its own (there are more processes now, or fewer) takes the first one's.
        """
        folder = self._folder / str(step) / "data"
        own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        file = own if own.exists() else next(folder.glob("process_0-of-*.json"))
        data.set_state(json.loads(file.read_text(encoding="utf-8")))

    def check(self, step: int) -> None:
        """Refuses a checkpoint that was made with other settings."""
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        names = differing(about, self._about)
        require(
            not names,
            f"run.folder={self._folder.parent} holds a run with other settings ({', '.join(names)}); "
            "give the same settings, or another run.folder",
        )

    def scores(self, step: int) -> dict[str, float]:
        """Results of a checkpoint's evaluation; empty where it was not evaluated."""
        return dict(self._manager.metrics(step) or {})

    def wait(self) -> None:
        """Waits until what was saved is on the disk."""
        self._manager.wait_until_finished()


def has_checkpoints(folder: str | pathlib.Path) -> bool:
    """Whether a run's folder holds a complete checkpoint."""
    found = pathlib.Path(folder) / FOLDER
    return found.is_dir() and any(path.name.isdigit() for path in found.iterdir())


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps Orbax from remarking that a checkpoint has no metrics: only evaluated ones have."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _score_of(evaluation: EvaluationConfig) -> Callable[[Mapping[str, float]], float]:
    sign = 1.0 if evaluation.better == "max" else -1.0
    return lambda metrics: sign * metrics[evaluation.metric]


def _options(run: RunConfig, score: Callable[[Mapping[str, float]], float]) -> ocp.CheckpointManagerOptions:
    policy = checkpoint_managers.preservation_policy
    best = policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        best_fn=score,
        preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(run.keep), best]),
        cleanup_tmp_directories=True,
    )
