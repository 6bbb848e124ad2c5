#!/usr/bin/env bash
# Starts the AWS stand-ins on the network outside the nodes: STS on 10.250.0.254:8080, which trusts this cluster's
# service accounts, and the canary on the metadata address, which counts the requests that reach it.
set -euo pipefail
. "$(dirname "$0")/machine.sh"
lab=$(realpath "$cluster/../../target/debug")
cat >"$state/account.json" <<'T'
{"providers": [{"Url": "https://kubernetes.default.svc.cluster.local", "ClientIDList": ["sts.amazonaws.com"]}], "roles": []}
T
cat "$state/pki/admin.crt" "$state/pki/admin.key" >"$state/pki/admin.pem"
daemon vpc sts "$lab/lab-sts" --listen 10.250.0.254:8080 --control 127.0.0.1:9912 --account "$state/account.json" \
  --jwks https://10.250.0.254:6443/openid/v1/jwks --jwks-authority "$state/pki/ca.crt" --jwks-identity "$state/pki/admin.pem"
canary=(--listen 169.254.169.254:80)
[ "$dual" = no ] || canary+=(--listen "[fd00:ec2::254]:80")
daemon vpc canary "$lab/lab-canary" "${canary[@]}" --control 127.0.0.1:9913
wait_for 30 "STS stand-in (see $state/vpc/log/sts.log)" on vpc curl -sf http://127.0.0.1:9912/_control/settings
wait_for 30 "canary (see $state/vpc/log/canary.log)" on vpc curl -sf http://127.0.0.1:9913/hits
