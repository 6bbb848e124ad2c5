#!/usr/bin/env bash
# Runs each type of pod network with each mode of kube-proxy, each on its own cluster, with the scenarios that depend on
# the path of a packet. Prints a table at the end and, like each of the runs, leaves nothing behind. Needs root.
#   CHURN=20                  seconds of IP reuse
#   SHAPES="ptp bridge routed" PROXY_MODES="nftables iptables"
#   BIN=, PROFILE=, KIRSA_BINARY=, DUAL_STACK=   as in e2e.sh
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

failed=0 table='' scenarios=(smoke newcomer reuse removal)
for cni in ${SHAPES:-ptp bridge routed}; do
  for proxy_mode in ${PROXY_MODES:-nftables iptables}; do
    echo "=== CNI $cni, kube-proxy $proxy_mode"
    # Runs in the background, so that a signal is handled at once and forwarded to it.
    CNI=$cni PROXY_MODE=$proxy_mode CHURN=${CHURN:-20} "$repo/tests/e2e.sh" "${scenarios[@]}" > >(tee -i "$log") 2>&1 &
    run=$!
    trap 'kill -TERM $run; wait $run; exit 143' INT TERM
    wait $run || failed=1
    row="| $cni, $proxy_mode |"
    for scenario in "${scenarios[@]}"; do
      row+=" $(sed -n "s/^\(ok\|FAILED\) *$scenario .*/\1/p" "$log" | grep . || echo "not run") |"
    done
    table+=$row$'\n'
    export IMAGE_ARCHIVE=$repo/target/image/kirsa.tar
  done
done
printf '| shape, kube-proxy |%s\n|---|%s\n%s' "$(printf ' %s |' "${scenarios[@]}")" "$(printf -- '---|%.0s' "${scenarios[@]}")" "$table"
exit $failed
