"""PEFT configs as methods: `peft:FILE.json` on the 16-bit model, `peft4:FILE.json` on the NF4 model.

FILE is PEFT's adapter_config.json. In files and tables the method is called peft-STEM-HASH, with the hash of FILE's
contents: a changed file is another method. A study keeps a copy, so that it does not need FILE afterwards.
"""

import hashlib
import json
import re
from pathlib import Path

from peftlib.core.env import output_root
from peftlib.core.errors import ConfigError, StudyError
from peftlib.core.files import read_json, write_json
from peftlib.methods import qlora
from peftlib.methods.spec import METHODS, MethodSpec
from peftlib.models.adapters import config_of, with_adapter
from peftlib.models.inspect import PROJECTIONS

_FORMS = {"peft": ((), "16 bits"), "peft4": (PROJECTIONS, "4 bits (NF4, double quantization)")}
_NAME = re.compile(r"(peft4?)-(\w+)-[0-9a-f]{8}", re.ASCII)
_FOLDER, _FIELD = "methods", "peft_config"
# Chosen by the hash, so two methods may get the same; for light and dark backgrounds.
_LOOKS = ((("#871cd4", "#b374f3"), "8"), (("#28050a", "#b8a862"), "d"), (("#8a5a00", "#ff9d5c"), "h"))
_known: dict[str, MethodSpec] = {}


def find(name):
    """The MethodSpec of a registered name, of peft:FILE or peft4:FILE, or of a config that a study has kept.

    ConfigError: no such method, no such file, or not a valid adapter config (the field is named). StudyError: a
    study's copy is damaged.
    """
    form, colon, path = name.partition(":")
    if colon and form in _FORMS:
        return _of_file(form, Path(path).expanduser(), name)
    found = known(name)
    if found is None:
        raise ConfigError(
            f"method={name!r} is unknown: use {', '.join(METHODS)}, or peft:FILE.json (peft4:FILE.json for NF4) with a "
            "PEFT config"
        )
    return found


def known(name):
    """The MethodSpec for a name in files and tables, or None. StudyError: a study's copy of it is damaged."""
    parts = _NAME.fullmatch(name)
    if name not in METHODS and name not in _known and parts:
        for path in sorted(output_root().glob(f"*/{_FOLDER}/{name}.json"))[:1]:
            found = _spec(parts[1], parts[2], read_json(path).get(_FIELD), path)
            if found.name != name:
                raise StudyError(f"{path} is damaged: its name is {name}, but its content is {found.name}; delete it")
    return METHODS.get(name) or _known.get(name)


def keep(name, folder):
    """A method's (see `find`) name in files; copies a PEFT config to the study in `folder`."""
    spec = find(name)
    path = Path(folder) / _FOLDER / f"{spec.name}.json"
    if spec.peft_config is not None and not path.exists():
        write_json(path, {_FIELD: spec.peft_config})
    return spec.name


def _of_file(form, path, asked):
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(f"method={asked!r}: there is no file {path}: use PEFT's adapter_config.json") from None
    except ValueError as error:
        raise ConfigError(f"method={asked!r}: {path} is not JSON ({error}): fix it") from None
    stem = path.stem if path.stem != "adapter_config" else path.absolute().parent.name
    return _spec(form, re.sub(r"\W+", "_", stem, flags=re.ASCII)[:40].strip("_") or "config", fields, path)


def _spec(form, stem, fields, path):
    kind = config_of(fields, source=str(path)).peft_type  # rejects other files
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    (four_bit, held), (colors, marker) = _FORMS[form], _LOOKS[int(digest, 16) % len(_LOOKS)]
    name = f"{form}-{stem}-{digest[:8]}"

    def prepare(model, cfg):
        _require_base(fields, cfg.model, name)
        return with_adapter(model, config_of(fields, source=name), source=name)

    _known[name] = MethodSpec(
        name=name,
        label=f"{kind.value} by {stem}",
        description=f"PEFT's {kind.value} with the config {stem} (SHA-256 {digest[:8]}...), the rest frozen in {held}",
        colors=colors,
        marker=marker,
        trains={"adapters": PROJECTIONS},
        rates=("lora_learning_rate",),
        prepare=prepare,
        build_optimizer=qlora.build_optimizer,
        four_bit=four_bit,
        is_default=False,
        is_counted=True,
        peft_config=fields,
    )
    return _known[name]


def _require_base(fields, model, name):
    """ConfigError: the config's base model is not the study's."""
    named = fields.get("base_model_name_or_path")
    if named and Path(str(named)).name.lower() != Path(model).name.lower():
        raise ConfigError(
            f"{name}: base_model_name_or_path={named!r}, but the study's model is {model!r}: set it to null, or use a "
            "study with that model"
        )
