"""Log a run's metrics per step to TensorBoard or trackio, in addition to the record (cfg.report_to)."""

import importlib.util

from peftlib.core.errors import ConfigError
from peftlib.core.files import read_json, write_json
from peftlib.train.callbacks import Callback

_SMOOTHED_OVER = 20  # steps


def require(report_to):
    """ConfigError if the package that report_to names is not installed; '' needs none."""
    if report_to and importlib.util.find_spec(report_to) is None:
        raise ConfigError(
            f"report_to={report_to!r}: the package {report_to} is not installed: run pip install {report_to}, "
            "or set report_to=''"
        )


def of(run):
    """[the Callback for cfg.report_to], or []. run: a TrainingRun at the step where it starts or resumes."""
    return [{"tensorboard": TensorBoard, "trackio": Trackio}[run.cfg.report_to](run)] if run.cfg.report_to else []


class _Logger(Callback):
    """Writes each step of a run once, below logs/<method>-s<seed>/. Subclasses: _write(step, numbers) and _end()."""

    def __init__(self, run):
        self._folder = run.study.folder / "logs" / f"{run.name}-s{run.cfg.seed}"
        self._next_step = self._next_valid = run.progress.step + 1

    def show(self, snapshot):
        """Write the steps that are new since the last call."""
        history = snapshot.history
        for at, entry in enumerate(history):
            if entry["step"] >= self._next_step:
                memory = snapshot.memory_bytes / 2**30 if entry is history[-1] else None
                self._write(entry["step"], _known(**_numbers(history[: at + 1]), memory_gib=memory))
                self._next_step = entry["step"] + 1
        for entry in snapshot.valid_history:
            if entry["step"] >= self._next_valid:
                self._write(entry["step"], _known(validation_loss=entry["valid_loss"]))
                self._next_valid = entry["step"] + 1
        if snapshot.is_over:
            self._end()


class TensorBoard(_Logger):
    """Event files; steps that an interrupted session wrote after its checkpoint are purged."""

    def __init__(self, run):
        super().__init__(run)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=self._next_step)
        self._end = self._writer.close

    def _write(self, step, numbers):
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)


class Trackio(_Logger):
    """A trackio project named after the study, on this machine.

    trackio cannot purge steps that an interrupted session wrote after its checkpoint, so a resumed run skips those; a
    file records which were written.
    """

    def __init__(self, run):
        super().__init__(run)
        import trackio

        self._trackio, self._end = trackio, trackio.finish
        self._written = self._folder / "trackio.json"
        is_resumed = run.progress.step > 0
        if is_resumed and self._written.exists():
            written = read_json(self._written)
            self._next_step = max(self._next_step, written["step"])
            self._next_valid = max(self._next_valid, written["valid"])
        trackio.init(
            project=run.study.folder.name,
            name=self._folder.name,
            config=run.cfg.fields_of("data", "math"),
            resume="allow" if is_resumed else "never",
            embed=False,  # notebooks show our own panel
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def show(self, snapshot):
        """Write the new steps, then save the last one's number to disk."""
        super().show(snapshot)
        write_json(self._written, {"step": self._next_step, "valid": self._next_valid})

    def _write(self, step, numbers):
        if numbers:
            self._trackio.log(numbers, step=step)


def _numbers(history):
    entry = history[-1]
    losses = [e["loss"] for e in history[-_SMOOTHED_OVER:] if e["loss"] is not None]
    return {
        "loss": entry["loss"],
        "loss_smoothed": sum(losses) / len(losses) if losses else None,
        "learning_rate": entry["learning_rate"],
        "tokens_per_second": entry["tokens"] / entry["seconds"] if entry["seconds"] else None,
    }


def _known(**numbers):
    """Drop values that are None: a skipped step has no loss."""
    return {name: number for name, number in numbers.items() if number is not None}
