#!/usr/bin/env bash
# Software Vulkan (Mesa lavapipe), on which the WGSL engine is tested.
set -euo pipefail
if ldconfig -p | grep -q libvulkan.so.1 && compgen -G '/usr/share/vulkan/icd.d/lvp_icd*.json' >/dev/null; then
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq mesa-vulkan-drivers libvulkan1 >/dev/null
