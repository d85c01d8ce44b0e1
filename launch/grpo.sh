#!/usr/bin/env bash
# Learn from rewards: launch/pretrain.sh with --objective grpo (docs/en/rewards.md).
exec bash "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh" --objective grpo "$@"
