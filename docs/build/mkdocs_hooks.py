"""Lets pages link to the rest of the repository by relative paths, as they do on GitHub.

Pictures of results/ become part of the site, and so does the results page of the reference study, which a page links
to by the comment RESULTS_PAGE; a link to any other file outside docs/ leads to the repository.
"""

import logging
import re
import tempfile
import tomllib
from pathlib import Path

from mkdocs.structure.files import File

from peftlib.report.site.build import build_site

CHECKOUT = Path(__file__).resolve().parents[2]
BRANCH = "main"
RESULTS_PAGE = "<!-- results page -->"  # a page that GitHub does not have
_LINK_TO_PAGE = (
    "[Look at these results yourself: filter the runs, switch the charts, plan for your GPU](results-page/index.html)."
)
_made = tempfile.TemporaryDirectory(prefix="peftlib-docs-")
_log = logging.getLogger("mkdocs.hooks.links")  # a warning fails a strict build
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)((?:#[^)\s]*)?)\)")  # [text](../PATH#part)


def on_config(config):
    """Take the repository's address from pyproject.toml."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url = project["urls"]["Repository"]
    return config


def on_files(files, config):
    """Add the pictures of results/ and the reference study's page."""
    for path in sorted((CHECKOUT / "results").rglob("*.png")):
        place = path.relative_to(CHECKOUT).as_posix()
        files.append(File(place, str(CHECKOUT), config.site_dir, config.use_directory_urls))
    folder = build_site([CHECKOUT / "results" / "reference"], Path(_made.name) / "results-page").parent
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = path.relative_to(_made.name).as_posix()
        files.append(File(place, _made.name, config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links that leave docs/, with a warning for one that leads to no file of the repository."""

    def turned(found):
        place, part = found.groups()
        if not (CHECKOUT / place).exists():
            _log.warning("docs/%s links to %s, which does not exist", page.file.src_uri, place)
        if place.endswith(".png"):
            return f"]({place})"
        return f"]({config.repo_url.rstrip('/')}/blob/{BRANCH}/{place}{part})"

    return _LINK.sub(turned, markdown.replace(RESULTS_PAGE, _LINK_TO_PAGE))
