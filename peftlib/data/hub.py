"""The study's three sources on the Hugging Face hub, streamed at pinned revisions: nothing is kept on disk."""

from dataclasses import dataclass

from peftlib.core.errors import DataError
from peftlib.data.outcomes import Broken


@dataclass(frozen=True)
class HubSource:
    """A data set at one revision. test_split: '' where it has none of its own."""

    id: str
    revision: str
    split: str
    test_split: str
    license: str

    def label(self, stream):
        return f"{self.id} {self.test_split if stream == 'test' else self.split} at {self.revision[:12]}"


HUB = {
    "alpaca": HubSource("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "train", "", "CC BY-NC 4.0"),
    "tulu": HubSource(
        "allenai/tulu-v2-sft-mixture", "6248b175d2ccb5ec7c4aeb22e6d8ee3b21b2c752", "train", "", "ODC-BY 1.0"
    ),
    "ultrachat": HubSource(
        "HuggingFaceH4/ultrachat_200k", "8049631c405ae6576f93f445c6b8166f76f5505a", "train_sft", "test_sft", "MIT"
    ),
}


def hub_rows(name, stream):
    """Yields (row number from 1, row) of a source. DataError: the hub cannot be reached, or reading broke off."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    source, number = HUB[name], 0
    split = source.test_split if stream == "test" else source.split
    try:
        rows = load_dataset(source.id, revision=source.revision, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield number, row if isinstance(row, dict) else Broken("not_an_object", ascii(row)[:200])
    except (OSError, DatasetsError, *_http_errors(HfHubHTTPError)) as error:
        raise DataError(
            f"{source.label(stream)} could not be read from the hub after row {number} ({_first_line(error)}): "
            f"check the network and run again, or give a file of your own: sources = '{name}=FILE; ...'"
        ) from error


def _http_errors(hub_error):
    """The hub client's own error and the base of its HTTP library's, which depends on the client's version."""
    return [hub_error, *(base for base in hub_error.__mro__ if base.__name__ in ("HTTPError", "RequestException"))]


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
