"""Targets of an export: a folder or a Hugging Face hub repository. Other content in them is never overwritten."""

import contextlib
import tempfile
from pathlib import Path

from peftlib.core.errors import ConfigError, ModelError, StudyError
from peftlib.core.files import read_json
from peftlib.core.hub_token import hf_token
from peftlib.storage.hub import as_os_errors, is_public
from peftlib.storage.workspace import Workspace

MARKER = "study/export.json"  # names the run, the form and the files of an export
_SCHEME = "hf://"
_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md"}


def target_of(to, *, private=True, api=None):
    """The FolderTarget or HubTarget of a folder or hf://USER/REPO. ConfigError: not a valid repository name."""
    text = str(to)
    return HubTarget(text, private=private, api=api) if text.startswith(_SCHEME) else FolderTarget(to)


class FolderTarget:
    """A folder, written under another name next to it and then renamed."""

    repository = None

    def __init__(self, path):
        self.path = Path(path).expanduser()

    def __str__(self):
        return str(self.path)

    def require_free(self, identity):
        """ModelError: the path contains anything other than an export of this run in this form."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            return
        if self.path.exists() or self.path.is_symlink():
            _require_same(self, _read_marker(self.path / MARKER), identity)
            listed = read_json(self.path / MARKER)["files"]
            there = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir()}
            foreign = sorted(there - set(listed))
            if foreign:
                raise ModelError(f"{self} also contains {foreign[0]}, which is not from an export: move it away first")

    def workspace(self, what, *, is_dry=False, log=print):
        """Context manager: a folder next to the path, removed after the block.

        LockedError: another process is exporting to the same path.
        """
        if is_dry:
            return _scratch(self.path.parent if self.path.parent.is_dir() else None)
        self._workspace = Workspace(self.path, what, log=log)
        return self._workspace

    def put(self, folder, message):
        """Move the workspace's folder to the path; returns the path as text."""
        self._workspace.replace()
        return str(self.path)


class HubTarget:
    """A model repository, created if it does not exist. api: a huggingface_hub.HfApi; None makes one."""

    def __init__(self, text, *, private, api=None):
        from huggingface_hub.utils import validate_repo_id

        self.repository = text.removeprefix(_SCHEME)
        self._private, self._api = private, api
        try:
            validate_repo_id(self.repository)
            why = "" if self.repository.count("/") == 1 else "it needs one user and one repository name"
        except ValueError as error:
            why = str(error)
        if why:
            raise ConfigError(f"to={text!r}: use hf://USER/REPO ({why})")

    def __str__(self):
        return _SCHEME + self.repository

    @property
    def api(self):
        if self._api is None:
            from huggingface_hub import HfApi

            self._api = HfApi(token=hf_token())
        return self._api

    def require_free(self, identity):
        """ModelError: it is public, contains anything but an export of this run in this form, or access fails."""
        with self._explained():
            if not self.api.repo_exists(self.repository, repo_type="model"):
                return
            self._require_private()
            files = set(self.api.list_repo_files(self.repository, repo_type="model"))
            if files <= _OF_A_NEW_REPOSITORY:
                return
            found = None
            if MARKER in files:
                with tempfile.TemporaryDirectory() as folder:
                    path = self.api.hf_hub_download(self.repository, MARKER, repo_type="model", local_dir=folder)
                    found = _read_marker(path)
        _require_same(self, found, identity)

    def workspace(self, what, *, is_dry=False, log=print):
        """Context manager: a temporary folder."""
        return _scratch()

    def put(self, folder, message):
        """Upload a folder in one commit that replaces an earlier export; returns the repository's URL."""
        with self._explained():
            url = self.api.create_repo(self.repository, repo_type="model", private=self._private, exist_ok=True)
            self._require_private()
            where = {"repo_id": self.repository, "repo_type": "model"}
            self.api.upload_folder(**where, folder_path=folder, commit_message=message, delete_patterns="*")
        return str(url)

    def _require_private(self):
        # create_repo does not change an existing repository
        if self._private and is_public(self.api, self.repository):
            raise ModelError(
                f"{self} is public, so anyone could read the export: make it private in its settings on the hub, "
                "choose another place, or use --public (private=False) if you intend that"
            )

    @contextlib.contextmanager
    def _explained(self):
        try:
            with as_os_errors():
                yield
        except OSError as error:
            said = str(error.strerror or error).strip().split("\n")[0][:200]
            raise ModelError(f"{self}: {said}. Check that HF_TOKEN may write there, and the network") from error


@contextlib.contextmanager
def _scratch(folder=None):
    with tempfile.TemporaryDirectory(prefix="peftlib-export-", dir=folder) as made:
        yield Path(made)


def _read_marker(path):
    """The identity that an export wrote, or None."""
    try:
        return read_json(path)
    except (OSError, StudyError):
        return None


def _require_same(target, found, identity):
    if found is None:
        raise ModelError(f"{target} already exists and is not a peftlib export: choose another place")
    if {name: found.get(name) for name in identity} != identity:
        raise ModelError(
            f"{target} holds another export ({found.get('method')}, seed {found.get('seed')}, {found.get('form')}, run "
            f"{found.get('run_hash')}): choose another place, or delete it"
        )
