import json
import os
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from peftlib import data
from peftlib.core import record as records
from peftlib.core.errors import CheckpointError, ModelError
from peftlib.core.files import read_json, write_json
from peftlib.evaluation import chat as talk
from peftlib.evaluation import evaluate
from peftlib.export.export import export_model
from peftlib.models import identity
from peftlib.models.locate import BaseWeights
from peftlib.models.saved import load_trained, save_trained
from peftlib.notebook import ask as ask_all
from peftlib.train.loop import TrainingRun


@pytest.fixture(autouse=True)
def new_process(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("peftlib.evaluation.chat._typed", lambda: iter(()))
    identity.forget()


@pytest.fixture
def own_base(tmp_path):
    """A base model in a folder that a test may change."""
    return tiny.model_folder(tmp_path / "base")


def exchange(base):
    """Other weights of the same names, shapes, dtypes, size and time in a model's folder."""
    path, other = base / "model.safetensors", base.with_name("other")
    before = path.stat()
    tiny.model_folder(other, seed=1)
    shutil.copyfile(other / "model.safetensors", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def flip(path, at=-3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(path, **fields):
    """Change fields as somebody does who takes the file's own digest out, as its error says."""
    kept = json.loads(path.read_text())
    kept.pop("seal", None)
    path.write_text(json.dumps({**kept, **fields}))


def quiet(line):
    pass


def uses(study, method, tmp_path):
    """What takes the weights of a run up."""
    return [
        lambda: evaluate.evaluate(study, method, log=quiet),
        lambda: talk.main(study, method, seed=0, max_new_tokens=2),
        lambda: load_trained(study.weights_dir(method, 0), log=quiet),
        lambda: export_model(study, method, to=tmp_path / "out", form="merged"),
        lambda: export_model(study, method, to=tmp_path / "out", form="adapter"),
    ]


def test_a_flipped_bit_of_the_weights_is_refused_by_all_who_use_them(finished, tmp_path):
    study = finished("qlora")
    path = study.weights_dir("qlora", 0) / "adapter_model.safetensors"
    flip(path)
    said = "does not match the run's record: adapter_model.safetensors is damaged"
    for use in uses(study, "qlora", tmp_path):
        with pytest.raises(ModelError, match=said):
            use()
    [reply] = ask_all.Models(study, quiet).ask("hi", ["qlora"], 2)
    assert reply.answer is None and said in reply.error
    flip(path)
    assert load_trained(study.weights_dir("qlora", 0))


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("galore", lambda folder: flip(folder / "model.safetensors"), "model.safetensors is damaged"),
        ("hybrid", lambda folder: (folder / "attention.safetensors").unlink(), "attention.safetensors is missing"),
        (
            "lora",
            lambda folder: shutil.copy(folder / "adapter_model.safetensors", folder / "attention.safetensors"),
            "attention.safetensors is not listed",
        ),
        (
            "lora",
            lambda folder: edit(folder / "adapter_config.json", lora_alpha=1000),
            "adapter_config.json is damaged",
        ),
        ("lora", lambda folder: edit(folder / "peftlib.json", precision="fp16"), "peftlib.json is damaged"),
    ],
)
def test_what_else_in_the_folder_decides_the_answers_is_checked(finished, method, change, said):
    study = finished(method)
    change(study.weights_dir(method, 0))
    with pytest.raises(ModelError, match=said):
        load_trained(study.weights_dir(method, 0), log=quiet)


def test_weights_that_something_else_saved_there_are_refused(finished, tiny_model):
    study = finished("galore")
    facts = {"model": str(tiny_model), "four_bit": [], "precision": "fp32"}
    save_trained(tiny.model(seed=9), data.load_tokenizer(str(tiny_model)), study.weights_dir("galore", 0), facts)
    with pytest.raises(ModelError, match="model.safetensors is damaged or was replaced"):
        load_trained(study.weights_dir("galore", 0))


def test_an_export_is_checked_by_the_record_within_it(finished, tmp_path):
    study, lines = finished("qlora"), []
    export_model(study, "qlora", to=tmp_path / "out")
    edit(tmp_path / "out" / "peftlib.json", model=study.cfg.model)  # where the base is on this machine
    assert load_trained(tmp_path / "out", log=lines.append) and not lines
    flip(tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapter_model.safetensors is damaged"):
        load_trained(tmp_path / "out")


def test_a_folder_without_a_record_loads_and_says_once_that_it_is_not_checked(finished, tmp_path):
    study, lines = finished("qlora"), []
    folder = shutil.copytree(study.weights_dir("qlora", 0), tmp_path / "elsewhere")
    assert load_trained(folder, log=lines.append) and load_trained(folder, log=lines.append)
    assert len(lines) == 1 and "elsewhere has no record with digests" in lines[0]


def test_a_file_is_read_once_while_it_lies_still(tmp_path, monkeypatch):
    path, read = tmp_path / "weights", []
    monkeypatch.setattr(identity, "sha256", lambda path: read.append(path) or str(len(read)))
    path.write_bytes(b"one")
    assert [identity.known_sha256(path) for _ in range(2)] == ["1", "2"]  # just written: it may change unnoticed
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)
    assert [identity.known_sha256(path) for _ in range(3)] == ["3"] * 3
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its change time tells, all the same
    assert identity.known_sha256(path) == "4"


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_a_run_does_not_go_on_with_another_base(make_study, own_base, method):
    study = make_study(model=str(own_base), max_steps=2, max_seconds=1e-9)
    assert TrainingRun(study, method, log=quiet).train()["status"] == "stopped"
    exchange(own_base)
    study.record_path(method, 0).unlink()  # the checkpoint alone knows
    with pytest.raises(CheckpointError, match=r"base' is not the base model of the checkpoint in .*-s0"):
        TrainingRun(study, method, log=quiet).train()
    tiny.model_folder(own_base)
    again = make_study(model=str(own_base), max_steps=2)
    assert TrainingRun(again, method, log=quiet).train()["status"] == "ok"


@pytest.mark.parametrize("method", ["qlora", "galore"])
def test_another_base_is_refused_by_all_who_use_it(make_study, own_base, tmp_path, method):
    study = make_study(model=str(own_base), max_steps=2)
    TrainingRun(study, method, log=quiet).train()
    forked = make_study(model=str(own_base), study="forked", fork="tiny", max_steps=2)
    ours = records.load(study, method, 0)["model_sha256"]
    exchange(own_base)
    other = identity.base_facts(str(own_base))["model_sha256"]
    both = rf"is not the base model of .*SHA-256 {other[:16]} here, SHA-256 {ours[:16]} there.*another study name"
    uses_of_base = [  # whose results would stand beside those of the former base
        lambda: evaluate.evaluate(study, "base", log=quiet),
        lambda: talk.main(study, "base", seed=0, max_new_tokens=2),
        lambda: TrainingRun(study, "lora", log=quiet).train(),
    ]
    used = uses(study, method, tmp_path)
    if method == "galore":  # the folder is a whole model, which loads by itself and has no adapter to export
        del used[4], used[2]
    for use in [*used, *uses_of_base]:
        with pytest.raises(ModelError, match=both):
            use()
    with pytest.raises(
        CheckpointError, match=rf"is not the base model of fork='tiny': what its {method} trained: SHA-256"
    ):
        TrainingRun(forked, method, log=quiet).train()


def test_an_adapter_is_exported_where_its_base_is_not(finished, own_base, tmp_path):
    study = finished("qlora", model=str(own_base))
    own_base.rename(tmp_path / "moved")
    assert export_model(study, "qlora", to=tmp_path / "out").files


def test_what_is_older_than_digests_opens_and_says_once_that_it_is_not_checked(make_study, finished):
    study, lines = finished("qlora", is_scored=True), []
    for path in (study.folder / "records").iterdir():
        write_json(path, {k: v for k, v in read_json(path).items() if k not in ("model_sha256", "settings_sha256")})
    facts = study.weights_dir("qlora", 0) / "peftlib.json"
    write_json(facts, {k: v for k, v in read_json(facts).items() if not k.startswith("model_")})
    for name in ("base", "qlora", "base", "qlora"):
        assert evaluate.load_model(study, name, 0, device="cpu", dtype=torch.float32, log=lines.append)
    assert len(lines) == 2 and all("has no digest of its base model" in line for line in lines)
    forked = make_study(study="forked", fork="tiny", max_steps=1, lora_learning_rate=1e-2, galore_learning_rate=1e-2)
    assert TrainingRun(forked, "qlora", log=lines.append).train()["status"] == "ok"


def test_records_and_trained_folders_name_their_base(finished):
    study = finished("qlora")
    wanted = identity.base_facts(study.cfg.model)
    assert wanted["model_revision"] is None and len(wanted["model_sha256"]) == 64
    for found in (records.load(study, "qlora", 0), read_json(study.weights_dir("qlora", 0) / "peftlib.json")):
        assert {name: found[name] for name in wanted} == wanted


def test_the_digest_is_of_the_tensors_however_they_lie_in_files(own_base, tmp_path):
    whole = identity.base_facts(str(own_base))
    tensors = load_file(own_base / "model.safetensors")
    save_file(dict(reversed(tensors.items())), own_base / "model.safetensors", metadata={"format": "pt", "by": "me"})
    assert identity.base_facts(str(own_base)) == whole
    tiny.model().save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert identity.base_facts(str(tmp_path / "parts")) == whole
    name = "model.norm.weight"
    for changed in (tensors[name].half(), tensors[name][None], tensors[name] + 1e-6):
        save_file({**tensors, name: changed}, own_base / "model.safetensors")
        assert identity.base_facts(str(own_base)) != whole


def test_a_model_of_the_hub_is_named_with_its_commit(own_base, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--me--gemma" / "snapshots" / ("0123abcd" * 5)
    shutil.copytree(own_base, snapshot)
    monkeypatch.setattr(identity, "weight_paths", lambda model, **how: [str(snapshot / "model.safetensors")])
    assert identity.base_facts("me/gemma")["model_revision"] == "0123abcd" * 5
    kept = {"model_sha256": "ff" * 32, "model_revision": "9" * 40}
    both = r"\(revision 0123abcd0123\) here, SHA-256 f{16} \(revision 999999999999\) there"
    with pytest.raises(ModelError, match=both):
        identity.require_base(kept, "me/gemma", what="x")


def test_a_large_models_digest_is_kept_in_the_users_cache(own_base, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_SETTLED_NS", 0)
    monkeypatch.setattr(identity, "_WORTH_KEEPING_BYTES", 0)
    found = identity.base_facts(str(own_base))
    [note] = (tmp_path / "cache" / "digests").iterdir()
    identity.forget()
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_hash_tensors", lambda paths: pytest.fail("read again"))
        assert identity.base_facts(str(own_base)) == found
    note.write_text("garbage")
    identity.forget()
    assert identity.base_facts(str(own_base)) == found
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path / "file" / "below"))  # cannot be written
    exchange(own_base)
    assert identity.base_facts(str(own_base)) != found


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0nonsense", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_base_that_is_no_safetensors_file_is_named(own_base, content):
    (own_base / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="model.safetensors is not a complete safetensors file"):
        identity.base_facts(str(own_base))


def test_sharded_files_are_read_too(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    base = BaseWeights(str(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(base.get(name, torch.float32), model.state_dict()[name])
    assert base.get("absent", torch.float32) is None
    tiny.model().save_pretrained(tmp_path / "one")
    one = BaseWeights(str(tmp_path / "one"))
    assert torch.equal(one.get(name, torch.float32), load_file(tmp_path / "one" / "model.safetensors")[name])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        BaseWeights(str(tmp_path / "empty"))
