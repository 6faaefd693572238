#!/usr/bin/env bash
# On each node of the launch (README.md says with what around it): ./torchrun.sh [--dry-run] [flags of `unisd train`]
set -euo pipefail
here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=/dev/null
source "$here/cluster.sh"
: "${CONFIG:=$here/config.yaml}" "${MODEL:=}"
# shellcheck source=/dev/null
source "$here/../common/launch.sh"
launch "$@"
