"""Which place a study is copied to: Drive, the hub, a folder, or none."""

import shutil
import sys

import pytest
from fake_hub import FakeHub
from kept_study import newest, save

from peftlib.core.errors import ConfigError
from peftlib.storage import mirror
from peftlib.storage import remotes as storage
from peftlib.storage.mirror import Mirror
from peftlib.storage.store import Remote


def test_which_remote(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "DRIVE", tmp_path / "drive")
    monkeypatch.delenv("PEFTLIB_MIRROR", raising=False)
    assert storage.remote_of("s") is None
    (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    assert str(storage.remote_of("s")) == "Google Drive"
    monkeypatch.setenv("PEFTLIB_MIRROR", "off")
    assert storage.remote_of("s") is None
    monkeypatch.setenv("PEFTLIB_MIRROR", str(tmp_path / "disk"))
    assert storage.remote_of("s").folder == tmp_path / "disk" / "s"
    monkeypatch.setenv("PEFTLIB_MIRROR", "hf://me/runs")
    assert str(storage.remote_of("s")) == "hf://me/runs"
    monkeypatch.setenv("PEFTLIB_MIRROR", "hf://me")
    with pytest.raises(ConfigError, match="use hf://USER/REPO"):
        storage.remote_of("s")


def test_a_study_is_not_copied_into_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_MIRROR", str(tmp_path))
    with pytest.raises(ConfigError, match="the study's own folder"):
        mirror.restore(tmp_path / "study")


def hub_remote(hub):
    return Remote("hf://me/runs", "study", fs=hub.file_system(), api=hub)


def test_a_hub_repository_serves_as_well(study, tmp_path, lines):
    hub = FakeHub(tmp_path / "hub")
    remote = hub_remote(hub)
    ours = Mirror(study, remote, log=lines.append, every_s=0.01)
    hub.is_down = True
    ours.restore()
    assert not ours.flush(20) and "HF_TOKEN may write to hf://me/runs" in lines[-1]
    hub.is_down = False
    assert ours.flush(20) and hub.is_private
    again = Mirror(tmp_path / "elsewhere", remote, log=lines.append)
    again.restore()
    assert newest(again.folder) == 3
    remote.drop("data.0")
    assert "data.0" not in remote.listing()


def test_an_idle_mirror_asks_the_hub_nothing_and_an_unchanged_one_is_listed_by_one_call(study, tmp_path):
    hub = FakeHub(tmp_path / "hub")
    ours = Mirror(study, hub_remote(hub))
    assert ours.flush(20)
    ours.copy_once()
    before = hub.calls.copy()
    for _ in range(5):
        ours.copy_once()
    assert hub.calls == before
    first, again = ours.remote.listing(), ours.remote.listing()
    units = ("data", "weights-galore-s0", "checkpoint-qlora-s0", "study", "run-base-s0", "sweep-qlora")
    assert first == again and set(first) == {f"{unit}.0" for unit in units}
    assert hub.calls - before == {"list_repo_tree": 2}
    ours._look_at = 0.0  # five minutes later
    ours.copy_once()
    assert hub.calls - before == {"list_repo_tree": 3}


def test_a_public_repository_is_refused_unless_said(study, tmp_path, monkeypatch, lines):
    hub = FakeHub(tmp_path / "hub")
    hub._create_repo("me/runs", repo_type="model", private=False, exist_ok=True)
    remote = hub_remote(hub)
    ours = Mirror(study, remote, log=lines.append, every_s=0.01)
    assert not ours.flush(20) and not hub.commits
    assert "hf://me/runs is public" in lines[0] and "PEFTLIB_MIRROR_PUBLIC=1" in lines[0]
    monkeypatch.setattr(mirror, "remote_of", lambda name: remote)
    with pytest.raises(ConfigError, match="is public.*make it private"):
        mirror.restore(study)
    hub.is_down = True
    assert mirror.restore(study, log=lines.append)  # not to be asked: work goes on, and nothing is copied
    hub.is_down = False
    monkeypatch.setenv("PEFTLIB_MIRROR_PUBLIC", "1")
    assert mirror.restore(study).flush(20) and hub.commits


def test_a_repository_that_keeps_every_version_is_said_when_copying_starts(study, tmp_path, monkeypatch, lines):
    monkeypatch.setattr(mirror, "_RUNNING", {})
    monkeypatch.setattr(mirror, "remote_of", lambda name: hub_remote(FakeHub(tmp_path / "hub")))
    mirror.open_mirror(study, log=lines.append)._is_over.set()
    mirror.open_mirror(study, log=lines.append)
    assert len(lines) == 1 and "squashes its history" in lines[0]


def test_old_versions_are_squashed_out_of_a_repository_of_copies_alone(study, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    assert Mirror(study, hub_remote(hub)).flush(20) and hub.commits == ["peftlib: squash older versions"]
    monkeypatch.setattr("peftlib.storage.store._SQUASH_BYTES", 20_000)
    for step in range(4, 9):
        save(study, step)
        Mirror(study, hub_remote(hub)).copy_once(is_last=True)
        assert len(hub.commits) <= 3
    hub.commits.append("Upload README.md with huggingface_hub")
    save(study, 9)
    assert Mirror(study, hub_remote(hub)).flush(20) and len(hub.commits) > 3


@pytest.mark.parametrize(
    "named, match",
    [
        ("s3://", "s3://BUCKET"),
        ("odd://x", "use a folder, hf://USER/REPO, s3://BUCKET or gs://BUCKET"),
        ("ftp://x/y", "use a folder, hf://USER/REPO, s3://BUCKET or gs://BUCKET"),
        ("gs://bucket", "pip install gcsfs"),
        ("hf://buckets/me", "hf://buckets/USER/BUCKET"),
    ],
)
def test_a_place_that_cannot_be_opened_is_named_with_the_way_out(named, match, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=match):
        Remote(named, "study")


def test_a_command_finds_a_study_on_its_remote_and_leaves_what_it_makes_there(
    study, remote, tmp_path, monkeypatch, capsys
):
    from peftlib import cli as command_line
    from peftlib.core.config import resolve
    from peftlib.core.study import Study

    monkeypatch.setattr(mirror, "_RUNNING", {})
    monkeypatch.setenv("PEFTLIB_MIRROR", str(remote.folder.parent / "copies"))
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "first"))
    shutil.copytree(study, tmp_path / "first" / "mine")
    (tmp_path / "first" / "mine" / "config.json").unlink()
    Study(tmp_path / "first" / "mine", resolve("demo", study="mine")).freeze()
    assert Mirror(tmp_path / "first" / "mine", storage.remote_of("mine")).flush(20)
    monkeypatch.setenv("PEFTLIB_ROOT", str(tmp_path / "second"))

    def work(args):
        found = mirror.open_study("mine")
        (found.folder / "records" / "new.json").write_text("{}")

    monkeypatch.setattr("peftlib.runner.console.call", lambda app, argv: work(argv))
    command_line.main(["report", "--study", "mine"])
    assert "the whole study is on" in capsys.readouterr().err
    third = Mirror(tmp_path / "third" / "mine", storage.remote_of("mine"))
    third.restore()
    assert (third.folder / "records" / "new.json").exists() and newest(third.folder) == 3
