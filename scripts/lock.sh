#!/bin/sh
# Writes constraints.txt from what .venv holds: after changing a version by hand and running the tests.
set -eu
cd "$(dirname "$0")/.."
new=$(mktemp)
trap 'rm -f "$new"' EXIT
cat >"$new" <<'HEADER'
# Every direct and indirect dependency, exactly; written by `make lock`. Indexes are the user's choice (pip's own configuration).
# torch carries no local version ("+cpu", "+cu130"), so any build of this release fits; the NVIDIA packages of a CUDA build
# are pinned by torch itself.
HEADER
# A project file in the freeze ("-e", "@") would name a folder of this machine.
.venv/bin/python -m pip freeze --all --exclude pip --exclude sbs-harness | grep -v ' @ ' | sed 's/+[a-z0-9.]*$//' >>"$new"
cat "$new" >constraints.txt
