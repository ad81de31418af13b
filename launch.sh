#!/usr/bin/env bash
# Build the image, mount the data, and repeat the thesis' experiment in a container (`mgmt_thesis`), on one machine.
#   ./launch.sh STORE TCGA_STORE OUT [more for mgmt_thesis, e.g. --recipe default]
# Stop it and call it again: it goes on where it stopped. What it would do is printed with LAUNCH_DRY_RUN=1.
# No image was built where the library is tested, for want of an engine: there the steps run without a container.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
engine=${CONTAINER_ENGINE:-docker}
image=${MGMT_IMAGE:-mgmt_fast}
gpus=${MGMT_GPUS-all}

usage() { sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

run() {
    printf '+ %s\n' "$*" >&2
    if [ -z "${LAUNCH_DRY_RUN:-}" ]; then "$@"; fi
}

if [ $# -lt 3 ]; then usage >&2; exit 2; fi
store=$1 tcga=$2 out=$3
shift 3

for folder in "$store" "$tcga"; do
    if [ ! -f "$folder/store.json" ]; then
        echo "error: $folder holds no finished store: prepare one there first (mgmt_prepare)" >&2
        exit 2
    fi
done
if ! command -v "$engine" >/dev/null; then
    echo "error: $engine is not there: install it, or name another engine in CONTAINER_ENGINE" >&2
    exit 2
fi
mkdir -p "$out"
# the test writes beside both stores what they have met; the training store also keeps fingerprints
mounts=(-v "$(cd "$store" && pwd):/data/store" -v "$(cd "$tcga" && pwd):/data/tcga" -v "$(cd "$out" && pwd):/out")
devices=(--ipc=host --user "$(id -u):$(id -g)" -e MGMT_FAST_HOME=/out/.mgmt_fast -e HOME=/out)
if [ -n "$gpus" ]; then devices+=(--gpus "$gpus"); fi

run "$engine" build -t "$image" "$here"
run "$engine" run --rm "${devices[@]}" "${mounts[@]}" "$image" mgmt_thesis /data/store /data/tcga /out "$@"
