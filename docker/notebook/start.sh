#!/bin/bash
# The start of a notebook container, as far as hooks are concerned the way jupyter's docker-stacks do it: `before-notebook.d`
# is sourced (as root, if the container starts as root), then the command runs as $NB_UID.
set -e
cmd=("$@")
for hook in /usr/local/bin/before-notebook.d/*.sh; do
    # shellcheck disable=SC1090  # whatever is there
    [ ! -r "${hook}" ] || source "${hook}" || echo "${hook} failed; going on" >&2
done
IFS=, read -r -a unwanted <<<"${JUPYTER_ENV_VARS_TO_UNSET:-}"
for name in "${unwanted[@]}"; do unset "${name}"; done
if [ "$(id -u)" = 0 ]; then
    exec setpriv --reuid "${NB_UID:-1000}" --regid "${NB_GID:-100}" --init-groups -- "${cmd[@]}"
fi
exec "${cmd[@]}"
