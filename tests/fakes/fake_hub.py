"""A stand-in for the Hugging Face hub: one repository in a folder, behind the real client's signatures."""

import inspect
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace


class FakeHub:
    """What peftlib calls of huggingface_hub.HfApi, on a folder; each call has to fit the real signature.

    is_down: calls fail as without a network. commits: messages. is_private: as create_repo was told, None before it.
    calls: {name: how often}.
    """

    def __init__(self, folder):
        self.folder, self.is_down = Path(folder), False
        self.commits, self.is_private, self.calls = [], None, Counter()

    def __getattr__(self, name):
        from huggingface_hub import HfApi

        signature, ours = inspect.signature(getattr(HfApi, name)), getattr(self, f"_{name}")

        def call(*args, **named):
            signature.bind(None, *args, **named)
            self.calls[name] += 1
            if self.is_down:
                raise _http_error()("the network is unreachable")
            return ours(*args, **named)

        return call

    def _repo_info(self, repository, *, repo_type):
        from huggingface_hub.errors import RepositoryNotFoundError

        if not self.folder.exists():
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return SimpleNamespace(private=self.is_private is not False, sha=str(len(self.commits)))

    def _list_repo_files(self, repository, *, repo_type, revision=None):
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def _snapshot_download(self, repository, *, repo_type, revision, allow_patterns, local_dir):
        for path in self.folder.glob(allow_patterns):
            self._hf_hub_download(repository, path.relative_to(self.folder), repo_type=repo_type, local_dir=local_dir)

    def _repo_exists(self, repository, *, repo_type):
        return self.folder.exists()

    def _create_repo(self, repository, *, repo_type, private, exist_ok):
        assert exist_ok
        self.is_private = private if self.is_private is None else self.is_private
        self.folder.mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repository}"

    def _upload_folder(self, *, repo_id, repo_type, folder_path, commit_message, delete_patterns):
        assert delete_patterns == "*"
        for path in self.folder.iterdir():  # as the hub's client does, which spares this one file
            if path.name != ".gitattributes":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        self.commits.append(commit_message)

    def _create_commit(self, repository, operations, *, commit_message, repo_type):
        self.commits.append(commit_message)
        for operation in operations:
            target = self.folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            if hasattr(operation, "path_or_fileobj"):
                shutil.copy(operation.path_or_fileobj, target)
            else:
                target.unlink()

    def _hf_hub_download(self, repository, path, *, repo_type, local_dir, revision=None):
        target = Path(local_dir) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.folder / path, target)


def _http_error():
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]
