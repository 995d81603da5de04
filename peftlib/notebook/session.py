"""Open and close a notebook: `setup` reads its parameters and opens the study, `finish` lists what was written."""

import ast
import functools
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from peftlib.core.config import differences, first_names, resolve, short_hash
from peftlib.core.env import output_root, resolve_device, training_precision
from peftlib.core.errors import ConfigError, Stopped, StudyError
from peftlib.core.files import readable_path, size_text
from peftlib.core.record import device_name
from peftlib.core.session import host, is_watched
from peftlib.core.study import Study
from peftlib.notebook import hosted
from peftlib.notebook.widgets import Action, can_click
from peftlib.storage.lock import StudyLock
from peftlib.storage.mirror import open_mirror, running
from peftlib.storage.remotes import mount_drive

# {notebook: the notebooks whose outputs it reads}
NOTEBOOKS = {
    "01_data": (),
    "02_qlora": ("01_data",),
    "03_galore": ("01_data",),
    "04_eval": ("01_data", "02_qlora", "03_galore"),
    "05_hybrid": ("01_data", "02_qlora", "03_galore", "04_eval"),
}
FINISHED, STOPPED = "finished", "stopped"
NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_PARAMETERS = "# Parameters"  # first line of papermill's injected cell, and of ours
_FORM_MARK = re.compile(r"#\s*@(param|markdown)\b")
_LAST_LINE = re.compile(r"^peftlib: (\S+) (finished|stopped), study (.+), state ([0-9a-f]{12})$", re.MULTILINE)
_WROTE = re.compile(r"^  (\S.*?)  +[0-9.]+ (?:B|KiB|MiB|GiB)$", re.MULTILINE)


def setup(name: str, *, drive: bool | None = None) -> Study:
    """Open the Study of the parameters cell, print its config, device, precision and folder, and seed the generators.

    name: the notebook's file name without `.ipynb`. drive: on Colab, copy the study to Google Drive, mounting it if
    needed; None uses the environment variable PEFTLIB_DRIVE (1 or 0; the default is 1 on Colab). A headless run never
    mounts Drive, because mounting prompts.
    ConfigError: an unknown parameter, a value out of range, or no parameters cell was run. ModelError: incompatible
    packages, see hosted. StudyError: see Study.open, or the data that the notebook reads are missing.
    LockedError: another session is using the study.
    """
    is_headless = headless()
    if is_headless:
        _quiet_progress_bars()
    hosted.require_sound_packages()
    hosted.quiet_torchao()
    given = executed_parameters(_ipython().user_ns["In"])
    resolve(**given)  # validates the settings before anything is mounted
    if drive is None:
        drive = os.environ.get("PEFTLIB_DRIVE", "1" if host() == "colab" else "0") == "1"
    if drive and not is_headless:
        mount_drive()
    given = hosted.with_first_profile(given)
    folder = output_root() / resolve(**given).study
    mirror = open_mirror(folder)
    StudyLock(folder, name).require_free()
    study = Study.resolve(**given)
    _require_inputs(name, study)
    cfg, device = study.cfg, resolve_device(study.cfg.device)
    precision, reason = training_precision(device, cfg.precision)
    seed_everything(cfg.seed)
    print(f"{name}, study {cfg.study}, profile {cfg.profile}")
    print(compact(cfg))
    print(f"runtime    {hosted.runtime()}: {hosted.plan(cfg)}")
    print(f"device     {device_name(device)}")
    print(f"precision  {precision}: {reason}")
    print(f"folder     {readable_path(study.folder)}")
    print(f"copies     {'none, only on this disk' if mirror is None else f'to {mirror.remote}'}")
    for line in hosted.without_gpu(device, cfg):
        print(line)
    return study


def _require_inputs(name, study):
    """Print which inputs of the notebook are missing; the setting make_missing or a button makes them.

    StudyError: the data are missing.
    """
    missing = missing_inputs(name, study)
    if study.cfg.make_missing:
        make_inputs(name, study, missing, print)
    elif missing:
        what = ", ".join(missing)
        print(f"missing: {what}; set make_missing = True in the settings cell to make it here")
        if can_click():
            from IPython.display import display

            display(Action(f"Make {what} now", lambda say: make_inputs(name, study, missing, say)))
    try:
        if "01_data" in NOTEBOOKS.get(name, ()):
            study.manifest()
    except StudyError as error:
        hint = hosted.where_data_come_from(name, study)
        raise StudyError(f"{error}, or set make_missing = True\n{hint}".rstrip()) from None


def missing_inputs(name, study):
    """The inputs of this notebook that the study lacks: 'data', and methods without a finished run."""
    done = {r["method"] for r in study.records() if r["status"] == "ok" and r["seed"] == study.cfg.seed}
    done |= {"data"} if study.manifest_path.exists() and study.config_path.exists() else set()
    return [other[3:] for other in NOTEBOOKS.get(name, ()) if other != "04_eval" and other[3:] not in done]


def make_inputs(name, study, missing, say):
    """Make what `missing_inputs` found, as the earlier notebooks would. Raises their errors."""
    from peftlib import build_data, evaluate, run_training

    for what in missing:
        say(f"making {what}")
        if what == "data":
            build_data(study.cfg, study.data_dir, log=say)
            study.freeze()
        else:
            require_finished(study, run_training(study, what, log=say))
            if "04_eval" in NOTEBOOKS[name]:
                evaluate(study, what, log=say)
    if missing and say is not print:
        say("Done. Run this cell again.")


def require_finished(study, record):
    """Stop a notebook whose next cells need a finished run. Stopped: it is not; its checkpoint is copied first."""
    if record["status"] == "ok":
        return
    mirror = running(study.folder)
    if mirror is not None:
        mirror.flush()
        print(mirror.state())
    done = f"step {record['steps']} of {record['planned_steps']}"
    raise Stopped(f"{record['method']} is saved at {done}: run this notebook again to resume")


