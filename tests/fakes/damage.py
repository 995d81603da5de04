"""Every way to damage a file of a finished study, and every command that reads one: the cases of test_damaged_studies.

A command that meets a damaged file may end in an error that names the file, or do its work with the result that it has
without the damage; a raw traceback, and another result, are failures.
"""

import json
import shutil

from finished_study import COMMANDS, NAME, attempt

# Files that are damaged by value: one of those that one reader reads, for the others are read in the same way.
_BY_VALUE = (
    "config.json",
    "lock.json",
    "data/manifest.json",
    "records/hybrid-s0.json",
    "predictions/hybrid-s0.jsonl",
    "judge/base-vs-hybrid.jsonl",
    "sweeps/hybrid.json",
    "weights/hybrid-s0/peftlib.json",
    "weights/hybrid-s0/adapter_config.json",
    "weights/galore-s0/config.json",
)
_OF_DATA = ("report", "judge", "train, resumed", "data", "plan", "export adapter", "evaluate", "sweep", "reference")
# Which commands read a file, by the beginning of its path; the first that fits.
_READERS = {
    "config.json": tuple(COMMANDS),
    "data/README.md": ("report", "data"),
    "data/rejects.jsonl": ("report", "data"),
    "data/": _OF_DATA,
    "records/": ("report", "compare", "evaluate", "train, finished", "export adapter", "judge", "reference"),
    "checkpoints/": ("train, resumed", "report"),
    "weights/hybrid": ("chat adapter", "export adapter", "train, finished"),
    "weights/galore": ("chat merged", "export merged"),
    "predictions/": ("report", "compare", "judge", "evaluate", "export adapter"),
    "judge/": ("report", "judge"),
    "sweeps/": ("sweep", "reference", "report"),
    "lock.json": ("evaluate", "data", "train, resumed"),
    "": ("report", "compare"),
}


def readers_of(name):
    """Names of the commands that read a file of a study, by its path below the study."""
    return next(commands for start, commands in _READERS.items() if name.startswith(start))


def _ways(path, *, by_value):
    """[(name, damage), ...] for a file; damage(path) does it. Deterministic."""
    made = [("truncated", _cut), ("empty", lambda p: p.write_bytes(b"")), ("directory", _folder_instead)]
    made += [(f"flipped at {share:.0%}", _flip(share)) for share in (0.2, 0.5, 0.8)]
    if path.suffix in (".json", ".jsonl"):
        made += [("not UTF-8", _insert(b"\xff\xfe")), ("deep", lambda p: p.write_bytes(b"[" * 200_000))]
        made += [(f"is {text}", lambda p, t=text: p.write_text(t)) for text in ("[]", "null", "7", '{"a": 1}', "{}")]
        made += _json_ways(path) if by_value else []
    return made


def _json_ways(path):
    """Damage by value: each key of the first object, and of the objects in it, dropped or of another type."""
    made = [("version 99", _changed(("schema_version",), 99))]
    places = list(_places(_first(path)))
    # The seal shows any of them, so that some will do.
    made += [(f"{'.'.join(place)} dropped", _changed(place, _DROP)) for place in places[::4]]
    made += [(f"{'.'.join(place)} of another type", _changed(place, _RETYPE)) for place in places[::4]]
    # As a file looks that was written before files had a seal: what its values are is all there is to go by.
    made += [(f"{'.'.join(place)} dropped, unsealed", _changed(place, _DROP, is_sealed=False)) for place in places]
    made += [(f"{'.'.join(place)} retyped, unsealed", _changed(place, _RETYPE, is_sealed=False)) for place in places]
    numbers = [place for place in places if isinstance(_at(_first(path), place), int | float)][:1]
    texts = [place for place in places if isinstance(_at(_first(path), place), str)][:1]
    for place in numbers:
        for odd in (float("nan"), float("inf")):
            made += [(f"{'.'.join(place)} {odd}", _changed(place, odd, is_sealed=False))]
        made += [(f"{'.'.join(place)} 1e999", _changed(place, "1e999", is_sealed=False, is_raw=True))]
    made += [(f"{'.'.join(place)} lone surrogate", _changed(place, "\ud800", is_sealed=False)) for place in texts]
    return made


_DROP, _RETYPE = object(), object()
_NESTED = 14  # keys of an object within an object


def _first(path):
    text = path.read_text(encoding="utf-8")
    found = json.loads((text.split("\n")[0] if path.suffix == ".jsonl" else text) or "null")
    return found if isinstance(found, dict) else {}


def _places(value):
    """The keys of an object, and some of each object in it."""
    for name, part in value.items():
        if name == "seal":
            continue
        yield (name,)
        if isinstance(part, dict):
            yield from ((name, inner) for inner in list(part)[:_NESTED])


def _at(value, place):
    for name in place:
        value = value[name]
    return value


def _changed(place, new, *, is_sealed=True, is_raw=False):
    def damage(path):
        value = _first(path)
        parent = _at(value, place[:-1])
        if new is _DROP:
            del parent[place[-1]]
        elif new is _RETYPE:
            parent[place[-1]] = _of_another_type(parent[place[-1]])
        else:
            parent[place[-1]] = new
        if not is_sealed:
            value.pop("seal", None)
        text = json.dumps(value)
        if is_raw:
            text = text.replace(json.dumps(new), new)
        if path.suffix == ".jsonl":
            text = "\n".join([text, *path.read_text(encoding="utf-8").split("\n")[1:]])
        path.write_text(text)

    return damage


def _of_another_type(value):
    if isinstance(value, str):
        return 7
    return {"odd": 1} if isinstance(value, list) or value is None else ["odd"] if isinstance(value, dict) else "odd"


def _cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _folder_instead(path):
    path.unlink()
    path.mkdir()


def _flip(share):
    def damage(path):
        content = bytearray(path.read_bytes())
        if content:
            content[min(int(len(content) * share), len(content) - 1)] ^= 0x01
        path.write_bytes(content)

    return damage


def _insert(odd):
    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3] + odd + content[len(content) // 3 :])

    return damage


def cases_of(folder):
    """[(file below the study, name of the damage, damage, command), ...], all of them."""
    made = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("sweeps/") and name.count("/") > 2:
            continue  # below a trial's folder
        for how, damage in _ways(path, by_value=name in _BY_VALUE):
            # A damage of one value costs one command: the others read the file in the same way.
            is_of_a_value = any(word in how for word in ("dropped", "retyped", "of another type"))
            commands = readers_of(name)[:1] if is_of_a_value else readers_of(name)
            made += [(name, how, damage, command) for command in commands]
    return made


def verdict(case, pristine, root, expected):
    """None where a case ends as it should, else what is wrong, in words. `root` is a fresh folder with PEFTLIB_ROOT."""
    name, how, damage, command = case
    shutil.copytree(pristine, root / "runs")
    file = root / "runs" / NAME / name
    damage(file)
    kind, found = attempt(command, root)
    if kind == "raw":
        return f"{name}, {how}, {command}: RAW {type(found).__name__}: {str(found)[:150]}"
    if kind == "error":
        named = any(part in found for part in (file.name, file.parent.name) if part != NAME)
        return None if named and len(found) > 30 else f"{name}, {how}, {command}: NOT NAMED in {found[:250]}"
    if "unsealed" in how or found == expected[command] or (isinstance(found, str) and _is_told(file, found)):
        return None
    return f"{name}, {how}, {command}: CHANGED"


def _is_told(file, text):
    return file.name in text.replace("\\", "") and "is ignored" in text
