#!/usr/bin/env bash
# Run scenarios on the cluster in $KIRSA_CLUSTER: e2e-run.sh [--first-act N] [--churn SECONDS] [SCENARIO...]
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
. "$repo/tests/cluster/machine.sh"
[ -f "$state/settings" ] || die "no cluster in $state: KEEP=1 tests/e2e.sh leaves one"
# Runs on the network outside the nodes, where the API server and the AWS stand-ins are.
exec nsenter -t "$(machine_pid vpc)" --net -- "$repo/target/debug/e2e" --state "$state" "$@"
