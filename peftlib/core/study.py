"""A study folder: where each file is, and the frozen config that keeps its runs comparable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from peftlib.core import record as records
from peftlib.core.config import AUTO, Config, current_names, differences, first_names, resolve, short_hash
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
_WAY_OUT = "delete it and run 01_data with the study's original settings"


def frozen_of(path):
    """Contents of a study's config.json: 'profile', 'config' and the adopted 'rates'.

    StudyError: it is damaged, or has settings that this peftlib does not know or allow.
    """
    found = require_shape(read_json(path, way_out=_WAY_OUT), _CONFIG, path, _WAY_OUT)
    found["config"] = current_names(found["config"])
    try:
        for name, value in found["config"].items():
            if value is None:
                raise ConfigError(f"{name} has no value")
        resolve(found["profile"], **found["config"])
    except ConfigError as error:
        raise StudyError(
            f"{path} cannot be used ({error}): it is damaged, or from another version of peftlib; fix it, or {_WAY_OUT}"
        ) from None
    return found


@dataclass(frozen=True)
class Study:
    """Paths below `folder`, and this session's resolved config."""

    folder: Path
    cfg: Config

    @classmethod
    def open(cls, cfg: Config) -> "Study":
        """The study named in cfg. StudyError: its folder has other data or runs with other math settings (the fields
        are named), or the study in cfg.fork does not exist.

        Writes nothing; `freeze` does that once the data are built.
        """
        study = cls(output_root() / cfg.study, cfg)
        if cfg.fork and not (output_root() / cfg.fork / "config.json").exists():
            raise StudyError(f"fork={cfg.fork!r}: there is no such study in {output_root()}: check its name")
        study._require_same()
        return study

    @classmethod
    def resolve(cls, **given: Any) -> "Study":
        """The study that settings name. Settings not given come from its folder if it exists, else from the profile.

        given: fields of Config as in config.resolve; None is not given. ConfigError, StudyError: see there and `open`.
        """
        cfg = resolve(**given)
        path = cls(output_root() / cfg.study, cfg).config_path
        if path.exists():
            chosen = {n: value for n, value in given.items() if value is not None and (n, value) not in AUTO}
            cfg = resolve(**{**frozen_of(path)["config"], **chosen, "profile": cfg.profile, "study": cfg.study})
        return cls.open(cfg)

    @classmethod
    def existing(cls, name: str) -> "Study":
        """An existing study, with the config it was made with.

        ConfigError: not a folder name. StudyError: there is no such study.
        """
        require_folder_name("study", name)
        folder = output_root() / name
        if not (folder / "config.json").exists():
            known = sorted(path.parent.name for path in output_root().glob("*/config.json"))
            here = f"studies there: {', '.join(known[:20])}; " if known else ""
            raise StudyError(
                f"there is no study {name!r} in {output_root()}: {here}a new one is made by python -m peftlib run "
                f"--study {name}"
            )
        frozen = frozen_of(folder / "config.json")
        return cls.open(resolve(frozen["profile"], study=name, **frozen["config"]))

    def _require_same(self):
        """StudyError: config.json has other values. Compares the data fields, and all fields once something has run."""
        if not self.config_path.exists():
            return
        # A field that was added after the study was made had its default then.
        frozen = {**resolve(self.cfg.profile).study_fields(), **frozen_of(self.config_path)["config"]}
        ours = self.cfg.study_fields()
        if not self.has_begun():
            ours = self.cfg.fields_of("data")
            frozen = {name: frozen[name] for name in ours}
        changed = differences(frozen, ours)
        if changed:
            raise StudyError(
                f"study {self.cfg.study!r} was made with another config: {'; '.join(changed)}. "
                f"Change these fields back, or choose another study name ({self.folder} is left unchanged)."
            )

    def has_begun(self):
        """Whether anything was trained, swept or scored here, so that the training settings may no longer change."""
        places = (self.folder / name for name in ("records", "checkpoints", "sweeps"))
        return any(path.is_file() for place in places for path in place.rglob("*")) or bool(self.adopted_rates())

    def freeze(self) -> None:
        """Write config.json, or rewrite it while nothing has run. StudyError: as in open."""
        self._require_same()
        frozen = self.cfg.study_fields()
        kept = frozen_of(self.config_path) if self.config_path.exists() else None
        if kept is None or (kept["config"] != frozen and not self.has_begun()):
            write_json(
                self.config_path,
                {"profile": self.cfg.profile, "config": frozen, "config_hash": short_hash(first_names(frozen))},
            )

    def adopted_rates(self):
        """{method: {'rates': {field: value}, 'from': {...}}} that `adopt` wrote to config.json."""
        return frozen_of(self.config_path).get("rates", {}) if self.config_path.exists() else {}

    def adopt(self, method, rates, found):
        """Train `method` with these learning rates from now on; config.json keeps them with `found`, their origin.

        rates: {field: value}. Allowed once per method, before its first run.
        StudyError: the method already has other rates, or a run of it started with others.
        """
        with FileLock(self.folder / ".rates.lock"):  # runs that start at once must not overwrite each other's rates
            self._adopt(method, rates, found)

    def _adopt(self, method, rates, found):
        kept = self.adopted_rates()
        if method in kept:
            changed = differences(kept[method]["rates"], rates)
            if changed:
                raise StudyError(
                    f"study {self.folder.name!r} already has learning rates for {method}: {'; '.join(changed)}. A "
                    "study keeps the rates it started with: choose another study name"
                )
            return
        begun = [r["seed"] for r in self.records() if r["method"] == method and r["steps"]]
        if begun and any(getattr(self.cfg, name) != value for name, value in rates.items()):
            raise StudyError(
                f"{method} (seed {begun[0]}) was trained in study {self.folder.name!r} with other rates than {rates}: "
                "rates must be adopted before the first run; choose another study name"
            )
        self.cfg.replace(**rates)  # rejects a rate out of range
        kept[method] = {"rates": rates, "from": found}
        write_json(self.config_path, {**frozen_of(self.config_path), "rates": kept})

    def with_rates_of(self, method):
        """This study with a method's adopted learning rates in its config; itself if there are none."""
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
        """[record, ...] of every run in the folder, sorted by method name and seed."""
        found = [records.read(path) for path in (self.folder / "records").glob("*.json")]
        return sorted(found, key=lambda record: (record["method"], record["seed"]))
