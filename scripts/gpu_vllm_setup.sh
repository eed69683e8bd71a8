# To be sourced:  . scripts/gpu_vllm_setup.sh ARCHIVE [WHEELS]
#
# Makes vLLM importable where nothing can be installed: unpacks an archive of its packages (once), and gives this
# checkout the entry points that an installation would have. WHEELS is a folder of pure wheels that the machine lacks.
unpacked=/tmp/vllm_packages
[ -d "$unpacked/vllm" ] || { mkdir -p "$unpacked" && tar -xJf "$1" -C "$unpacked"; }
python3 - "$unpacked" "${2:-}" <<'PY'
import sys, tomllib, zipfile
from pathlib import Path
packages, wheels = Path(sys.argv[1]), sys.argv[2]
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
info = packages / "steer_compile-0.0.0.dist-info"
info.mkdir(exist_ok=True)
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: steer-compile\nVersion: 0.0.0\n")
groups = project["entry-points"].items()
(info / "entry_points.txt").write_text(
    "\n".join(f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in names.items()) for group, names in groups) + "\n")
for wheel in Path(wheels).glob("*.whl") if wheels else ():
    zipfile.ZipFile(wheel).extractall(packages)
PY
export PYTHONPATH=$PWD:$unpacked HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0
