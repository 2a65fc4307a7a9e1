# Sourced as `. scripts/environment.sh EXTRA`: makes .venv once, installs vlmfix with that extra of pyproject.toml and the
# pinned versions into it, and activates it. What is installed with `dev` serves `eval` too, which is a part of it.
# PYTHON=python3.12 scripts/demo chooses another interpreter; removing .venv starts afresh.

extra=${1:?name the extra to install: . scripts/environment.sh eval}
python=${PYTHON:-python3}
version_of='import sys; print("%d.%d" % sys.version_info[:2])'
wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)

version=$("$python" -c "$version_of") || { echo "no Python answers to '$python'. Type: PYTHON=python3.12 $0" >&2; exit 1; }
if [ -x .venv/bin/python ]; then
  made_with=$(.venv/bin/python -c "$version_of") || { echo "the interpreter of .venv is gone: remove .venv" >&2; exit 1; }
  if [ -n "${PYTHON:-}" ] && [ "$made_with" != "$version" ]; then
    echo ".venv has Python $made_with, PYTHON=$PYTHON is $version: remove .venv, or leave PYTHON out" >&2
    exit 1
  fi
  version=$made_with
fi
case $version in
  3.10 | 3.11 | 3.12 | 3.13 | 3.14) ;;
  *)
    echo "scripts/constraints.txt pins versions for Python 3.10 to 3.14; this is $version. Type: PYTHON=python3.12 $0" >&2
    exit 1
    ;;
esac
if [ ! -x .venv/bin/python ]; then
  echo "making .venv with Python $version"
  "$python" -m venv .venv || { echo "no venv module: install python3-venv (Debian, Ubuntu), then type $0 again" >&2; exit 1; }
fi
if [ "$(cat .venv/installed-dev 2>/dev/null)" = "$wanted" ] || [ "$(cat ".venv/installed-$extra" 2>/dev/null)" = "$wanted" ]; then
  echo "using .venv (Python $version)"
else
  echo "installing vlmfix[$extra] into .venv, with the versions of scripts/constraints.txt (once; a few minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable ".[$extra]"
  echo "$wanted" > ".venv/installed-$extra"
fi
. .venv/bin/activate
# Models here are small: threads beyond the physical cores, and lookups on a model hub, only cost time.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
