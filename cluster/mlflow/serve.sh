#!/usr/bin/env bash
# An MLflow server for sweeps on more than one machine: PostgreSQL behind it, loopback in front.
#
#   MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://kdecs@127.0.0.1:5432/mlflow \
#   MLFLOW_ARTIFACTS=/shared/kdecs/mlartifacts cluster/mlflow/serve.sh
#
# The password of the database stands in ~/.pgpass (or the file that PGPASSFILE names), never in the URI: a URI
# is seen in process lists. MLflow asks its own users for nothing, so it listens on loopback only; others come by
#   ssh -N -L 5000:127.0.0.1:5000 THIS_HOST
# Needs psycopg2 in the environment: pip install psycopg2-binary
set -euo pipefail

uri=${MLFLOW_BACKEND_STORE_URI:?set it, such as postgresql+psycopg2://kdecs@127.0.0.1:5432/mlflow}
artifacts=${MLFLOW_ARTIFACTS:?set it to a directory for artifacts}
if [[ $uri =~ ://[^/@]*:[^/@]*@ ]]; then
    echo "MLFLOW_BACKEND_STORE_URI holds a password: put it into ~/.pgpass (mode 600) and leave it out" >&2
    exit 1
fi
mkdir -p "$artifacts"
exec mlflow server --host 127.0.0.1 --port "${MLFLOW_PORT:-5000}" --workers 2 \
    --backend-store-uri "$uri" --artifacts-destination "$artifacts"