def finish(study: Study, name: str, wrote: Iterable[str | Path], status: str = "ok") -> None:
    """Print what the notebook wrote and what comes next; the runner parses the last line.

    wrote: paths inside the study folder. status: of a record; anything but 'ok' means that the work stopped early and
    the next run resumes it. StudyError: status is 'ok' and one of the paths does not exist.
    """
    status = FINISHED if status == "ok" else STOPPED
    sizes = {Path(path).relative_to(study.folder).as_posix(): _size_bytes(Path(path)) for path in wrote}
    missing = [path for path, n_bytes in sizes.items() if n_bytes is None]
    if missing and status == FINISHED:
        raise StudyError(f"{name} should have written {', '.join(missing)}, which is missing: run its cells again")
    print(f"wrote in {readable_path(study.folder)}:")
    width = max((len(path) for path in sizes if path not in missing), default=0)
    for path, n_bytes in sizes.items():
        if n_bytes is not None:
            print(f"  {path:<{width}}  {size_text(n_bytes)}")
    mirror = running(study.folder)
    if mirror is not None:
        mirror.flush()
        print(mirror.state())
    later = [other for other in NOTEBOOKS if other > name]
    if status == STOPPED:
        print(f"stopped early: run {name} again to resume from here")
    else:
        print(f"next: {later[0]}" if later else "this was the last notebook: see report.md for the comparison")
        if study.cfg.profile == "quick" and not later:
            print(f'the full study: profile = "t4" in the settings cells; {hosted.plan(resolve("t4"))}')
    print(f"peftlib: {name} {status}, study {study.cfg.study}, state {state_hash(name, study.cfg)}")


def state_hash(name, cfg):
    """12 hex digits over a notebook's name and every setting that changes its results."""
    return short_hash({"notebook": name, **first_names(cfg.fields_of("data", "math"))})


def last_words(text):
    """(status, state hash, [paths it wrote]) that `finish` printed at the end of `text`, or None."""
    found = list(_LAST_LINE.finditer(text))
    if not found:
        return None
    return found[-1][2], found[-1][4], _WROTE.findall(text[: found[-1].start()])


def executed_parameters(cells):
    """{name: value} from the sources of the cells run so far, oldest first.

    Only cells that start with `# Parameters` count: the notebook's own, and the one that papermill injects below it.
    Only the last run of each counts, so a deleted line has no effect; if both set a name, the later run wins.
    """
    last = {}
    for source in cells:
        if source.lstrip().startswith(_PARAMETERS):
            is_own = is_own_parameters(source)
            last.pop(is_own, None)  # keep the order of the last runs
            last[is_own] = source
    if not last:
        raise ConfigError(f"no parameters: first run the cell that begins with {_PARAMETERS!r}")
    values = {}
    for source in last.values():
        values |= literals(source)
    return values


def is_own_parameters(source):
    """Whether a parameters cell is a notebook's own, which has form annotations; papermill's has only values."""
    return _FORM_MARK.search(source) is not None


def literals(source):
    """{name: value} of a cell's `NAME = LITERAL` lines. ConfigError: any other line."""
    values = {}
    try:
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Assign) or not all(isinstance(t, ast.Name) for t in node.targets):
                raise ValueError(ast.unparse(node))
            values |= {target.id: ast.literal_eval(node.value) for target in node.targets}
    except (ValueError, SyntaxError) as error:
        raise ConfigError(
            f"the parameters cell may contain only NAME = VALUE lines with literal values: {error}"
        ) from None
    return values


def headless():
    """Whether no user can answer a prompt: true in our runner, papermill and nbconvert, false in Jupyter and Colab.

    ConfigError: called outside a notebook.
    """
    _ipython()
    return not is_watched()


def seed_everything(seed):
    """Seed Python's, NumPy's and torch's generators (torch's on every device)."""
    import random

    import numpy
    import torch  # transformers.set_seed would also load bitsandbytes, which prints

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def compact(cfg):
    """The resolved config in a few lines, grouped by scope, then the differences from the profile."""
    scopes, plain = ("data", "math", "run"), resolve(cfg.profile, study=cfg.study)
    told = {scope: "  ".join(f"{name}={value!r}" for name, value in cfg.fields_of(scope).items()) for scope in scopes}
    changed = differences(plain.fields_of(*scopes), cfg.fields_of(*scopes))
    told["changed"] = "; ".join(changed) or "nothing, same as the profile"
    how = {"width": 110, "subsequent_indent": " " * 11, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(f"{name:<9}  {words}", **how) for name, words in told.items())


def _ipython():
    """The running IPython shell. ConfigError: called outside a notebook."""
    try:
        return get_ipython()  # IPython adds it to the builtins
    except NameError:
        raise ConfigError("setup() works only in notebooks: elsewhere use peftlib.Study.resolve") from None


def _quiet_progress_bars():
    # The libraries read these at import. A progress bar would add a line per update to the executed copy.
    os.environ |= dict.fromkeys(NO_BARS, "1")
    import tqdm.auto

    # torch has already imported tqdm, which has therefore read its variable.
    tqdm.std.tqdm.__init__ = functools.partialmethod(tqdm.std.tqdm.__init__, disable=True)

    # In a kernel tqdm.auto would use widgets, which are not visible here and ignore TQDM_DISABLE.
    tqdm.auto.tqdm, tqdm.auto.trange = tqdm.std.tqdm, tqdm.std.trange


def _size_bytes(path):
    """The size of a file, or of all files in a folder; None if it does not exist."""
    if not path.exists():
        return None
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
