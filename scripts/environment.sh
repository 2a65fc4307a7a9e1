# Sourced by scripts/demo and scripts/test: makes .venv once, installs the pinned versions into it, and activates it.
# PYTHON=python3.12 scripts/demo chooses another interpreter; removing .venv starts afresh.

python=${PYTHON:-python3}
stamp=.venv/installed
wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)

if ! "$python" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] < (3, 14))'; then
  echo "vlmfix needs Python 3.10 or newer; '$python' is not. Type: PYTHON=python3.12 $0" >&2
  exit 1
fi
if [ ! -x .venv/bin/python ]; then
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv || { echo "no venv module: install python3-venv (Debian, Ubuntu), then type $0 again" >&2; exit 1; }
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing vlmfix and the versions of scripts/constraints.txt into .venv (once; a few minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable '.[dev]'
  echo "$wanted" > "$stamp"
else
  echo "using .venv"
fi
. .venv/bin/activate
# Models here are small: threads beyond the physical cores, and lookups on a model hub, only cost time.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
