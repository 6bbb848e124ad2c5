#!/usr/bin/env bash
# Start a registry (CNCF distribution) on the network outside the nodes: 10.250.0.254:5000, plain HTTP, empty. The nodes'
# containerd is told that it has no TLS (node.sh).
set -euo pipefail
. "$(dirname "$0")/machine.sh"
[ -f "$state/settings" ] || die "no cluster in $state: up.sh starts one"
address=10.250.0.254:5000 dir=$state/vpc/registry
binary=$cluster/../../target/cluster/bin/registry
[ -x "$binary" ] || "$cluster/build.sh" registry
[ ! -f "$state/vpc/registry.pid" ] || daemon_stop vpc registry
rm -rf "$dir"; mkdir -p "$dir"
cat >"$dir/config.yml" <<C
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $dir/data}}
http: {addr: $address}
C
OTEL_TRACES_EXPORTER=none daemon vpc registry "$(realpath "$binary")" serve "$dir/config.yml"
wait_for 30 "registry (see $state/vpc/log/registry.log)" on vpc curl -sf "http://$address/v2/"
