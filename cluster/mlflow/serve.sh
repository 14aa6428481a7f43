#!/usr/bin/env bash
# An MLflow server for sweeps on more than one machine: PostgreSQL behind it, passwords and loopback in front.
#
#   MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://kdecs@127.0.0.1:5432/mlflow \
#   MLFLOW_ARTIFACTS=/shared/kdecs/mlartifacts cluster/mlflow/serve.sh
#
# The database's password belongs in ~/.pgpass (or the file that PGPASSFILE names), never in the URI, which process
# lists show. The server listens on loopback only. From another machine: ssh -N -L 5000:127.0.0.1:5000 THIS_HOST
# Everybody who calls it needs a user name and a password. The first start makes the user `admin`; its password is in
# MLFLOW_HOME/admin-password (default: ~/.config/kdecs/mlflow), which only you can read. Log in and make the others at
# http://127.0.0.1:5000/signup.
# It needs: pip install 'kdecs[mlflow-server]'. Further arguments go to `mlflow server`.
set -euo pipefail

uri=${MLFLOW_BACKEND_STORE_URI:?set it, such as postgresql+psycopg2://kdecs@127.0.0.1:5432/mlflow}
artifacts=${MLFLOW_ARTIFACTS:?set it to a directory for artifacts}
home=${MLFLOW_HOME:-${XDG_CONFIG_HOME:-$HOME/.config}/kdecs/mlflow}
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
if ! python -c 'import flask_wtf, psycopg2' 2>/dev/null; then
    echo "the server needs two more packages: pip install 'kdecs[mlflow-server]'" >&2
    exit 1
fi
mkdir -p "$artifacts"

# Passwords, the key of the sign-up form and the names of who may do what: readable by this user alone.
umask_before=$(umask)
umask 077
mkdir -p "$home"
secret() { [ -s "$home/$1" ] || python -c 'import secrets; print(secrets.token_urlsafe(24))' > "$home/$1"; }
secret admin-password
secret form-key
# Users are in the same database, so that one backup has all. Whoever has a user may read and log, but not delete what
# others have made.
cat > "$home/auth.ini" <<INI
[mlflow]
default_permission = EDIT
database_uri = $uri
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
umask "$umask_before"
export MLFLOW_AUTH_CONFIG_PATH=$home/auth.ini
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
MLFLOW_AUTH_ADMIN_PASSWORD=$(< "$home/admin-password") # counts at the first start alone
MLFLOW_FLASK_SERVER_SECRET_KEY=$(< "$home/form-key")

# A foreign web page can give its own name the address of this machine. So only these names are answered; a port may
# differ, since a tunnel may begin at any. MLFLOW_HOST_NAMES adds those of a proxy, separated by commas.
hosts="localhost,localhost:*,127.0.0.1,127.0.0.1:*${MLFLOW_HOST_NAMES:+,$MLFLOW_HOST_NAMES}"
# Job execution (online scorers) starts several further processes that kdecs has no use for.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
exec mlflow server --app-name basic-auth --host 127.0.0.1 --port "$port" --workers 2 --allowed-hosts "$hosts" \
    --backend-store-uri "$uri" --artifacts-destination "$artifacts" "$@"
