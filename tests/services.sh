#!/usr/bin/env bash
# Installs what the long tests run against real: Slurm (munge, slurmctld, slurmd) and WireGuard. Debian and Ubuntu, as
# root; done already, it does nothing, and elsewhere it says so: the tests that miss something are skipped with its name.
# Their services are not started: the tests start what they need themselves.
set -euo pipefail

packages=(munge slurmctld slurmd slurm-client wireguard-tools wireguard-go nftables)
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ "${#missing[@]}" -eq 0 ]; then
  exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed, and only root on Debian or Ubuntu can: ${missing[*]}; their tests are skipped" >&2
  exit 0
fi

# A package may start its service when it is installed, unless this file forbids it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update --quiet=2 && apt-get install --yes --quiet=2 --no-install-recommends "${missing[@]}" >/dev/null; }; then
  echo "apt-get cannot install ${missing[*]}; their tests are skipped" >&2
fi
