#!/usr/bin/env bash
# Back up what cluster/mlflow/serve.sh serves, while it runs, into a new directory:
#
#   MLFLOW_BACKEND_STORE_URI=… MLFLOW_ARTIFACTS=… cluster/mlflow/backup.sh /backup/mlflow-2026-11-30
set -euo pipefail

uri=${MLFLOW_BACKEND_STORE_URI:?set it as for serve.sh}
artifacts=${MLFLOW_ARTIFACTS:?set it as for serve.sh}
target=${1:?expected a directory that does not exist yet}
if [ -e "$target" ]; then
    echo "$target exists: name a new directory" >&2
    exit 1
fi
umask 077 # the users and their hashed passwords are in it
partial=$target.partial
rm -rf "$partial"
mkdir -p "$partial"
# The database first: MLflow writes a run's artifacts and never changes them, so those that come later do no harm, and
# none that the database knows of is missing.
pg_dump --format=custom --no-owner --dbname="${uri/+psycopg2/}" --file="$partial/database.dump"
tar -C "$artifacts" -cf "$partial/artifacts.tar" .
(cd "$partial" && sha256sum database.dump artifacts.tar > SHA256SUMS)
mv "$partial" "$target"
echo "$target: $(du -sh "$target" | cut -f1)"
