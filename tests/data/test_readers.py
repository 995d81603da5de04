"""Files of every kind, whole and broken: each bad row named, each bad file an error that says what to do."""

import csv
import gzip
import io
import json

import pytest

from peftlib.core.errors import DataError
from peftlib.data import readers
from peftlib.data.outcomes import Broken
from peftlib.data.readers import read_rows

ROWS = [{"instruction": f"ask {i}", "input": "", "output": f'answer {i}, "quoted"\nand more'} for i in range(7)]


def as_bytes(kind, rows=ROWS):
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=2).encode()
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    import pyarrow
    from pyarrow import parquet

    made = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), made, row_group_size=2)
    return made.getvalue()


def written(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows_of(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_plain_and_gzip_gives_the_same_rows(tmp_path, kind, suffix):
    path = written(tmp_path / f"rows.{kind}{suffix}", as_bytes(kind))
    assert list(read_rows(path)) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_gzip_is_told_by_content_not_by_name(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(gzip.compress(as_bytes(kind)))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path, kind):
    assert rows_of(written(tmp_path / f"rows.{kind}", b"\xef\xbb\xbf" + as_bytes(kind))) == ROWS


def test_json_may_be_json_lines_or_one_object(tmp_path):
    assert rows_of(written(tmp_path / "rows.json", as_bytes("jsonl"))) == ROWS
    assert rows_of(written(tmp_path / "rows.json", json.dumps(ROWS[0], indent=1).encode())) == ROWS[:1]


def test_json_may_hold_any_value_as_a_row(tmp_path):
    mixed = [*ROWS, 12345, "text", None, [], {"a": [1, {"b": "]},["}]}]
    assert rows_of(written(tmp_path / "rows.json", json.dumps(mixed).encode())) == mixed


def test_an_empty_array_holds_no_rows(tmp_path):
    with pytest.raises(DataError, match="has no rows"):
        rows_of(written(tmp_path / "rows.json", b" [ ] "))


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{broken", "not_json"),
        (b'{"a": "' + b"\xff\xfe" + b'"}', "not_utf8"),
        (b"[" * 200_000, "not_json"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "not_json"),
        (b"1" * 5_000, "not_json"),
        (b'{"instruction": "cut he', "not_json"),
    ],
)
def test_a_bad_line_costs_only_itself(tmp_path, line, reason):
    path = written(tmp_path / "rows.jsonl", as_bytes("jsonl") + line + b"\n\n" + as_bytes("jsonl"))
    rows = rows_of(path)
    assert [row for row in rows if not isinstance(row, Broken)] == ROWS + ROWS
    assert [row.reason for row in rows if isinstance(row, Broken)] == [reason]
    assert all(len(row.excerpt) <= 1000 for row in rows if isinstance(row, Broken))


def test_a_line_of_too_many_bytes_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    path = written(tmp_path / "rows.jsonl", as_bytes("jsonl") + b'"' + b"x" * 5000 + b'"\n' + as_bytes("jsonl"))
    rows = rows_of(path)
    assert [getattr(row, "reason", "") for row in rows] == [""] * 7 + ["too_large"] + [""] * 7


def test_million_character_strings_are_read(tmp_path):
    long = {"instruction": "a" * 1_000_000, "input": "", "output": "b" * 1_000_000}
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert rows_of(written(tmp_path / f"rows.{kind}", as_bytes(kind, [long]))) == [long]


def test_ragged_csv_rows_are_named(tmp_path):
    text = "instruction,output\na,b\nonly one\nc,d,e\n\nf,g\n"
    rows = rows_of(written(tmp_path / "rows.csv", text.encode()))
    assert [getattr(row, "reason", row) for row in rows] == [
        {"instruction": "a", "output": "b"},
        "ragged_row",
        "ragged_row",
        {"instruction": "f", "output": "g"},
    ]
    assert "1 fields, the header has 2" in rows[1].excerpt


def test_misplaced_csv_quotes_cost_their_row(tmp_path):
    rows = rows_of(written(tmp_path / "rows.csv", b'instruction,output\n"a"x,b\nc,d\n'))
    assert [getattr(row, "reason", row) for row in rows] == ["bad_csv", {"instruction": "c", "output": "d"}]


def test_a_csv_quote_never_closed_is_an_error_and_no_loss_of_all_rows_behind_it(tmp_path):
    path = written(tmp_path / "rows.csv", b'instruction,output\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match="quote opened on line 3 is never closed"):
        rows_of(path)


def test_a_csv_whose_header_is_broken_is_an_error(tmp_path):
    path = written(tmp_path / "rows.csv", b'instruction,"sa"0\nask,say\n')
    with pytest.raises(DataError, match="first line, the header, is not CSV"):
        rows_of(path)


def test_csv_bytes_that_are_no_utf8_cost_their_row(tmp_path):
    rows = rows_of(written(tmp_path / "rows.csv", b"instruction,output\na\xff,b\nc,d\n"))
    assert [getattr(row, "reason", row) for row in rows] == ["not_utf8", {"instruction": "c", "output": "d"}]
    assert "line 2: ['a\\udcff', 'b']" in rows[0].excerpt


def test_two_columns_of_one_name_are_an_error_that_names_them(tmp_path):
    path = written(tmp_path / "rows.csv", b"instruction,output,Output,output,instruction,id\na,b,c,d,e,1\n")
    with pytest.raises(DataError, match=r"rows.csv has columns of the same name: 'instruction', 'output'. Rename"):
        rows_of(path)
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["output", "output"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet has columns of the same name: 'output'"):
        rows_of(tmp_path / "rows.parquet")


def test_csv_columns_without_a_name_get_their_number(tmp_path):
    rows = rows_of(written(tmp_path / "rows.csv", b",instruction,output,\n0,a,b,\n"))  # as pandas writes its index
    assert rows == [{"column 1": "0", "instruction": "a", "output": "b", "column 4": ""}]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_field_given_twice_costs_its_row(tmp_path, kind):
    twice = '{"instruction": "a", "output": "b", "output": "c"}'
    lines = [json.dumps(ROWS[0]), twice, json.dumps(ROWS[1])]
    text = "\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]"
    rows = rows_of(written(tmp_path / f"rows.{kind}", text.encode()))
    assert [getattr(row, "reason", row) for row in rows] == [ROWS[0], "repeated_field", ROWS[1]]
    assert "'output' is given twice" in rows[1].excerpt


@pytest.mark.parametrize(
    "content, message",
    [
        ("a,b\nc,d\n".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a,b\nc,d\n".encode("utf-16-le"), "UTF-16 text: save it as UTF-8"),
        ("a,b\nc,d\n".encode("utf-16-be"), "UTF-16 text: save it as UTF-8"),
        (b"PK\x03\x04rest", "save the spreadsheet as CSV"),
        (b"\x28\xb5\x2f\xfdrest", "compressed with zstd: unpack it"),
        (gzip.compress(gzip.compress(b"a,b\nc,d\n", mtime=0), mtime=0), "compressed with gzip twice"),
        (as_bytes("parquet"), "Parquet: name it .parquet"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_files_that_hold_something_else_are_named(tmp_path, kind, content, message):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.{kind} is .*{message}"):
        rows_of(path)


def dated_parquet(path, field="seen"):
    """A file whose column `field` holds a time that Python cannot."""
    import pyarrow
    from pyarrow import parquet

    times = pyarrow.array([2**60, 0], pyarrow.timestamp("us"))
    columns = {"instruction": ["a", "b"], "output": ["c", "d"], "notes": ["x", None], "n": [1, 2]}
    parquet.write_table(pyarrow.table({**columns, field: times}), path)
    return path


def test_parquet_columns_that_are_not_wanted_are_not_read(tmp_path):
    path = dated_parquet(tmp_path / "rows.parquet")
    rows = [row for _, row in read_rows(path, ("instruction", "output"))]
    assert rows == [
        {"instruction": "a", "output": "c", "notes": "(not read)", "n": None, "seen": None},
        {"instruction": "b", "output": "d", "notes": "(not read)", "n": None, "seen": None},
    ]


def test_a_parquet_value_that_cannot_be_read_costs_its_row(tmp_path):
    rows = rows_of(dated_parquet(tmp_path / "rows.parquet"))
    assert rows[0].reason == "bad_value" and rows[1]["instruction"] == "b"


def test_a_parquet_file_without_a_wanted_column_still_names_its_fields(tmp_path):
    path = dated_parquet(tmp_path / "rows.parquet")
    rows = [row for _, row in read_rows(path, ("messages",))]
    assert len(rows) == 2 and list(rows[0]) == ["instruction", "output", "notes", "n", "seen"]


def test_a_time_in_place_of_an_id_is_not_read(tmp_path):
    path = dated_parquet(tmp_path / "rows.parquet", "id")
    rows = [row for _, row in read_rows(path, ("id", "instruction"))]
    assert [(row["instruction"], row["id"]) for row in rows] == [("a", None), ("b", None)]


def test_a_file_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.jsonl", as_bytes("jsonl"))
    with pytest.raises(DataError, match="cannot be read .*too long.*check the path"):
        rows_of(tmp_path / f"{'x' * 300}.jsonl")

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(DataError, match="rows.jsonl cannot be read .*Permission denied.*its permissions"):
        rows_of(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_gzip_is_an_error(tmp_path, kind, share):
    whole = gzip.compress(as_bytes(kind, ROWS * 50))
    path = tmp_path / f"rows.{kind}.gz"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"damaged or truncated after row \d+.*again"):
        rows_of(path)


def test_gzip_with_a_flipped_byte_is_an_error(tmp_path):
    whole = bytearray(gzip.compress(as_bytes("jsonl", ROWS * 50)))
    whole[len(whole) // 2] ^= 0xFF
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(whole)
    with pytest.raises(DataError, match="damaged or truncated|cannot be read"):
        rows_of(path)


@pytest.mark.parametrize("cut", [-1, -30, 1])
def test_truncated_json_is_an_error(tmp_path, cut):
    with pytest.raises(DataError, match="it is not JSON"):
        rows_of(written(tmp_path / "rows.json", as_bytes("json")[:cut]))


@pytest.mark.parametrize(
    "content", [b'[{"a": 1} {"b": 2}]', b'[{"a": 1}, x]', b'[{"a": 1}] trailing', b'["\xff"]', b"[" * 99999]
)
def test_malformed_json_is_an_error(tmp_path, content):
    with pytest.raises(DataError, match="it is not JSON"):
        rows_of(written(tmp_path / "rows.json", content))


@pytest.mark.parametrize("cut", [4, 100, -5])
def test_truncated_parquet_is_an_error(tmp_path, cut):
    with pytest.raises(DataError, match="not a complete Parquet file"):
        rows_of(written(tmp_path / "rows.parquet", as_bytes("parquet")[:cut]))


def test_missing_file_folder_empty_file_and_unknown_kind(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    written(tmp_path / "blank.jsonl", b"\n \n\n")
    written(tmp_path / "header.csv", b"instruction,output\n")
    written(tmp_path / "rows.xlsx", b"PK")
    for name, message in {
        "absent.jsonl": r"does not exist: check the path, or use 'hub' or 'sample'",
        ".": r"is a folder: give one file in it \(.jsonl",
        "empty.jsonl": r"is empty: download or write",
        "blank.jsonl": "has no rows",
        "header.csv": "has no rows",
        "rows.xlsx": r"unknown file type: use .jsonl",
    }.items():
        with pytest.raises(DataError, match=message):
            rows_of(tmp_path / name)
