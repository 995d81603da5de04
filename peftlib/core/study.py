"""A study folder: the place of each file, and the frozen config that keeps its runs comparable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from peftlib.core import record as records
from peftlib.core.config import Config, current_names, differences, first_names, resolve, short_hash
from peftlib.core.env import output_root
from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.core.json_reading import Map, Maybe, require_shape
from peftlib.core.limits import require_folder_name

_CONFIG = {"profile": str, "config": {}, "rates?": Map({"rates": Map(float), "from": {}})}
_COUNTS, _SOURCE = Map(Map(int)), {"where": Map(str), "license": str}
_TOKENS = {"total": int, "scored": int, "shortest": int, "median": float, "p95": float, "longest": int}
_MANIFEST = {
    "split_hash": str,
    "counts?": _COUNTS,
    "rejected?": _COUNTS,
    "read?": Map(int),
    "unused?": Map(int),
    "conversions?": _COUNTS,
    "tokens?": Map(Map(Maybe(_TOKENS))),
    "sources?": Map(_SOURCE),
    "inputs?": {"sources?": Map({})},
    "files?": Map(str),
    "near_duplicate?": {},
    "meaning?": Map(Map(str)),
}


def frozen_of(path):
    """What a study's config.json holds: 'profile', 'config' and the adopted 'rates'.

    StudyError: it is damaged, or holds settings that this peftlib does not know or allow.
    """
    found = require_shape(read_json(path), _CONFIG, path)
    found["config"] = current_names(found["config"])
    try:
        for name, value in found["config"].items():
            if value is None:
                raise ConfigError(f"{name} has no value")
        resolve(found["profile"], **found["config"])
    except ConfigError as error:
        raise StudyError(
            f"{path} cannot be used ({error}): it is damaged, or of another peftlib; put it right, or delete it and "
            "run 01_data with the settings that the study was made with"
        ) from None
    return found


@dataclass(frozen=True)
class Study:
    """Paths below `folder`, and the config that this session resolved."""

    folder: Path
    cfg: Config

    @classmethod
    def open(cls, cfg: Config) -> "Study":
        """The study named in cfg. StudyError: its folder holds other data, or runs of other mathematics (fields
        named), or there is no study of the name in cfg.fork.

        Nothing is written; `freeze` does that once the data stand.
        """
        study = cls(output_root() / cfg.study, cfg)
        if cfg.fork and not (output_root() / cfg.fork / "config.json").exists():
            raise StudyError(f"fork={cfg.fork!r}: there is no such study in {output_root()}: check its name")
        study._require_same()
        return study

    @classmethod
    def resolve(cls, **given: Any) -> "Study":
        """The study that settings name: what they leave open comes from its folder where it stands, else the profile.

        given: fields of Config as in config.resolve, None where open. ConfigError, StudyError: see there and `open`.
        """
        cfg = resolve(**given)
        path = cls(output_root() / cfg.study, cfg).config_path
        if path.exists():
            chosen = {name: value for name, value in given.items() if value is not None}
            cfg = resolve(**{**frozen_of(path)["config"], **chosen, "profile": cfg.profile, "study": cfg.study})
        return cls.open(cfg)

    @classmethod
    def existing(cls, name: str) -> "Study":
        """The study of a folder that exists, with the config it was made with.

        ConfigError: no name of a folder. StudyError: there is no such study.
        """
        require_folder_name("study", name)
        folder = output_root() / name
        if not (folder / "config.json").exists():
            raise StudyError(
                f"there is no study {name!r} in {output_root()}: python -m peftlib run --study {name} makes it"
            )
        frozen = frozen_of(folder / "config.json")
        return cls.open(resolve(frozen["profile"], study=name, **frozen["config"]))

    def _require_same(self):
        """StudyError: config.json fixes other values. The data's fields once it stands, all once something has run."""
        if not self.config_path.exists():
            return
        # A field that is younger than the study had its default then.
        frozen = {**resolve(self.cfg.profile).study_fields(), **frozen_of(self.config_path)["config"]}
        ours = self.cfg.study_fields()
        if not self.has_begun():
            ours = self.cfg.fields_of("data")
            frozen = {name: frozen[name] for name in ours}
        changed = differences(frozen, ours)
        if changed:
            raise StudyError(
                f"study {self.cfg.study!r} was made with another config: {'; '.join(changed)}. "
                f"Set these fields back, or choose another study name ({self.folder} stays as it is)."
            )

    def has_begun(self):
        """Whether something was trained, swept or scored here, which other settings of training would not match."""
        places = (self.folder / name for name in ("records", "checkpoints", "sweeps"))
        return any(path.is_file() for place in places for path in place.rglob("*")) or bool(self.adopted_rates())

    def freeze(self) -> None:
        """Write config.json, or write it anew while nothing has run. StudyError: as in open."""
        self._require_same()
        frozen = self.cfg.study_fields()
        kept = frozen_of(self.config_path) if self.config_path.exists() else None
        if kept is None or (kept["config"] != frozen and not self.has_begun()):
            write_json(
                self.config_path,
                {"profile": self.cfg.profile, "config": frozen, "config_hash": short_hash(first_names(frozen))},
            )

    def adopted_rates(self):
        """{method: {'rates': {field: value}, 'from': {...}}} that config.json has of `adopt`."""
        return frozen_of(self.config_path).get("rates", {}) if self.config_path.exists() else {}

    def adopt(self, method, rates, found):
        """Train `method` with these learning rates from now on; config.json keeps them with `found`, what they rest on.

        rates: {field: value}. Once for each method, before its first run.
        StudyError: there are other rates already, or a run of it was begun with others.
        """
        with FileLock(self.folder / ".rates.lock"):  # of several runs that start at once none may lose another's
            self._adopt(method, rates, found)

    def _adopt(self, method, rates, found):
        kept = self.adopted_rates()
        if method in kept:
            changed = differences(kept[method]["rates"], rates)
            if changed:
                raise StudyError(
                    f"study {self.folder.name!r} has learning rates of {method} already: {'; '.join(changed)}. A study "
                    "keeps those it began with: choose another study name"
                )
            return
        begun = [r["seed"] for r in self.records() if r["method"] == method and r["steps"]]
        if begun and any(getattr(self.cfg, name) != value for name, value in rates.items()):
            raise StudyError(
                f"{method} (seed {begun[0]}) was trained in study {self.folder.name!r} with other rates than {rates}: "
                "rates come before the first run; choose another study name"
            )
        self.cfg.replace(**rates)  # refuses a rate out of range
        kept[method] = {"rates": rates, "from": found}
        write_json(self.config_path, {**frozen_of(self.config_path), "rates": kept})

    def with_rates_of(self, method):
        """This study with the adopted learning rates of a method in its config; itself where there are none."""
        adopted = self.adopted_rates().get(method)
        return Study(self.folder, self.cfg.replace(**adopted["rates"])) if adopted else self

    config_path = property(lambda self: self.folder / "config.json")
    data_dir = property(lambda self: self.folder / "data")
    manifest_path = property(lambda self: self.data_dir / "manifest.json")
    results_path = property(lambda self: self.folder / "results.csv")
    report_path = property(lambda self: self.folder / "report.md")
    figures_dir = property(lambda self: self.folder / "figures")
    notebooks_dir = property(lambda self: self.folder / "notebooks")

    def record_path(self, method, seed):
        return self.folder / "records" / f"{method}-s{seed}.json"

    def checkpoint_dir(self, method, seed):
        return self.folder / "checkpoints" / f"{method}-s{seed}"

    def weights_dir(self, method, seed):
        return self.folder / "weights" / f"{method}-s{seed}"

    def predictions_path(self, method, seed):
        return self.folder / "predictions" / f"{method}-s{seed}.jsonl"

    def benchmark_path(self, method, seed, task):
        return self.folder / "benchmarks" / f"{method}-s{seed}" / f"{task}.jsonl"

    def manifest(self) -> dict[str, Any]:
        """data/manifest.json as a dict. StudyError: 01_data has not finished here."""
        if not (self.manifest_path.exists() and self.config_path.exists()):
            raise StudyError(
                f"no data in {self.data_dir}: run 01_data first, with study = {self.cfg.study!r} "
                f"(python -m peftlib run 01 --study {self.cfg.study})"
            )
        return require_shape(read_json(self.manifest_path), _MANIFEST, self.manifest_path)

    def records(self) -> list[dict[str, Any]]:
        """[record, ...] of every run in the folder, by method's name and seed."""
        found = [records.read(path) for path in (self.folder / "records").glob("*.json")]
        return sorted(found, key=lambda record: (record["method"], record["seed"]))
