#!/bin/sh
# Finds a Python that is new enough and hands over to the module named first: scripts/setup.sh scripts.bootstrap
set -eu
cd "$(dirname "$0")/.."
seen=""
module="$1"
if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.11 python3.12 python3.13; fi
tried="$*"
for candidate in "$@"; do
    path=$(command -v "$candidate") || continue
    version=$("$path" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) || continue
    if "$path" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$path" -m "$module"
    fi
    seen="$seen $candidate is $version;"
done
echo "set-up: needs Python 3.11 or newer;${seen:- not found: $tried}" >&2
echo "        install one (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev), or name it: make setup PYTHON=/path/to/python3.11" >&2
exit 2
