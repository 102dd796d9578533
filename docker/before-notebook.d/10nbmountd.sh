# Sourced by jupyter's start.sh (docker-stacks) before the notebook server starts: as root if the container starts as root
# (the daemon then mounts as root and serves as $NB_UID), else as the notebook's user.
#
# It can never stop a start: no exit, no failing command, no changed shell option, and at most 5 seconds of waiting. The daemon
# stays in this process group on purpose, so that `tini -g` passes it the container's SIGTERM and it sends what it can.
# NBMOUNTD_DISABLE=1 leaves it out.

_nbmountd_start() {
    if [ -n "${NBMOUNTD_DISABLE:-}" ] || ! command -v nbmountd >/dev/null 2>&1; then
        return 0
    fi
    nbmountd run </dev/null >&2 &
    local pid=$! tries=0
    while [ "${tries}" -lt 50 ] && kill -0 "${pid}" 2>/dev/null; do
        if grep -q ' - fuse\.nbmountd ' /proc/self/mountinfo 2>/dev/null; then
            break
        fi
        sleep 0.1
        tries=$((tries + 1))
    done
    disown "${pid}" 2>/dev/null
    return 0
}

_nbmountd_start || true
unset -f _nbmountd_start || true
