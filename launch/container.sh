#!/usr/bin/env bash
# What Dockerfile and apptainer.def run inside the image that they make.
set -euo pipefail
command -v apt-get >/dev/null || { echo "error: no apt-get: this is for the image of Dockerfile alone" >&2; exit 2; }
apt-get update
# mpi4py is built for this MPI; DeepSpeed's NVMe offload needs libaio.
apt-get install -y --no-install-recommends g++ git libaio-dev libopenmpi-dev openmpi-bin
rm -rf /var/lib/apt/lists/*
pip install --no-cache-dir --requirement "$(dirname "$0")/requirements-serve.txt"
