"""docs/cluster.md: its YAML has the keys that SkyPilot documents."""

import re

import update
import yaml

# Of https://docs.skypilot.co/en/latest/reference/yaml-spec.html (0.14.1), those that a job of ours may have.
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
RESOURCES = {"infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "image_id", "any_of", "job_recovery"}


def test_the_skypilot_job_has_known_keys():
    page = (update.CHECKOUT / "docs" / "cluster.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    job = yaml.safe_load(text)
    assert set(job) <= TASK and set(job["resources"]) <= RESOURCES
    assert set(job["resources"]["job_recovery"]) <= {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    assert re.fullmatch(r"[A-Z0-9-]+:\d+", job["resources"]["accelerators"])
    assert all(isinstance(job[name], str) for name in ("name", "workdir", "setup", "run"))
