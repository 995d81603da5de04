"""Hugging Face hub calls beyond its file system: whether a repository is public, and how to free its space."""

import contextlib
import errno
import re

from peftlib.core.errors import PeftlibError

_OURS = re.compile(r"initial commit$|[\w.-]+: [\w.-]+\.\d|peftlib: |Delete \S+\.(tar|json) $")  # commits made by us


def is_public(api, repository, repo_type="model"):
    """Whether a hub repository is public; a missing one is not."""
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
    """Raise a store library's errors as OSError, the only error that a remote may raise."""
    try:
        yield
    except (OSError, PeftlibError):
        raise
    except Exception as error:  # these libraries' errors have no common class
        said = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(errno.EIO, said[:200]) from error


def squash(api, repository):
    """Free the space of old versions in a repository whose history has only such copies."""
    commits = api.list_repo_commits(repository, repo_type="model")
    if all(_OURS.match(commit.title) for commit in commits):
        message = "peftlib: squash older versions"
        api.super_squash_history(repository, repo_type="model", commit_message=message)
