"""One frozen config per run: fields, limits, profiles, and the hash that keeps comparisons valid.

A field's metadata says which part of a run it governs (`scope`):
  data  - what the rows are; part of the study's frozen config
  math  - what is learned from them; part of the study's frozen config
  run   - where and how fast it runs; may change on resume, but is recorded
"""

import dataclasses
import difflib
import hashlib
import json
import warnings
from dataclasses import dataclass
from typing import Any

from peftlib.core.env import profile_for_hardware
from peftlib.core.errors import ConfigError
from peftlib.core.limits import checked, factors_of, last_layers, parsed, projections_of, require_folder_name, setting

_MOST = 2**32 - 1  # largest seed: torch's CPU generator uses only the low 32 bits
PACKAGED_MODEL = "packaged"  # the Gemma 3 270M that PyPI packages carry
_SAMPLES = "alpaca=sample; tulu=sample; ultrachat=sample"
_LORA_INITS = ("default", "gaussian", "pissa", "pissa_niter_4")
_ENGINES = ("auto", "slots", "plain", "vllm")  # slots: our continuous-batching engine

# Setting names of the first edition -> current names, which match TrainingArguments where it has an equivalent.
RENAMED = {
    "sequences_per_step": "batch_size",
    "micro_batch": "micro_batch_size",
    "eval_batch": "eval_batch_size",
    "checkpointing": "activation_checkpointing",
    "save_every": "save_steps",
    "valid_every": "eval_steps",
    "log_every": "logging_steps",
    "log_to": "report_to",
    "schedule": "lr_scheduler",
    "save_stall": "max_save_overhead",
    "optimizer_bits": "moment_bits",
    "galore_update_gap": "galore_update_interval",
    "keep_checkpoints": "save_total_limit",
}
_FIRST_NAMES = {new: old for old, new in RENAMED.items()}
# Data and math settings added after studies existed. Those studies used the defaults, and must keep their hashes.
_ADDED_LATER = frozenset(
    {"hybrid_galore", "galore_engine", "muon_learning_rate", "loraplus_lr_ratio", "oft_block_size", "max_read_rows"}
)


