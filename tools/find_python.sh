#!/bin/sh
# Prints the path of a Python 3.LOWEST to 3.HIGHEST that runs and can make virtual environments.
#   tools/find_python.sh [LOWEST [HIGHEST]]      default: 12 and newer
# Looks on PATH by version, then at python3, then in ~/.pyenv/versions, then asks uv. A candidate has to run: a shim
# can be there for a version that is not.
lowest=${1:-12}
highest=${2:-19}
check="import sys, venv, ensurepip
assert sys.version_info[0] == 3 and $lowest <= sys.version_info[1] <= $highest
print(sys.executable)"

try() {
    [ -n "$1" ] || return 1
    found=$("$1" -c "$check" 2>/dev/null) && [ -n "$found" ] && echo "$found"
}

minor=$lowest
while [ "$minor" -le "$highest" ]; do
    try "python3.$minor" && exit 0
    minor=$((minor + 1))
done
try python3 && exit 0
minor=$lowest
while [ "$minor" -le "$highest" ]; do
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python; do
        try "$candidate" && exit 0
    done
    minor=$((minor + 1))
done
if command -v uv >/dev/null 2>&1; then
    try "$(uv python find ">=3.$lowest,<3.$((highest + 1))" 2>/dev/null)" && exit 0
fi
echo "no Python from 3.$lowest to 3.$highest with the venv module was found on PATH, in ~/.pyenv/versions or through uv" >&2
echo "install one, for example: apt install python3.12-venv, brew install python@3.12, pyenv install 3.12, or uv python install 3.12" >&2
exit 1
