#!/usr/bin/env bash
# The agent on a real node: builds its image, starts a cluster (tests/cluster), applies daemonset/, runs the scenarios
# (tests/lab/src/bin/e2e). Needs root; ends without a trace, also after a failure or Ctrl-C.
#   e2e.sh [SCENARIO...]      smoke, privileges, first-act, ...: all of them by default
#   KEEP=1                    leaves the cluster running and says how to enter
#   FIRST_ACT=200 CHURN=300   pods of the first act, seconds of address reuse
#   CNI=, PROXY_MODE=, BIN=   as in tests/cluster/up.sh
#   KIRSA_BINARY=             as in daemonset/image.sh
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
export KIRSA_CLUSTER=${KIRSA_CLUSTER:-/tmp/kirsa-e2e.$$}
. "$repo/tests/cluster/machine.sh"
[ "$(id -u)" = 0 ] || die "needs root, for namespaces, mounts and cgroups: sudo make e2e"

finish() {
  code=$?
  trap '' INT TERM
  if [ "${KEEP:-}" = 1 ]; then
    say "left running:
  export KIRSA_CLUSTER=$state
  tests/cluster/enter.sh kubectl get pods -A
  tests/cluster/enter.sh node1                       a shell on the node
  tests/e2e-run.sh smoke                             a scenario again
  tests/cluster/down.sh                              the end of it"
  else
    if [ $code != 0 ] && [ -f "$state/settings" ]; then
      echo "--- the agent's last lines"
      kubectl -n kirsa logs -l app.kubernetes.io/name=kirsa --tail=30 2>/dev/null || true
    fi
    "$cluster/down.sh"
  fi
  exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

IMAGE=localhost/kirsa:$(sed -n '/^\[package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$repo/Cargo.toml")
IMAGE=$IMAGE "$repo/daemonset/image.sh"
(cd "$repo" && cargo build --quiet -p lab --bin lab-sts --bin lab-canary --bin e2e)
"$cluster/up.sh"
. "$state/settings"
for n in $(seq "$nodes"); do "$cluster/images.sh" "node$n" "$repo/target/image/kirsa.tar"; done
"$cluster/stand-ins.sh"
kubectl apply -k "$cluster/overlay" >/dev/null
"$repo/tests/e2e-run.sh" --first-act "${FIRST_ACT:-200}" --churn "${CHURN:-300}" "$@"
