"""Rows of cells from Excel's workbooks and from Parquet, by readers that come with the extras `xlsx` and `parquet`.

openpyxl reads a sheet row by row. What reads it as a whole (calamine) asks for 512 GB where one cell lies far away.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import count
from typing import Any, Final

from prefect_ttapi.batch.tables import (
    LARGEST_FILE,
    LONGEST_LINE,
    MOST_COLUMNS,
    MOST_ROWS,
    NESTED,
    Cell,
    Fault,
    Read,
    Row,
    Source,
    Unfit,
    UnreadableError,
)
from prefect_ttapi.errors import PromptsError
from prefect_ttapi.storage.keys import is_null

#: Excel has no more.
_LAST_ROW: Final = 1_048_576
_PARQUET_ROWS: Final = 100  # that are in memory at a time


def _cell(value: Any) -> Cell:
    """Return a typed value as the text that a person would write, a null as None."""
    if is_null(value):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime) and value.time() == time.min:
        return value.date().isoformat()
    if isinstance(value, str | int | float | Decimal | date | time | timedelta):
        text = str(value)
        return text if len(text) <= LONGEST_LINE else Unfit(f"more than {LONGEST_LINE:,} characters")
    return Unfit("bytes" if isinstance(value, bytes) else "something that is no text")


def _xlsx(source: Source) -> Read:
    try:
        import openpyxl
    except ImportError:
        raise _missing("openpyxl", "xlsx") from None
    try:
        yield from _of_workbook(openpyxl, source.data, formulas=_has_formulas(source.data))
    except UnreadableError:
        raise
    except Exception as error:  # openpyxl raises whatever a damaged file makes it stumble over
        raise UnreadableError(
            1, f"is no workbook that can be read ({type(error).__name__}): save it again, or as CSV"
        ) from error


def _has_formulas(data: bytes) -> bool:
    """Return whether a sheet of a workbook has formulas. UnreadableError: it unpacks to too much.

    What a part says of its size is what zipfile reads of it at most, here and for openpyxl.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > LARGEST_FILE:
            raise UnreadableError(1, f"unpacks to {unpacked:,} bytes: the most is {LARGEST_FILE:,}")
        sheets = (name for name in archive.namelist() if name.startswith("xl/worksheets/"))
        return any(re.search(rb"<f[ />]", archive.read(name)) for name in sheets)


def _of_workbook(openpyxl: Any, data: bytes, *, formulas: bool) -> Read:
    """Return the rows of the first visible sheet; where there are formulas, those without a value are found."""
    options = {"read_only": True, "keep_links": False}
    with warnings.catch_warnings(action="ignore"):  # of what openpyxl would not keep
        books = [
            openpyxl.load_workbook(io.BytesIO(data), data_only=values, **options)
            for values in ([True, False] if formulas else [True])
        ]
    visible = [sheet for sheet in books[0].worksheets if sheet.sheet_state == "visible"]
    if not visible:
        raise UnreadableError(1, "has no sheet to read: save the prompts as CSV")
    title = visible[0].title
    if len(visible) > 1:
        yield f"the sheet {title[:60]!r} is read, and no other"
    for book in books:
        book[title].reset_dimensions()  # what a file says of them is often wrong
    both = zip(*(book[title].iter_rows() for book in books), strict=True)
    names: tuple[str, ...] = ()
    names_line = 0
    for number in count(1):
        with warnings.catch_warnings(action="ignore"):
            rows = next(both, None)
        if rows is None:
            return
        cells = [_of_sheet(*same) for same in zip(*rows, strict=True)]
        while cells and cells[-1] is None:
            cells.pop()
        if number > _LAST_ROW:
            raise UnreadableError(number, "is beyond a sheet's last row")
        if not cells:
            continue
        if not names:
            names, names_line = tuple(cell if isinstance(cell, str) else "" for cell in cells), number
        elif len(cells) > len(names):
            yield Fault(
                number, f"has a cell in column {len(cells)}, but the header has {len(names)}: name the column"
            )
        else:
            yield Row(number, (*cells, *[None] * (len(names) - len(cells))), names, names_line)


def _of_sheet(cell: Any, formula: Any = None) -> Cell:
    if cell.data_type == "e":
        return Unfit(f"the error {cell.value}")
    if cell.value is None and formula is not None and formula.value is not None:
        return Unfit("a formula that was never calculated: open and save the file in a spreadsheet program")
    return _cell(cell.value)


def _parquet(source: Source) -> Read:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise _missing("pyarrow", "parquet") from None
    try:
        file = parquet.ParquetFile(io.BytesIO(source.data))
        facts = file.metadata
        unpacked = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
        if unpacked > LARGEST_FILE or facts.num_rows > MOST_ROWS or facts.num_columns > MOST_COLUMNS:
            raise UnreadableError(
                1,
                f"has {facts.num_rows:,} rows, {facts.num_columns:,} columns and {unpacked:,} bytes: "
                f"the most is {MOST_ROWS:,}, {MOST_COLUMNS:,} and {LARGEST_FILE:,}",
            )
        fields = [
            field for field in file.schema_arrow if not field.name.startswith("__index_level_")
        ]  # pandas'
        flat = [field.name for field in fields if not pyarrow.types.is_nested(field.type)]
        names, number = tuple(field.name for field in fields), 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=flat):
            columns = [batch.column(flat.index(name)) if name in flat else None for name in names]
            for at in range(batch.num_rows):
                number += 1
                cells = (NESTED if column is None else _of_column(column, at) for column in columns)
                yield Row(number, tuple(cells), names, 1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise UnreadableError(
            1, f"is no Parquet file that can be read ({told}): write it again, or as CSV"
        ) from error


def _of_column(column: Any, at: int) -> Cell:
    try:
        return _cell(column[at].as_py())
    except (ValueError, OverflowError):  # a time that Python has none for
        return Unfit("a time that can't be told")


def _missing(module: str, extra: str) -> PromptsError:
    return PromptsError(f'needs {module}: pip install "prefect-ttapi[{extra}]"')


#: What reads a file, by its extension; rows are counted in them, and not lines.
READERS: Final = {".xlsx": _xlsx, ".xlsm": _xlsx, ".parquet": _parquet}
