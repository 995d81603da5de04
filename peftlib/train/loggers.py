"""A run's numbers by step in a log that TensorBoard or trackio shows, beside the record."""

import importlib.util

from peftlib.core.errors import ConfigError
from peftlib.core.files import read_json, write_json
from peftlib.train.callbacks import Watcher

_SMOOTHED_OVER = 20  # steps


def require(report_to):
    """ConfigError where the package that report_to names is not installed; '' needs none."""
    if report_to and importlib.util.find_spec(report_to) is None:
        raise ConfigError(
            f"report_to={report_to!r}: the package {report_to} is not installed: run pip install {report_to}, or set report_to=''"
        )


def of(run):
    """[the Watcher that cfg.report_to asks for], or []. run: a TrainingRun at the step that it starts or goes on from."""
    return [_KINDS[run.cfg.report_to](run)] if run.cfg.report_to else []


def folder_of(study, method, seed):
    """Where the log of a run, or what is known about it, stands."""
    return study.folder / "logs" / f"{method}-s{seed}"


class _Tracker(Watcher):
    """Writes each step of a run once. Subclasses say where: _write(step, {name: number}) and _end()."""

    def __init__(self, run):
        self._next_step = self._next_valid = run.progress.step + 1

    def show(self, snapshot):
        """Write the steps that are new since the last call."""
        for at, entry in enumerate(snapshot.history):
            if entry["step"] >= self._next_step:
                is_newest = at == len(snapshot.history) - 1
                memory = {"memory_gib": snapshot.memory_bytes / 2**30} if is_newest else {}
                self._write_known(entry["step"], _numbers(snapshot.history[: at + 1]) | memory)
                self._next_step = entry["step"] + 1
        for entry in snapshot.valid_history:
            if entry["step"] >= self._next_valid:
                self._write_known(entry["step"], {"validation_loss": entry["valid_loss"]})
                self._next_valid = entry["step"] + 1
        if snapshot.is_over:
            self._end()

    def _write_known(self, step, numbers):
        known = {name: number for name, number in numbers.items() if number is not None}
        if known:
            self._write(step, known)


class TensorBoard(_Tracker):
    """Event files in logs/<method>-s<seed>/; what a cut session wrote beyond its checkpoint is marked as void."""

    def __init__(self, run):
        super().__init__(run)
        from torch.utils.tensorboard import SummaryWriter

        folder = folder_of(run.study, run.name, run.cfg.seed)
        self._writer = SummaryWriter(str(folder), purge_step=self._next_step)

    def _write(self, step, numbers):
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def _end(self):
        self._writer.close()


class Trackio(_Tracker):
    """A trackio project named as the study, on this machine; a run that goes on leaves out the steps that are there."""

    def __init__(self, run):
        super().__init__(run)
        import trackio

        self._trackio = trackio
        self._mark = folder_of(run.study, run.name, run.cfg.seed) / "trackio.json"
        is_resumed = run.progress.step > 0
        if (
            is_resumed and self._mark.exists()
        ):  # trackio cannot take back what a cut session wrote beyond its checkpoint
            there = read_json(self._mark)
            self._next_step, self._next_valid = (
                max(self._next_step, there["step"]),
                max(self._next_valid, there["valid"]),
            )
        trackio.init(
            project=run.study.folder.name,
            name=f"{run.name}-s{run.cfg.seed}",
            config=run.cfg.fields_of("data", "math"),
            resume="allow" if is_resumed else "never",
            embed=False,  # a notebook shows our own panel
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def show(self, snapshot):
        """As for any tracker; what has been written is kept in mind on disk, for a session that goes on."""
        super().show(snapshot)
        write_json(self._mark, {"step": self._next_step, "valid": self._next_valid})

    def _write(self, step, numbers):
        self._trackio.log(numbers, step=step)

    def _end(self):
        self._trackio.finish()


_KINDS = {"tensorboard": TensorBoard, "trackio": Trackio}


def _numbers(history):
    """{name: number} of the last step of a history; None where a skipped step left none."""
    entry, recent = history[-1], history[-_SMOOTHED_OVER:]
    losses = [e["loss"] for e in recent if e["loss"] is not None]
    return {
        "loss": entry["loss"],
        "loss_smoothed": sum(losses) / len(losses) if losses else None,
        "learning_rate": entry["learning_rate"],
        "tokens_per_second": entry["tokens"] / entry["seconds"] if entry["seconds"] else None,
    }
