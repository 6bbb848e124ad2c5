#!/usr/bin/env bash
# Runs a shell or a command in the cluster.
#   enter.sh node1 [COMMAND...]   in a node, or in vpc
#   enter.sh kubectl ...          as its administrator
set -euo pipefail
. "$(dirname "$0")/machine.sh"
[ -f "$state/settings" ] || die "no cluster in $state: up.sh starts one"
export PATH=$bin:$PATH
case ${1:-} in
  kubectl) shift; kubectl "$@" ;;
  vpc | node*) machine=$1; shift; on "$machine" "${@:-bash}" ;;
  *) die "usage: enter.sh node1|vpc [COMMAND...], enter.sh kubectl ..." ;;
esac
