#!/usr/bin/env bash
# Powers a machine off without shutdown: machine-stop.sh node1. node.sh starts it again.
set -euo pipefail
. "$(dirname "$0")/machine.sh"
machine_stop "$1"
