"""The data card of a study's rows, and the one call that publishes them."""

from pathlib import Path

from peftlib.core.files import write_text
from peftlib.core.markdown import escape
from peftlib.data.shortage import short_line

CARD = "README.md"


def write_card(folder, manifest):
    """Write README.md: provenance, licences, counts, and how the rows were made."""
    write_text(Path(folder) / CARD, card_text(manifest))


def card_text(manifest):
    """The card as Markdown with the hub's YAML header."""
    sources = manifest["sources"]
    header = [
        "---",
        "license: other",
        "license_name: mixed-see-sources",
        "task_categories: [text-generation]",
        "configs:",
        "- config_name: default",
        "  data_files:",
        *(f"  - {{split: {split}, path: {split}.parquet}}" for split in ("train", "valid", "test")),
        "---",
    ]
    lines = [
        "# Rows of a peftlib study",
        "",
        f"Split `{manifest['split_hash']}`. Each source keeps its own licence; using the rows together means keeping to all.",
        "",
        "| source | rows come from | revision or SHA-256 | licence | train | valid | test |",
        "|---|---|---|---|---|---|---|",
        *(_source_line(name, facts, manifest["counts"]) for name, facts in sources.items()),
        "",
        "## What was rejected and converted",
        "",
        "| source | read | rejected | conversions of kept rows | not needed |",
        "|---|---|---|---|---|",
        *(_counts_line(name, manifest) for name in sources),
        "",
        *(f"- {escape(short_line(name, splits))}." for name, splits in manifest["short"].items()),
        *(_ignored_line(name, found) for name, found in manifest["ignored_fields"].items() if found),
        *(f"- `{name}`: {text}" for group in manifest["meaning"].values() for name, text in group.items()),
        "",
        *_how(manifest),
    ]
    return "\n".join([*header, *lines]) + "\n"


def _source_line(name, facts, counts):
    where = escape("; ".join(facts["where"].values()))
    identity = facts.get("revision") or ", ".join(str(digest)[:16] for digest in facts["sha256"].values())
    numbers = " | ".join(f"{counts[split][name]:,}" for split in ("train", "valid", "test"))
    return f"| {escape(name)} | {where} | `{identity}` | {facts['license']} | {numbers} |"


def _counts_line(name, manifest):
    cells = [
        ", ".join(f"{key} {n:,}" for key, n in manifest[column][name].items()) or "none"
        for column in ("rejected", "conversions")
    ]
    read, unused = manifest["read"][name], manifest["unused"][name]
    return f"| {escape(name)} | {read:,} | {cells[0]} | {cells[1]} | {unused:,} |"


def _ignored_line(name, found):
    fields = ", ".join(f"{escape(field)} ({n:,} rows)" for field, n in found.items())
    return f"- {escape(name)}: fields that were not used: {fields}."


def _how(manifest):
    inputs, near = manifest["inputs"], manifest["near_duplicate"]
    chosen = (
        f"Rows are taken in the order of a hash of their content and the split seed {inputs['split_seed']}. A test "
        "row's scored reply is its last assistant turn, given the true history; training scores every assistant turn "
        "(but for those given a weight of 0) and its end of turn. No test prompt (all that stands before the scored "
        "reply; white space, case, kinds of quotes and their order with stops aside) is a prompt in train or valid, and "
        f"no two rows share {near['jaccard_at_least']:.0%} or more (Jaccard) of their word {near['words_a_gram']}-grams. "
        f"Conversations are cut after whole turns to {inputs['max_length']} tokens."
    )
    encoded = (
        f"`input_ids` and `is_scored` are for the tokenizer.json with SHA-256 `{manifest['tokenizer_sha256']}` and Gemma "
        f"3's chat template with SHA-256 `{manifest['template_sha256']}`."
    )
    return ["## How the rows were chosen", "", chosen, "", encoded]


def push_to_hub(folder, repo_id, *, token=None, private=True):
    """Publish a data folder as the data set `repo_id` on the Hugging Face hub; returns its address.

    Mind the licences on the card first: Alpaca's, for one, allows no commercial use. token: None takes
    hub_token.hf_token().
    private: False publishes them to everybody; a repository that is public already is refused without it.
    StudyError: the folder is not finished. ModelError: there is no token, or the repository is public.
    """
    from huggingface_hub import HfApi

    from peftlib.core.errors import ModelError, StudyError
    from peftlib.core.hub_token import hf_token
    from peftlib.data.store import MANIFEST
    from peftlib.storage.hub import is_public

    if not (Path(folder) / MANIFEST).exists():
        raise StudyError(f"no {MANIFEST} in {folder}: run 01_data first")
    api = HfApi(token=token or hf_token())
    address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    if private and is_public(api, repo_id, "dataset"):
        raise ModelError(
            f"{repo_id} is public on the hub: make it private there, choose another name, or say private=False to publish "
            "the rows to everybody"
        )
    api.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=folder, allow_patterns=["*.parquet", "*.json", CARD]
    )
    return str(address)
