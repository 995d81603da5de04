"""A study kept in a private repository of the Hugging Face hub."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from peftlib.core.files import gib, sealed, write_stream
from peftlib.core.hub_token import hf_token
from peftlib.storage.remotes import Remote, facts_below, require_sound

PUBLIC = "PEFTLIB_MIRROR_PUBLIC"  # environment variable: 1 to copy a study to a repository that everybody can read


def is_public(api, repository, repo_type="model"):
    """Whether everybody can read a repository of the hub; one that does not exist is not public."""
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


class HubRemote(Remote):
    """Archives below a study's folder of a repository; each comes with its listing in one commit.

    repository: 'USER/REPO', made private where it does not exist; a public one is refused unless
    PEFTLIB_MIRROR_PUBLIC=1. Network and hub errors are raised as OSError. api: a huggingface_hub.HfApi, for tests.
    ModelError: no token.
    """

    def __init__(self, repository, study_name, *, api=None):
        self.repository, self.study_name = repository, study_name
        self._api = api
        self._listed = None, {}  # the commit that was listed last, and what it held
        self.notice = (
            f"{self} keeps every version of what is copied, checkpoints too, so it grows with each copy: delete the "
            f"repository when the study is done, or run HfApi().super_squash_history({repository!r}) now and then"
        )

    def __str__(self):
        return f"hf://{self.repository}"

    @property
    def api(self):
        if self._api is None:
            from huggingface_hub import HfApi

            self._api = HfApi(token=hf_token())
        return self._api

    def listing(self):
        """{name: facts} of the archives whose listing is whole; one call while the repository stays as it is."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with as_os_errors(), tempfile.TemporaryDirectory() as folder:
            try:
                commit = self.api.repo_info(self.repository, repo_type="model").sha
            except RepositoryNotFoundError:
                return {}
            if commit != self._listed[0]:
                listings = f"{self.study_name}/*.json"
                place = {"repo_type": "model", "revision": commit, "local_dir": folder}
                self.api.snapshot_download(self.repository, allow_patterns=listings, **place)
                self._listed = commit, facts_below(Path(folder) / self.study_name)
        return dict(self._listed[1])

    def refusal(self):
        with as_os_errors():
            if os.environ.get(PUBLIC, "").strip() == "1" or not is_public(self.api, self.repository):
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
            listing.write_bytes(sealed({**facts, **write_stream(archive, write)}))
            self.api.create_repo(self.repository, repo_type="model", private=True, exist_ok=True)
            refusal = self.refusal()
            if refusal:
                raise OSError(errno.EPERM, refusal)
            files = zip(self._paths(name), (archive, listing), strict=True)
            self._commit([CommitOperationAdd(*map(str, pair)) for pair in files], f"{name}, serial {facts['serial']}")

    def fetch(self, name, facts, target):
        """Download an archive to the local path `target`. OSError: it is not what its listing says."""
        path, _ = self._paths(name)
        with as_os_errors(), tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
            shutil.move(self.api.hf_hub_download(self.repository, path, repo_type="model", local_dir=folder), target)
        require_sound(target, facts, name)

    def drop(self, name):
        """Delete an archive and its listing."""
        from huggingface_hub import CommitOperationDelete

        with as_os_errors():
            self._commit(list(map(CommitOperationDelete, self._paths(name))), f"{name} is no longer needed")

    def free_bytes(self):
        """A large number: the hub names no limit in advance."""
        return 1 << 50

    def remedy(self, error):
        if error.errno == errno.EPERM:
            return "nothing is copied there until then"
        return f"see whether HF_TOKEN may write to {self.repository}, or set PEFTLIB_MIRROR to a folder or to off"

    def _commit(self, operations, what):
        message = f"{self.study_name}: {what}"
        self.api.create_commit(self.repository, operations, commit_message=message, repo_type="model")

    def _paths(self, name):
        return f"{self.study_name}/{name}.tar", f"{self.study_name}/{name}.json"
