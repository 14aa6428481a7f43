#!/usr/bin/env bash
# An MLflow server for sweeps on more than one machine: PostgreSQL behind it, loopback in front.
#
#   MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://kdecs@127.0.0.1:5432/mlflow \
#   MLFLOW_ARTIFACTS=/shared/kdecs/mlartifacts cluster/mlflow/serve.sh
#
# The database's password belongs in ~/.pgpass (or the file that PGPASSFILE names), never in the URI, which process
# lists show. MLflow does not authenticate its users, so the server listens on loopback only. From another machine:
#   ssh -N -L 5000:127.0.0.1:5000 THIS_HOST
# It needs psycopg2: pip install 'kdecs[postgres]'
set -euo pipefail

uri=${MLFLOW_BACKEND_STORE_URI:?set it, such as postgresql+psycopg2://kdecs@127.0.0.1:5432/mlflow}
artifacts=${MLFLOW_ARTIFACTS:?set it to a directory for artifacts}
if [[ $uri =~ ://[^/@]*:[^/@]*@ ]]; then
    echo "MLFLOW_BACKEND_STORE_URI holds a password: put it into ~/.pgpass (mode 600) instead" >&2
    exit 1
fi
port=${MLFLOW_PORT:-5000}
# MLflow itself ends with exit code 0 if it cannot listen, which looks like a clean end to whoever started it.
if ! python -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1])))' "$port" 2>/dev/null; then
    echo "127.0.0.1:$port is in use: end the server that listens there, or set MLFLOW_PORT" >&2
    exit 1
fi
mkdir -p "$artifacts"
# Job execution (online scorers) starts several further processes that kdecs has no use for.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
exec mlflow server --host 127.0.0.1 --port "$port" --workers 2 \
    --backend-store-uri "$uri" --artifacts-destination "$artifacts"
