#!/usr/bin/env bash
# Installs what some tests use besides Python: PostgreSQL's server, and Chromium. With apt, as root (or with sudo that
# asks nothing); elsewhere it says what is missing. Tests that need what is not there are skipped, so this never fails.
set -uo pipefail

CLUSTERS=/etc/postgresql-common/createcluster.conf

has_postgres() {
  command -v initdb >/dev/null 2>&1 || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

has_chromium() {
  local name
  for name in chromium chromium-browser google-chrome chrome; do
    command -v "$name" >/dev/null 2>&1 && return 0
  done
  return 1
}

missing=()
has_postgres || missing+=(postgresql)
has_chromium || missing+=(chromium)
if [ "${#missing[@]}" -eq 0 ]; then
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  as_root=(sudo -n)
fi

install() {
  command -v apt-get >/dev/null 2>&1 || { echo "there is no apt-get" >&2; return 1; }
  "${as_root[@]}" true 2>/dev/null || { echo "not root, and sudo asks for a password" >&2; return 1; }
  if ! has_postgres && [ ! -e "$CLUSTERS" ]; then
    # Installing PostgreSQL would otherwise make and start a server of its own.
    "${as_root[@]}" mkdir -p "$(dirname "$CLUSTERS")" || return 1
    echo 'create_main_cluster = false' | "${as_root[@]}" tee "$CLUSTERS" >/dev/null
  fi
  "${as_root[@]}" apt-get update -qq || return 1
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

echo "installing ${missing[*]}" >&2
if ! install; then
  echo "could not install ${missing[*]}: the tests that need it are skipped" >&2
fi
exit 0
