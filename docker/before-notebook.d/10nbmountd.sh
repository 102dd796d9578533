# Sourced by jupyter's start.sh (docker-stacks) before the notebook server starts. It has the server run under `nbmountd exec`,
# which mounts, hides credentials, and sends what is unsent when the server has ended. When the container starts as root, the
# daemon is started here, because it may mount now (it serves as $NB_UID), and `nbmountd exec` finds it.
#
# It can never stop a start: no exit, no failing command, no changed shell option, and at most 5 seconds of waiting.
# NBMOUNTD_DISABLE=1 leaves it out.

_nbmountd_start() {
    local program pid until=$((SECONDS + 5))
    program=$(command -v nbmountd 2>/dev/null) || return 0
    [ -z "${NBMOUNTD_DISABLE:-}" ] || return 0
    if [ "$(id -u 2>/dev/null)" = 0 ] && [ -z "${NBMOUNTD_SIDECAR:-}" ] && [ -z "${NBMOUNTD_MOUNT_HELPER:-}" ]; then
        # A session of its own: `tini -g` tells the whole process group to end, and uploads come after that.
        setsid "${program}" run </dev/null >&2 &
        pid=$!
        while [ "${SECONDS}" -lt "${until}" ] && kill -0 "${pid}" 2>/dev/null; do
            if grep -q ' - fuse\.nbmountd ' /proc/self/mountinfo 2>/dev/null; then
                break
            fi
            sleep 0.1
        done
        disown "${pid}" 2>/dev/null
    fi
    if [ "${#cmd[@]}" -gt 0 ]; then
        cmd=("${program}" exec -- "${cmd[@]}")
        # start.sh would take these away before `nbmountd exec` has seen them; it keeps them from the server itself.
        export NBMOUNTD_UNSET="${JUPYTER_ENV_VARS_TO_UNSET:-}${NBMOUNTD_UNSET:+,${NBMOUNTD_UNSET}}"
        JUPYTER_ENV_VARS_TO_UNSET=
    fi
    return 0
}

_nbmountd_start || true
unset -f _nbmountd_start || true
