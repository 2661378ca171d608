"""What the Prefect server of the tests keeps in its database."""

from __future__ import annotations

import sqlite3

from prefect.settings import PREFECT_SERVER_DATABASE_CONNECTION_URL


def marked_text_in_the_database(marks: tuple[str, ...]) -> list[str]:
    """Every cell of the Prefect server's database that holds a mark."""
    path = PREFECT_SERVER_DATABASE_CONNECTION_URL.value().removeprefix("sqlite+aiosqlite:///")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)
    try:
        tables = [
            name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")
        ]
        found = []
        for table in tables:
            if table.startswith("block_document"):
                continue  # saved blocks are where secrets belong, encrypted or not as the server is set up
            for row in connection.execute(f'select * from "{table}"'):  # noqa: S608 - names from the database itself
                found += [f"{table}: {cell}" for cell in row if any(mark in str(cell) for mark in marks)]
        return found
    finally:
        connection.close()
