# Settings of this site, sourced by every script in launch/. Edit it, or leave it as it is.
# shellcheck shell=bash
: "${root:?set root to the repository before sourcing this file}"

# Everything that is built or cached stays in the repository, unless the environment says otherwise.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$root/.cache/torch_extensions}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$root/.cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$root/.cache/triton}"
export HF_HOME="${HF_HOME:-$root/.cache/huggingface}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$root/.cache/matplotlib}"

# Environment modules of a cluster:
# module load gcc cuda

# Which network NCCL and gloo take, where a host has several:
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# Where Python packages and data sets come from behind a proxy:
# export https_proxy=http://proxy.example:3128
