"""A stand-in for the package trackio, with the signatures of its release 0.43; what it is told is in `runs`."""

runs = {}  # (project, name) -> [(step, metrics), ...]
_open = None


def init(
    project: str,
    name: str | None = None,
    group: str | None = None,
    space_id: str | None = None,
    server_url: str | None = None,
    dataset_id: str | None = None,
    bucket_id: str | None = None,
    config: dict | None = None,
    resume: str = "never",
    settings=None,
    private: bool | None = None,
    embed: bool = True,
    auto_log_gpu: bool | None = None,
    gpu_log_interval: float = 10.0,
    auto_log_cpu: bool | None = None,
    cpu_log_interval: float = 10.0,
    webhook_url: str | None = None,
    webhook_min_level=None,
):
    global _open
    _open = (project, name)
    if resume == "never":
        runs[_open] = []
    runs.setdefault(_open, [])


def log(metrics: dict, step: int | None = None) -> None:
    if _open is None:
        raise RuntimeError("Call trackio.init() before trackio.log().")
    runs[_open].append((step, metrics))


def finish():
    global _open
    _open = None
