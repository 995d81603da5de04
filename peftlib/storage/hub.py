"""A study kept in a private repository of the Hugging Face hub: the interface of remotes.FolderRemote."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from peftlib.core.errors import StudyError
from peftlib.core.files import fault_of, gib, read_json, sealed, write_stream
from peftlib.core.hub_token import hf_token
from peftlib.core.json_reading import require_shape
from peftlib.storage.archive import LISTED

PUBLIC = "PEFTLIB_MIRROR_PUBLIC"  # environment variable: 1 to copy a study to a repository that everybody can read


def is_public(api, repository, repo_type="model"):
    """Whether everybody can read a repository of the hub; one that does not exist is not public. Errors: as the
    hub's."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return not api.repo_info(repository, repo_type=repo_type).private
    except RepositoryNotFoundError:
        return False


@contextlib.contextmanager
def as_os_errors():
    """Raise the network's errors as OSError, which is what a remote may raise; the hub's own are that already."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError.__bases__ as error:  # of the HTTP library that this huggingface_hub uses
        if isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, str(error).strip().split("\n")[0][:200]) from error


class HubRemote:
    """Archives NAME.tar with their listings NAME.json below a study's folder of a repository.

    repository: 'USER/REPO', made private where it does not exist; a public one is refused unless
    PEFTLIB_MIRROR_PUBLIC=1. Both files come in one commit. Network and hub errors are raised as OSError. api: a
    huggingface_hub.HfApi, for tests. ModelError: no token.
    """

    has_locks = False  # a commit for each heartbeat would be a commit a minute
    is_drive = False
    doubt = ""  # a commit is there when its call returns

    def __init__(self, repository, study_name, *, api=None):
        self.repository, self.study_name = repository, study_name
        self._api = api
        self._listed = None, {}  # the commit that was listed last, and what it held

    def __str__(self):
        return f"hf://{self.repository}"

    @property
    def api(self):
        if self._api is None:
            from huggingface_hub import HfApi

            self._api = HfApi(token=hf_token())
        return self._api

    @property
    def notice(self):
        """What a person should know about this place when copying starts."""
        return (
            f"{self} keeps every version of what is copied, checkpoints too, so it grows with each copy: delete the "
            f"repository when the study is done, or run HfApi().super_squash_history({self.repository!r}) now and then"
        )

    def listing(self):
        """{name: facts} of the archives whose listing is whole; one call while the repository stays as it is."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with as_os_errors():
            try:
                commit = self.api.repo_info(self.repository, repo_type="model").sha
            except RepositoryNotFoundError:
                return {}
            if commit != self._listed[0]:
                self._listed = commit, self._read_listing(commit)
        return dict(self._listed[1])

    def _read_listing(self, commit):
        found, at = {}, {"repo_type": "model", "revision": commit}
        with tempfile.TemporaryDirectory() as folder:
            for path in self.api.list_repo_files(self.repository, **at):
                if path.startswith(f"{self.study_name}/") and path.endswith(".json"):
                    local = self.api.hf_hub_download(self.repository, path, local_dir=folder, **at)
                    with contextlib.suppress(StudyError):
                        found[Path(path).stem] = require_shape(read_json(local, is_sealed=True), LISTED, path)
        return found

    def refusal(self):
        """Why a study should not be copied there, in words, or None. OSError: it cannot be asked."""
        if os.environ.get(PUBLIC, "").strip() == "1":
            return None
        with as_os_errors():
            if not is_public(self.api, self.repository):
                return None
        return (
            f"{self} is public, so everybody could read the study's rows, answers and weights: make it private in its "
            f"settings on the hub, name another place in PEFTLIB_MIRROR, or set {PUBLIC}=1 if that is meant"
        )

    def put(self, name, write, needed_bytes, facts):
        """Upload an archive written by write(writer), with its listing. OSError: disk, network or hub."""
        from huggingface_hub import CommitOperationAdd

        with as_os_errors(), tempfile.TemporaryDirectory() as folder:
            if shutil.disk_usage(folder).free < needed_bytes:
                raise OSError(errno.ENOSPC, f"{name} takes {gib(needed_bytes):.2f} GiB of {folder}")
            archive, listing = Path(folder) / "archive", Path(folder) / "listing"
            made = write_stream(archive, write)
            listing.write_bytes(sealed({**facts, **made}))
            self.api.create_repo(self.repository, repo_type="model", private=True, exist_ok=True)
            refusal = self.refusal()
            if refusal:
                raise OSError(errno.EPERM, refusal)
            files = {f"{name}.tar": archive, f"{name}.json": listing}
            adds = [CommitOperationAdd(self._path(remote), str(local)) for remote, local in files.items()]
            self._commit(adds, f"{name}, serial {facts['serial']}")

    def fetch(self, name, facts, target):
        """Download an archive to the local path `target`. OSError: it is not what its listing says."""
        with as_os_errors(), tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
            path = self._path(f"{name}.tar")
            shutil.move(self.api.hf_hub_download(self.repository, path, repo_type="model", local_dir=folder), target)
        fault = fault_of(target, facts)
        if fault:
            raise OSError(errno.EIO, f"{name}: {fault}")

    def drop(self, name):
        """Delete an archive and its listing."""
        from huggingface_hub import CommitOperationDelete

        with as_os_errors():
            deletes = [CommitOperationDelete(self._path(f"{name}.{ending}")) for ending in ("tar", "json")]
            self._commit(deletes, f"{name} is no longer needed")

    def free_bytes(self):
        """A large number: the hub names no limit in advance."""
        return 1 << 50

    def reconnect(self):
        """Do nothing: each call is a connection of its own."""

    def flush(self):
        """Do nothing: no upload is left or in doubt."""
        return self.doubt

    def remedy(self, error):
        """What a person can do about an error, in words."""
        if error.errno == errno.EPERM:
            return "nothing is copied there until then"
        return f"see whether HF_TOKEN may write to {self.repository}, or set PEFTLIB_MIRROR to a folder or to off"

    def _commit(self, operations, what):
        message = f"{self.study_name}: {what}"
        self.api.create_commit(self.repository, operations, commit_message=message, repo_type="model")

    def _path(self, name):
        return f"{self.study_name}/{name}"
