#!/usr/bin/env bash
# What a container runs: a command of dpo-dist (`doctor`, `score`, `eval`, ...), or, given only overrides, this node's
# share of a training run. Nodes are told apart by the environment that launch/node.sh reads.
set -euo pipefail

case "${1:-}" in
    "" | *=*) exec "$(dirname "${BASH_SOURCE[0]}")/../launch/node.sh" "$@" ;;
    *) exec dpo-dist "$@" ;;
esac
