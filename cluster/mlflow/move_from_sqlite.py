"""Move the experiments of an SQLite database, with their artifacts, to the server of `cluster/mlflow/serve.sh`.

    MLFLOW_BACKEND_STORE_URI=… MLFLOW_ARTIFACTS=… python cluster/mlflow/move_from_sqlite.py runs/mlflow.db

The settings are those of serve.sh. Start the server once, so that it makes its tables, and stop it; its database holds
no runs yet. Everything keeps its ids: runs, metrics, tags, notes, models, versions and aliases. The SQLite database
and its artifacts stay as they are. A move that is interrupted leaves the server's database as it was, and the same
command starts again.
"""

import os
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import sqlalchemy
from mlflow.store.db.base_sql_model import Base
from mlflow.store.model_registry.dbmodels import models as _registry
from mlflow.store.tracking.dbmodels import models as _tracking
from sqlalchemy import func, insert, select, text

LOCATIONS = {  # every column that says where artifacts lie; a location begins with that of its experiment
    _tracking.SqlExperiment.__tablename__: ("artifact_location",),
    _tracking.SqlRun.__tablename__: ("artifact_uri",),
    _tracking.SqlLoggedModel.__tablename__: ("artifact_location",),
    _registry.SqlModelVersion.__tablename__: ("source", "storage_location"),
}
ROWS_PER_STATEMENT = 1000


def main() -> None:
    """Copy the artifacts, then all rows in one transaction."""
    source = Path(sys.argv[1] if len(sys.argv) == 2 else "")
    if not source.is_file():
        sys.exit("expected one SQLite database, such as runs/mlflow.db")
    try:
        uri, artifacts = os.environ["MLFLOW_BACKEND_STORE_URI"], Path(os.environ["MLFLOW_ARTIFACTS"])
    except KeyError as error:
        sys.exit(f"{error.args[0]} is not set; set it as for serve.sh")
    target = sqlalchemy.create_engine(uri)
    with tempfile.TemporaryDirectory() as folder, target.begin() as into:
        copy = _copy_of(source, Path(folder))
        _require_equal_schemas(copy, into, source)
        if into.execute(select(func.count()).select_from(_tracking.SqlRun)).scalar_one():
            sys.exit("the server has runs already; move into an empty database, so that nothing is mixed")
        places = _places(copy)
        for location, place in places.items():
            if (found := _path(location)).is_dir():
                # Before the rows are committed: a database without its artifacts would look whole.
                shutil.copytree(found, artifacts / place, dirs_exist_ok=True)
        moved = _copy_rows(copy, into, {old: f"mlflow-artifacts:/{place}" for old, place in places.items()})
        copy.close()
    target.dispose()
    counts = ", ".join(
        f"{moved[name]} {name.replace('_', ' ')}" for name in ("experiments", "runs", "metrics")
    )
    print(
        f"moved {source}: {counts}, {moved['logged_models']} models, {moved['model_versions']} registered versions"
    )


def _copy_of(source: Path, folder: Path) -> sqlalchemy.Connection:
    """A connection to a consistent copy: somebody may be writing into the database."""
    with sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True) as original:
        with sqlite3.connect(folder / "mlflow.db") as copy:
            original.backup(copy)
        copy.close()
    original.close()
    return sqlalchemy.create_engine(f"sqlite:///{folder / 'mlflow.db'}").connect()


def _require_equal_schemas(copy: sqlalchemy.Connection, into: sqlalchemy.Connection, source: Path) -> None:
    for name, connection in (("the server's database", into), (str(source), copy)):
        if not sqlalchemy.inspect(connection).has_table("alembic_version"):
            sys.exit(f"{name} has no tables of MLflow; start MLflow on it once")
    versions = [
        connection.execute(text("select version_num from alembic_version")).scalar_one()
        for connection in (copy, into)
    ]
    if versions[0] != versions[1]:
        sys.exit(
            "the two databases belong to different versions of MLflow; "
            f"bring both to this one: mlflow db upgrade sqlite:///{source}, and the same for the server's"
        )


def _places(copy: sqlalchemy.Connection) -> dict[str, str]:
    """Each local place of artifacts with the folder that it gets on the server: the first experiment's id."""
    table = _tracking.SqlExperiment.__table__
    rows = copy.execute(
        select(table.c.experiment_id, table.c.artifact_location).order_by(table.c.experiment_id)
    )
    places: dict[str, str] = {}
    for experiment, location in rows:
        if urlsplit(location).scheme in ("", "file"):
            places.setdefault(location, str(experiment))
    return places


def _path(location: str) -> Path:
    parts = urlsplit(location)
    return Path(url2pathname(parts.path) if parts.scheme else location)


def _copy_rows(
    copy: sqlalchemy.Connection, into: sqlalchemy.Connection, places: dict[str, str]
) -> dict[str, int]:
    """All rows of all tables with their locations on the server; the number of rows of each table."""
    # The longest first: a location may begin with another one.
    prefixes = sorted(places, key=len, reverse=True)

    def located(value: str | None) -> str | None:
        found = next(
            (prefix for prefix in prefixes if value == prefix or (value or "").startswith(f"{prefix}/")), None
        )
        return value if found is None else places[found] + str(value)[len(found) :]

    moved: dict[str, int] = {}
    present = set(sqlalchemy.inspect(copy).get_table_names())
    tables = [table for table in Base.metadata.sorted_tables if table.name in present]
    for table in reversed(tables):
        # What MLflow writes into an empty database: the default experiment and workspace, which come with the rows.
        into.execute(table.delete())
    for table in tables:
        columns = LOCATIONS.get(table.name, ())
        rows: list[dict[str, Any]] = []
        moved[table.name] = 0
        for row in copy.execute(select(table)).mappings():
            rows.append({**row, **{column: located(row[column]) for column in columns}})
            if len(rows) == ROWS_PER_STATEMENT:
                into.execute(insert(table), rows)
                moved[table.name] += len(rows)
                rows = []
        if rows:
            into.execute(insert(table), rows)
            moved[table.name] += len(rows)
        if into.dialect.name == "postgresql":
            _continue_numbers(into, table)
        count = into.execute(select(func.count()).select_from(table)).scalar_one()
        if count != moved[table.name]:
            raise RuntimeError(f"{table.name}: {count} rows arrived of {moved[table.name]}")
    return moved


def _continue_numbers(into: sqlalchemy.Connection, table: sqlalchemy.Table) -> None:
    """Let new ids begin after those that were moved: PostgreSQL does not count rows that bring their own."""
    column = table.autoincrement_column
    if column is None:
        return
    names = {"table": table.name, "column": column.name}
    sequence = into.execute(text("select pg_get_serial_sequence(:table, :column)"), names).scalar_one()
    largest = into.execute(select(func.max(column))).scalar_one()
    if sequence is not None and largest is not None:
        into.execute(
            text("select setval(:sequence, :largest)"), {"sequence": sequence, "largest": max(1, largest)}
        )


if __name__ == "__main__":
    main()