@dataclass(frozen=True)
class Config:
    """All settings of a run. ConfigError: a value has the wrong type or is outside its limits."""

    profile: str = setting("demo", "run", "profile that supplied the defaults", choices=("demo", "quick", "t4", "gpu"))
    study: str = setting("demo", "run", "name of the study folder under the output root")

    model: str = setting(PACKAGED_MODEL, "math", "hub id, local folder, or 'packaged' (Gemma 3 270M from PyPI)")
    sources: str = setting(_SAMPLES, "data", "NAME=WHERE; ...  WHERE is hub, sample, or FILE[,TESTFILE]")
    train_rows: int = setting(64, "data", "rows per source", low=1)
    valid_rows: int = setting(8, "data", "rows per source", low=0)
    test_rows: int = setting(16, "data", "rows per source", low=1)
    split_seed: int = setting(0, "data", "seed that orders each source's candidate rows", low=0, high=_MOST)
    max_read_rows: int = setting(0, "data", "read only this many rows of each source; 0: all", low=0)
    allow_short: bool = setting(False, "data", "divide a source with too few rows in the requested proportions")
    max_length: int = setting(256, "data", "tokens; longer conversations are cut after whole turns", low=16, high=32768)

    epochs: int = setting(1, "math", "passes over the training rows", low=1)
    max_steps: int = setting(0, "math", "optimizer steps; 0: all epochs", low=0)
    batch_size: int = setting(8, "math", "rows per optimizer step, over all micro-batches", low=1)
    seed: int = setting(0, "math", "row order, adapter initialisation, dropout", low=0, high=_MOST)
    fork: str = setting("", "math", "start from the weights of this study's run of the same method and seed; '': none")
    lr_scheduler: str = setting("cosine", "math", "learning-rate schedule", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = setting(0.05, "math", "fraction of the steps", low=0.0, high=0.5)
    weight_decay: float = setting(0.0, "math", "decoupled; multiplied by the learning rate", low=0.0, high=1.0)
    max_grad_norm: float = setting(1.0, "math", "clip the norm of applied gradients to this; 0: no clipping", low=0.0)

    lora_rank: int = setting(16, "math", "rank of each adapter", low=1)
    lora_alpha: int = setting(32, "math", "LoRA alpha; the scale is alpha / rank", low=1)
    lora_dropout: float = setting(0.0, "math", "dropout probability on adapter inputs", low=0.0, high=0.9)
    lora_init: str = setting("default", "math", "adapter initialisation; default: B zero", choices=_LORA_INITS)
    lora_use_rslora: bool = setting(False, "math", "rsLoRA: the scale is alpha / sqrt(rank)")
    lora_use_dora: bool = setting(False, "math", "DoRA: train each row's magnitude and direction separately (slower)")
    lora_learning_rate: float = setting(2e-4, "math", "peak for adapters", above=0.0, high=1.0)
    loraplus_lr_ratio: float = setting(16.0, "math", "lora_plus: B's rate as a multiple of A's", low=1.0, high=1000.0)
    oft_block_size: int = setting(32, "math", "oft: input features per rotation block", low=2)
    galore_rank: int = setting(128, "math", "rank of the gradient projection", low=1)
    galore_update_interval: int = setting(200, "math", "steps between refreshes of the projection", low=1)
    galore_scale: float = setting(0.25, "math", "factor on the update after projecting back", above=0.0, high=100.0)
    galore_learning_rate: float = setting(1e-3, "math", "peak for projected weights", above=0.0, high=1.0)

    galore_weights: str = setting("fp32", "math", "dtype; bf16 uses stochastic rounding", choices=("fp32", "bf16"))
    galore_engine: str = setting("peftlib", "math", "galore_torch: authors' code", choices=("peftlib", "galore_torch"))
    galore_on_refresh: str = setting("keep", "math", "moments when the basis changes", choices=("keep", "project"))
    moment_bits: int = setting(32, "math", "bits of Adam's moments (full: always 8)", choices=(8, 32))
    apollo_rank: int = setting(128, "math", "rank of the random projection", low=1)
    apollo_scale: float = setting(1.0, "math", "factor on the scaled gradient", above=0.0, high=1000.0)
    apollo_learning_rate: float = setting(1e-4, "math", "peak for everything apollo trains", above=0.0, high=1.0)
    hybrid_galore: str = setting(
        "attention", "math", "what the hybrid trains with GaLore: mlp, o_proj, last_4_layers, .."
    )
    full_learning_rate: float = setting(2e-5, "math", "peak for everything full trains", above=0.0, high=1.0)
    muon_learning_rate: float = setting(2e-5, "math", "peak for everything muon trains", above=0.0, high=1.0)

    max_new_tokens: int = setting(48, "data", "maximum tokens per answer", low=1, high=8192)

    precision: str = setting("auto", "run", "autocast dtype for training", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = setting("auto", "run", "device to run on", choices=("auto", "cpu", "cuda"))
    micro_batch_size: int = setting(0, "run", "rows of max_length tokens per forward pass; 0: planned", low=0)
    eval_batch_size: int = setting(0, "run", "rows answered at a time; 0: as many as fit in memory", low=0)
    engine: str = setting("auto", "run", "generation engine; auto: slots; plain: transformers", choices=_ENGINES)
    general_tokens: int = setting(512, "run", "tokens of general text to measure forgetting; 0: none", low=0)
    benchmarks: str = setting("auto", "run", "for 04_eval, e.g. retention,gsm8k; auto: on a GPU with lm-eval; '': none")
    benchmark_data: str = setting("", "run", "folder with the benchmarks' files; '': the hub")
    benchmark_limit: int = setting(0, "run", "score only the first rows of each benchmark; 0: all", low=0)
    rewind: str = setting("", "run", "factors from base (0) to tuned (1) to score in a whole study, such as 0.25,0.5")
    activation_checkpointing: str = setting(
        "off", "run", "recompute activations; planned if micro_batch_size is 0", choices=("off", "on", "offload")
    )
    compile: str = setting("auto", "run", "torch.compile per layer; auto: if it pays", choices=("auto", "on", "off"))
    cuda_graphs: str = setting("auto", "run", "run steps as CUDA graphs; auto: if no masks", choices=("auto", "off"))
    processes: int = setting(0, "run", "processes that train a notebook's run; 0: one per GPU", low=0, high=64)
    shard_optimizer: bool = setting(False, "run", "divide GaLore's moments among a run's processes")
    memory_gib: float = setting(0.0, "run", "GPU memory that training may use; 0: all", low=0.0)
    make_missing: bool = setting(False, "run", "notebooks create the data and runs they need if missing")
    max_seconds: float = setting(0.0, "run", "wall-clock limit per training call, then save; 0: none", low=0.0)
    session_hours: float = setting(0.0, "run", "session length; 0: 12 on Colab and Kaggle, else no limit", low=0.0)
    save_steps: int = setting(50, "run", "minimum optimizer steps between checkpoints", low=1)
    max_save_overhead: float = setting(0.02, "run", "max share of time spent saving; 0: no limit", low=0.0, high=1.0)
    eval_steps: int = setting(50, "run", "optimizer steps between validation losses", low=1)
    resume_rate_factor: float = setting(1.0, "run", "factor on a resumed run's learning rates", above=0.0, high=100.0)
    save_total_limit: int = setting(1, "run", "number of verified checkpoints to keep", low=1, high=10)
    logging_steps: int = setting(10, "run", "optimizer steps between log lines", low=1)
    report_to: str = setting("", "run", "also logs steps there; '': nowhere", choices=("", "tensorboard", "trackio"))
    workers: int = setting(0, "run", "tokenizing processes; 0: one per core", low=0, high=256)
    theme: str = setting("light", "run", "colours of notebook charts", choices=("light", "dark"))

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, checked(f, getattr(self, f.name)))
        require_folder_name("study", self.study)
        if not last_layers(self.hybrid_galore):
            projections_of("hybrid_galore", self.hybrid_galore)
        factors_of("rewind", self.rewind)
        if self.fork:
            require_folder_name("fork", self.fork)

    def fields_of(self, *scopes):
        """{name: value} of the fields in these scopes, in declaration order."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["scope"] in scopes}

    def study_fields(self):
        """What a study folder freezes: everything that changes the data or the math, except the seed."""
        frozen = self.fields_of("data", "math")
        del frozen["seed"]  # a study has runs with several seeds
        return frozen

    def run_hash(self, method):
        """12 hex digits over everything that changes the math of one run of `method`."""
        return short_hash({"method": method, **first_names(self.fields_of("data", "math"))})

    def replace(self, **changes):
        """A validated copy with some fields changed."""
        return dataclasses.replace(self, **_accepted(changes))


def current_names(fields):
    """Stored settings {name: value} under their current names; first-edition files use the old names in `RENAMED`.

    Settings added later get their default if the file lacks them.
    """
    return {**_later_defaults(), **{RENAMED.get(name, name): value for name, value in fields.items()}}


def first_names(fields):
    """Settings under the first edition's names. Hashes are taken over these, so existing studies keep theirs.

    Settings added later are left out while they have their default.
    """
    later = _later_defaults().items()
    return {_FIRST_NAMES.get(name, name): value for name, value in fields.items() if (name, value) not in later}


def _later_defaults():
    return {f.name: f.default for f in dataclasses.fields(Config) if f.name in _ADDED_LATER}


def short_hash(value):
    """12 hex digits of a JSON value's SHA-256, the same on any machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_HUB_SOURCES = "alpaca=hub; tulu=hub; ultrachat=hub"
_STUDY = {
    "model": "google/gemma-3-1b-it",
    "sources": _HUB_SOURCES,
    "train_rows": 5000,
    "valid_rows": 200,
    "test_rows": 2000,
    "max_length": 1024,
    "max_new_tokens": 256,
    "batch_size": 16,
    "galore_update_interval": 200,
    "eval_steps": 200,
    "general_tokens": 16384,  # all of the text
}
# Only what differs from the field defaults above.
PROFILES: dict[str, dict[str, Any]] = {
    "demo": {
        # Ten minutes on two cores without AVX512-BF16: few rows, but 24 steps, and enough test rows to show a gain.
        "train_rows": 24,
        "valid_rows": 4,
        "test_rows": 12,
        "batch_size": 3,
        # For 24 steps: adapters start at zero and need a high rate; GaLore's full weights must not overshoot.
        "lora_learning_rate": 1e-3,
        "galore_learning_rate": 5e-4,
        "galore_update_interval": 50,
        "micro_batch_size": 4,
        "save_steps": 12,
        "eval_steps": 8,
        "logging_steps": 3,
    },
    "quick": {
        # A first result on a free T4 within ten minutes, by the slow end of notebook.planner's estimate.
        **_STUDY,
        "model": "unsloth/gemma-3-270m-it",  # a public copy of Google's that needs no token
        "train_rows": 500,
        "valid_rows": 30,
        "test_rows": 34,
        "max_read_rows": 10_000,  # hub datasets are streamed, and reading them whole takes minutes
        "max_length": 512,
        "max_new_tokens": 128,
        "batch_size": 8,
        # For 188 steps, from the sweeps of the reference study, which has the same number.
        "lora_learning_rate": 5e-4,
        "galore_learning_rate": 5e-4,
        "galore_update_interval": 50,
        "eval_steps": 50,
        "general_tokens": 4096,
    },
    "t4": _STUDY,
    "gpu": _STUDY,
}
AUTO = [(name, "auto") for name in ("model", "sources", "theme")]  # the profile's value, in forms that take text


def resolve(profile: str | None = "auto", **overrides: Any) -> Config:
    """A profile's config with some fields overridden; None keeps the profile's value, as do the AUTO ones.

    Names of the first edition (`RENAMED`) are accepted with a FutureWarning.
    ConfigError: unknown profile or field (with the nearest names), or a value out of range.
    """
    if profile in (None, "auto"):
        profile = profile_for_hardware()
    if profile not in PROFILES:
        raise ConfigError(f"profile={profile!r} is unknown: use auto, {', '.join(PROFILES)}")
    given = _accepted({n: value for n, value in overrides.items() if value is not None and (n, value) not in AUTO})
    if given.get("study") in (None, "auto"):
        given["study"] = profile
    return Config(**{"profile": profile, **PROFILES[profile], **given})


def from_text(name, text):
    """Parse a command-line string as the field's type. ConfigError: it cannot be parsed."""
    name = next(iter(_accepted({name: text})))
    return parsed(next(f for f in dataclasses.fields(Config) if f.name == name), text)


def differences(old, new):
    """['field: old -> new', ...] between two dicts of fields, for messages."""
    names = [*old, *(n for n in new if n not in old)]
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]


def describe(cfg):
    """The resolved config as lines 'field = value  # unit', grouped by scope."""
    lines = []
    for scope in ("run", "data", "math"):
        lines.append(f"[{scope}]")
        for f in dataclasses.fields(cfg):
            if f.metadata["scope"] == scope:
                lines.append(f"  {f.name} = {getattr(cfg, f.name)!r}  # {f.metadata['unit']}")
    return "\n".join(lines)


def _accepted(given):
    """{current name: value}. ConfigError: no such setting, or a setting given under both its old and new name."""
    known = [f.name for f in dataclasses.fields(Config)]
    for name in given:
        new = RENAMED.get(name)
        if new in given:
            raise ConfigError(f"{name!r} is now called {new!r}, and both are set: remove {name!r}")
        if new:
            warnings.warn(f"the setting {name!r} is now called {new!r}", FutureWarning, stacklevel=3)
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{name!r} is not a setting: {hint}")
    return {RENAMED.get(name, name): value for name, value in given.items()}
