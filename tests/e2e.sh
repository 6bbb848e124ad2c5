#!/usr/bin/env bash
# Tests the agent on a real node: builds its image, starts a cluster (tests/cluster), applies daemonset/, runs the
# scenarios (tests/lab/src/bin/e2e). Needs root; leaves nothing behind, also after a failure, Ctrl-C or SIGTERM.
#   e2e.sh [SCENARIO...]      smoke, privileges, first-act, ...; default: all
#   e2e.sh --possible         only reports, by exit code and in one line, whether it can run here
#   KEEP=1                    leaves the cluster running and prints how to enter it
#   FIRST_ACT=200 CHURN=300   number of pods of first-act, seconds of IP reuse
#   CNI=, PROXY_MODE=, BIN=   as in tests/cluster/up.sh
#   PROFILE=, KIRSA_BINARY=   as in daemonset/image.sh
#   IMAGE_ARCHIVE=FILE        an existing image, instead of building one
#   FORMER=FILE               image of a former version, named localhost/kirsa:former, for rollback
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
export KIRSA_CLUSTER=${KIRSA_CLUSTER:-/tmp/kirsa-e2e.$$}
. "$repo/tests/cluster/machine.sh"

why_not() {
  [ "$(id -u)" = 0 ] || { echo "needs root, for namespaces, mounts and cgroups: sudo make e2e"; return; }
  unshare --mount --net --pid --uts --ipc --time --fork true 2>/dev/null || { echo "may make no namespaces here"; return; }
  local top; for top in $(cgroups); do
    mkdir "$top/kirsa-try.$$" 2>/dev/null && rmdir "$top/kirsa-try.$$" || { echo "may make no cgroup in $top"; return; }
  done
}
why=$(why_not)
if [ "${1:-}" = --possible ]; then echo "$why"; [ -z "$why" ]; exit; fi
[ -z "$why" ] || die "$why"

# Runs a step in its own session and waits for it, so that a signal is handled at once and reaches all its processes.
child=
step() {
  setsid "$@" &
  child=$!
  local code=0; wait $child || code=$?
  child=
  return $code
}

session_gone() { ! pgrep -s "$1"; }

finish() {
  code=$?
  # Cleans up also if the output is closed.
  trap '' INT TERM PIPE
  set +e
  if [ -n "$child" ]; then
    pkill -TERM -s "$child"
    wait "$child" 2>/dev/null
    (wait_for 20 "end of session $child" session_gone "$child") || pkill -KILL -s "$child"
  fi
  if [ "${KEEP:-}" = 1 ] && [ -f "$state/settings" ]; then
    touch "$state/kept"
    say "left running:
  export KIRSA_CLUSTER=$state
  tests/cluster/enter.sh kubectl get pods -A
  tests/cluster/enter.sh node1                       a shell on the node
  tests/e2e-run.sh smoke                             runs a scenario again
  tests/cluster/down.sh                              ends the cluster"
  else
    "$cluster/down.sh" || code=1
  fi
  exit $code
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Removes what a killed run left behind.
for old in /tmp/kirsa-e2e.*/; do
  old=${old%/}
  if [ -f "$old/settings" ] && [ ! -e "$old/kept" ] && [ ! -e "/proc/${old##*.}" ]; then
    say "$old belongs to a dead run"
    KIRSA_CLUSTER=$old "$cluster/down.sh" || true
  fi
done

IMAGE=localhost/kirsa:$(sed -n '/^\[package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$repo/Cargo.toml")
export IMAGE
# The limit is for images that are shipped; the quick profile optimizes less.
[ "${PROFILE:-}" != quick ] || export LIMIT=${LIMIT:-12000000}
archive=${IMAGE_ARCHIVE:-}
if [ -z "$archive" ]; then step "$repo/daemonset/image.sh"; archive=$repo/target/image/kirsa.tar; fi
# What the scenario `published` needs: no network reaches it.
step "$cluster/build.sh" registry helm kustomize
step "$repo/release/debian.sh" fetch "$(. "$repo/release/common.sh" && native_arch)" >/dev/null
step cargo build --manifest-path "$repo/Cargo.toml" --quiet -p lab --bin lab-sts --bin lab-canary --bin e2e
step "$cluster/up.sh"
. "$state/settings"
for n in $(seq "$nodes"); do step "$cluster/images.sh" "node$n" "$archive" ${FORMER:+"$FORMER"}; done
# What the scenario `published` publishes.
ln -s "$(realpath "$archive")" "$state/kirsa.tar"
step "$cluster/stand-ins.sh"
kubectl apply -k "$cluster/overlay" >/dev/null
step "$repo/tests/e2e-run.sh" --first-act "${FIRST_ACT:-200}" --churn "${CHURN:-300}" "$@"
