"""Files of benchmarks."""

import pytest
from benchmark_rows import ARC, BOOLQ, written


@pytest.fixture
def files(tmp_path):
    """Two tasks as llm-foundry renders them."""
    folder = written(tmp_path / "eval", "arc_easy.jsonl", ARC[0])
    return written(folder, "boolq.jsonl", BOOLQ[0])
