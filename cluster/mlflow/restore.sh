#!/usr/bin/env bash
# Restore a backup of cluster/mlflow/backup.sh into an empty database and an empty directory; the server is not running:
#
#   MLFLOW_BACKEND_STORE_URI=… MLFLOW_ARTIFACTS=… cluster/mlflow/restore.sh /backup/mlflow-2026-11-30
set -euo pipefail

uri=${MLFLOW_BACKEND_STORE_URI:?set it as for serve.sh}
artifacts=${MLFLOW_ARTIFACTS:?set it as for serve.sh}
source=${1:?expected the directory of a backup}
database=${uri/+psycopg2/}
if ! (cd "$source" && sha256sum --quiet --check SHA256SUMS); then
    echo "$source: the backup is incomplete or damaged; take another one" >&2
    exit 1
fi
if [ -n "$(ls -A "$artifacts" 2>/dev/null)" ]; then
    echo "$artifacts is not empty: name an empty directory, so that nothing is mixed" >&2
    exit 1
fi
if [ "$(psql --dbname="$database" -Atc "select count(*) from information_schema.tables where table_schema = 'public'")" != 0 ]; then
    echo "the database has tables already: make an empty one (createdb), so that nothing is mixed" >&2
    exit 1
fi
mkdir -p "$artifacts"
tar -C "$artifacts" -xf "$source/artifacts.tar"
# All or nothing, and last: a database without its artifacts would look whole.
pg_restore --no-owner --exit-on-error --single-transaction --dbname="$database" "$source/database.dump"
echo "restored $source; start cluster/mlflow/serve.sh"
