"""A stand-in for the Hugging Face hub: one repository in a folder, behind the real client's signatures."""

import inspect
import shutil
from collections import Counter
from hashlib import sha256
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

    def file_system(self):
        """A real HfFileSystem on this hub; downloads, which it makes without HfApi, are copies."""
        from huggingface_hub import HfFileSystem

        made = HfFileSystem(token="none", skip_instance_cache=True)
        made._api = self

        def local(path):
            made.info(path)
            self.calls["download"] += 1
            return self.folder / "/".join(path.split("/")[2:])

        made.cat_file = lambda path: local(path).read_bytes()
        made.get_file = lambda path, target: shutil.copy(local(path), target)
        return made

    def _list_repo_tree(self, repository, path, *, recursive, expand, revision, repo_type):
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        if not (self.folder / path).is_dir():
            raise RemoteEntryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        for file in sorted((self.folder / path).iterdir()):
            digest = sha256(file.read_bytes()).hexdigest()
            size, name = file.stat().st_size, file.relative_to(self.folder).as_posix()
            lfs = {"size": size, "oid": digest, "pointerSize": 1} if file.suffix == ".tar" else None
            yield RepoFile(path=name, size=size, oid=digest[:40], lfs=lfs)

    def _upload_file(
        self, *, path_or_fileobj, path_in_repo, repo_id, token, repo_type, revision, commit_message, commit_description
    ):
        target = self.folder / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path_or_fileobj, target)
        self.commits.append(commit_message)

    def _list_repo_commits(self, repository, *, repo_type):
        return [SimpleNamespace(title=title) for title in self.commits]

    def _super_squash_history(self, repository, *, repo_type, commit_message):
        self.commits[:] = [commit_message]

    def _repo_info(self, repository, *, repo_type, revision=None, timeout=None):
        from huggingface_hub.errors import RepositoryNotFoundError

        if not self.folder.exists():
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return SimpleNamespace(private=self.is_private is not False, sha=str(len(self.commits)))

    def _list_repo_files(self, repository, *, repo_type, revision=None):
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

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

    def _create_commit(self, repo_id, operations, *, commit_message, repo_type, **more):
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
