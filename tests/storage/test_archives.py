"""Archives and sealed files of a remote that are damaged, older or of something else."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from kept_study import newest, save

from peftlib.core import files
from peftlib.storage import archive
from peftlib.storage.mirror import Mirror


def test_a_damaged_copy_is_said_and_the_older_one_taken(study, remote, open_again, lines):
    ours = Mirror(study, remote)
    assert ours.flush(20)
    save(study, 4)
    assert ours.flush(20)
    names = {
        facts["serial"]: name for name, facts in remote.listing().items() if facts["unit"].startswith("checkpoint")
    }
    path = remote.folder / f"{names[2]}.tar"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100).replace(b"\0", b"x"))
    assert newest(open_again().folder) == 3
    assert any("skipped" in line and "SHA-256" in line for line in lines)


def test_an_archive_of_all_small_files_as_older_versions_wrote_it_is_restored(study, remote, open_again):
    files = [path for path in archive._files_below(study) if "records" in str(path) or path.name == "config.json"]
    with archive.pinned(study, files) as pairs:
        facts = {"unit": "study", "serial": 9, "origin": "an older version"}
        remote.put("study.1", lambda out: archive.pack(pairs, out), 100, facts)
    again = open_again()
    assert (again.folder / "records" / "base-s0.json").exists()
    (again.folder / "records" / "base-s0.json").write_text('{"status": "failed"}')
    assert again.flush(20)
    assert "failed" in (open_again("third").folder / "records" / "base-s0.json").read_text()


def test_sealed_files_show_their_damage(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(files.sealed({"a": 1}))
    assert files.read_json(path, is_sealed=True)["a"] == 1
    path.write_bytes(path.read_bytes().replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(files.StudyError, match="SHA-256 differs"):
        files.read_json(path, is_sealed=True)


def _tar(path, *members):
    """A tar of (TarInfo, content) pairs."""
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _member(name, kind=tarfile.REGTYPE, **more):
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in more.items():
        setattr(made, field, value)
    return made


_ODD_MEMBERS = {
    "a place above": _member("../outside"),
    "a place far above": _member("data/../../../outside"),
    "an absolute place": _member("/tmp/peftlib-outside/file"),
    "a link": _member("data/link", tarfile.SYMTYPE, linkname="/etc"),
    "a link inside": _member("data/link", tarfile.SYMTYPE, linkname="other"),
    "a hard link": _member("data/link", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": _member("data/device", tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": _member("data/pipe", tarfile.FIFOTYPE),
    "a time out of range": _member("data/x", mtime=2**62),
    "a name too long": _member("data/" + "n" * 300),
}


_ODD_BYTES = {
    "nothing": b"",
    "text": b"no archive at all\n" * 100,
    "gzip": b"\x1f\x8b\x08\x00garbage" * 100,
    "xz": b"\xfd7zXZ\x00" + b"garbage" * 200,
    "zeros": b"\0" * 3000,
    "odd bytes": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("what", [*_ODD_MEMBERS, *_ODD_BYTES, "cut"])
def test_an_archive_of_something_else_is_said_and_the_study_goes_on(what, study, remote, tmp_path, lines):
    """Nothing gets outside, nothing of it is used, and what is sound still comes."""
    Mirror(study, remote).copy_once(is_last=True)
    name = next(name for name, facts in remote.listing().items() if facts["unit"] == "data")
    crafted = tmp_path / "crafted.tar"
    if what in _ODD_MEMBERS:
        _tar(crafted, (_member("data/train.parquet"), b"other rows"), (_ODD_MEMBERS[what], b""))
    elif what == "cut":
        _tar(crafted, (_member("data/train.parquet"), b"other rows" * 1000))
        crafted.write_bytes(crafted.read_bytes()[:3000])
    else:
        crafted.write_bytes(_ODD_BYTES[what])
    facts = {**remote.listing()[name], "bytes": crafted.stat().st_size, "sha256": files.sha256(crafted)}
    shutil.copyfile(crafted, remote.folder / f"{name}.tar")
    (remote.folder / f"{name}.json").write_bytes(files.sealed(facts))
    here = tmp_path / "other machine" / "study"
    Mirror(here, remote, log=lines.append).restore()
    is_harmless = what in ("a time out of range", "zeros", "nothing")  # tarfile takes them, as empty or at another time
    assert is_harmless or any(f"skipped {name}" in line for line in lines), lines
    assert is_harmless or not (here / "data").exists()
    assert (here / "records" / "base-s0.json").exists() and not (here / ".restoring").exists()
    outside = [tmp_path / "outside", tmp_path / "other machine" / "outside", Path("/tmp/peftlib-outside")]
    assert not any(path.exists() for path in outside) and not any(path.is_symlink() for path in here.rglob("*"))


def test_a_listing_without_its_facts_does_not_count(study, remote):
    Mirror(study, remote).copy_once(is_last=True)
    known = len(remote.listing())
    (remote.folder / "odd.0.json").write_bytes(files.sealed({"unit": "data", "serial": "many"}))
    assert len(remote.listing()) == known
