#!/usr/bin/env bash
# Pull a machine's plug: machine-stop.sh node1. node.sh starts it again.
set -euo pipefail
. "$(dirname "$0")/machine.sh"
machine_stop "$1"
