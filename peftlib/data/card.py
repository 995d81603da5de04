"""The data card of a study's rows, and the function that publishes them."""

from pathlib import Path

import jinja2

from peftlib.core.errors import ModelError, StudyError
from peftlib.core.files import MANIFEST, write_text
from peftlib.core.hub_token import hf_token
from peftlib.core.markdown import escape
from peftlib.data.outcomes import shortfall_line
from peftlib.storage.hub import is_public

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_card(folder, manifest):
    """Write README.md with the hub's YAML header: provenance, licences, counts, and how the rows were made."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"md": escape, "n": "{:,}".format, "listed": _listed, "identity": _identity}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(manifest, splits=("train", "valid", "test"), shortfall_line=shortfall_line)
    write_text(Path(folder) / CARD, text)


def _listed(counts):
    return ", ".join(f"{key} {n:,}" for key, n in counts.items()) or "none"


def _identity(facts):
    return facts.get("revision") or ", ".join(str(digest)[:16] for digest in facts["sha256"].values())


def push_to_hub(folder, repo_id, *, token=None, private=True):
    """Publish a data folder as the dataset `repo_id` on the Hugging Face hub; returns its URL.

    Check the licences on the card first: Alpaca's, for example, forbids commercial use. token: None uses
    hub_token.hf_token(). private: False publishes the rows to everyone; otherwise a public repository is refused.
    StudyError: the folder is not finished. ModelError: there is no token, or the repository is public.
    """
    from huggingface_hub import HfApi

    if not (Path(folder) / MANIFEST).exists():
        raise StudyError(f"no {MANIFEST} in {folder}: run 01_data first")
    api = HfApi(token=token or hf_token())
    address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    if private and is_public(api, repo_id, "dataset"):
        raise ModelError(
            f"{repo_id} is public on the hub: make it private there, choose another name, or pass private=False to "
            "publish the rows to everyone"
        )
    api.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=folder, allow_patterns=["*.parquet", "*.json", CARD]
    )
    return str(address)


def summary(manifest):
    """Counts, rejects and conversions of a manifest as lines of text."""
    lines = [f"split {manifest['split_hash']}"]
    for name in manifest["sources"]:
        counts = ", ".join(f"{split} {manifest['counts'][split][name]:,}" for split in ("train", "valid", "test"))
        lines.append(f"{name}: {counts}; read {manifest['read'][name]:,}, not needed {manifest['unused'][name]:,}")
        for kind in ("rejected", "conversions"):
            named = ", ".join(f"{key} {n:,}" for key, n in manifest[kind][name].items())
            lines.append(f"  {kind}: {named or 'none'}")
    return "\n".join(lines)
