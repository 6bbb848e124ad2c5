#!/bin/sh
# ar for objects of any architecture (zig-cc.sh).
exec "$(dirname "$0")/../target/zig/bin/python" -m ziglang ar "$@"
