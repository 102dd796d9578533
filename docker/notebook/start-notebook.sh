#!/bin/bash
# What the stand-alone image runs: JupyterLab, or the hub's single-user server when a hub has started the container.
set -e
if [ -n "${JUPYTERHUB_API_TOKEN:-}" ]; then
    exec jupyterhub-singleuser "$@"
fi
exec jupyter lab --ip="${JUPYTER_IP:-0.0.0.0}" --port="${JUPYTER_PORT:-8888}" --no-browser "$@"
