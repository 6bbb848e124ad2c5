#!/usr/bin/env bash
# The agent on a real node: builds its image, starts a cluster (tests/cluster), applies daemonset/, runs the scenarios
# (tests/lab/src/bin/e2e). Needs root; ends without a trace, also after a failure, Ctrl-C or SIGTERM.
#   e2e.sh [SCENARIO...]      smoke, privileges, first-act, ...: all of them by default
#   e2e.sh --possible         only says, by its exit code and in a line, whether it can run here
#   KEEP=1                    leaves the cluster running and says how to enter
#   FIRST_ACT=200 CHURN=300   pods of the first act, seconds of address reuse
#   CNI=, PROXY_MODE=, BIN=   as in tests/cluster/up.sh
#   PROFILE=, KIRSA_BINARY=   as in daemonset/image.sh
#   IMAGE_ARCHIVE=FILE        an image that was built before, instead of building one
#   FORMER=FILE               the image of a former version by the name localhost/kirsa:former, for rollback
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

# In a session of its own, and waited for: so that a signal is answered at once, and reaches all that the step started.
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
  # Also when nobody reads any more what is said.
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
  tests/e2e-run.sh smoke                             a scenario again
  tests/cluster/down.sh                              the end of it"
  else
    "$cluster/down.sh" || code=1
  fi
  exit $code
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# What a run left that was killed before it could clean up.
for old in /tmp/kirsa-e2e.*/; do
  old=${old%/}
  if [ -f "$old/settings" ] && [ ! -e "$old/kept" ] && [ ! -e "/proc/${old##*.}" ]; then
    say "$old is a dead run's"
    KIRSA_CLUSTER=$old "$cluster/down.sh" || true
  fi
done

IMAGE=localhost/kirsa:$(sed -n '/^\[package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$repo/Cargo.toml")
export IMAGE
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
