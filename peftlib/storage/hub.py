"""What a repository of the Hugging Face hub needs beside its file system: who can read it, and how space is freed."""

import contextlib
import errno
import re

from peftlib.core.errors import PeftlibError

_OURS = re.compile(r"initial commit$|[\w.-]+: [\w.-]+\.\d|peftlib: |Delete \S+\.(tar|json) $")  # commits made by us


def is_public(api, repository, repo_type="model"):
    """Whether everybody can read a repository of the hub; one that does not exist is not public."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        if repo_type == "bucket":
            return not api.bucket_info(repository).private
        return not api.repo_info(repository, repo_type=repo_type).private
    except RepositoryNotFoundError:
        return False
    except HfHubHTTPError as error:
        if repo_type == "bucket" and error.response.status_code == 404:
            return False
        raise


@contextlib.contextmanager
def as_os_errors():
    """Raise what a store's library raises as OSError, which is all that a remote may raise."""
    try:
        yield
    except (OSError, PeftlibError):
        raise
    except Exception as error:  # these libraries' errors have no class in common
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(errno.EIO, said[:200]) from error


def squash(api, repository):
    """Free the space of old versions in a repository whose history is of such copies alone."""
    commits = api.list_repo_commits(repository, repo_type="model")
    if all(_OURS.match(commit.title) for commit in commits):
        message = "peftlib: squash older versions"
        api.super_squash_history(repository, repo_type="model", commit_message=message)
