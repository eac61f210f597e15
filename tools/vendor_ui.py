"""Fetches the dashboard's libraries from the npm registry into neaptide/dashboard/ui/vendor, as they were published.

    python tools/vendor_ui.py            fetch what PACKAGES names, write vendor.json
    python tools/vendor_ui.py --check    only compare what lies there with vendor.json

`npm` must be installed. The only change to a file is that its source map's name is cut off: the map is not shipped.
vendor.json keeps name, version, licence, the archive's and each file's sha256, and what a file weighs compressed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

VENDOR = Path(__file__).resolve().parent.parent / "neaptide" / "dashboard" / "ui" / "vendor"
BUDGET = 150_000  # bytes, gzip -9, everything the page loads from vendor/
SOURCE_MAP = re.compile(rb"\n?(//# sourceMappingURL=\S+|/\*# sourceMappingURL=\S+ \*/)\s*$")


class Package(NamedTuple):
    name: str
    version: str
    files: dict[str, str]  # path in the archive -> name here


PACKAGES = (
    Package("preact", "11.2.0", {"dist/preact.mjs": "preact.js", "hooks/dist/hooks.mjs": "preact-hooks.js"}),
    Package("htm", "3.1.1", {"dist/htm.module.js": "htm.js"}),
    Package("@preact/signals-core", "1.14.5", {"dist/signals-core.module.js": "signals-core.js"}),
    Package("@preact/signals", "2.11.4", {"dist/signals.module.js": "signals.js"}),
    Package("uplot", "1.6.32", {"dist/uPlot.esm.js": "uplot.js", "dist/uPlot.min.css": "uplot.css"}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the dashboard's libraries.")
    parser.add_argument("--check", action="store_true", help="compare what lies there with vendor.json")
    if parser.parse_args().check:
        wrong = complaints(VENDOR)
        print("\n".join(wrong) or "vendor.json and the files agree")
        return 1 if wrong else 0
    VENDOR.mkdir(parents=True, exist_ok=True)
    told = [fetched(package) for package in PACKAGES]
    (VENDOR / "vendor.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    for wrong in complaints(VENDOR):
        print(wrong, file=sys.stderr)
    print(f"{weight(told)} bytes compressed, {BUDGET} allowed")
    return 0


def fetched(package: Package) -> dict[str, Any]:
    """Writes the package's files and licence; its entry in vendor.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        with tarfile.open(archive) as tar:
            about = json.loads(read(tar, "package.json"))
            files = [put(name, SOURCE_MAP.sub(b"\n", read(tar, path)), path) for path, name in package.files.items()]
            licence = f"{package.name.replace('@', '').replace('/', '-')}.LICENSE.txt"
            files.append(put(licence, read(tar, "LICENSE"), "LICENSE"))
    if about["version"] != package.version:
        raise SystemExit(f"{package.name}: asked for {package.version}, got {about['version']}")
    return {
        "name": package.name,
        "version": package.version,
        "licence": about["license"],
        "archive_sha256": digest,
        "files": files,
    }


def read(tar: tarfile.TarFile, path: str) -> bytes:
    file = tar.extractfile(f"package/{path}")
    if file is None:
        raise SystemExit(f"the archive has no {path}")
    return file.read()


def put(name: str, content: bytes, origin: str) -> dict[str, Any]:
    (VENDOR / name).write_bytes(content)
    return {
        "file": name,
        "from": origin,
        "sha256": hashlib.sha256(content).hexdigest(),
        "gz_bytes": compressed(content),
    }


def compressed(content: bytes) -> int:
    return len(gzip.compress(content, 9, mtime=0))


def weight(told: list[dict[str, Any]]) -> int:
    """Compressed bytes of what a browser loads; licences are not loaded."""
    return sum(f["gz_bytes"] for package in told for f in package["files"] if not f["file"].endswith(".txt"))


def complaints(folder: Path) -> list[str]:
    """What in `folder` differs from its vendor.json."""
    told = json.loads((folder / "vendor.json").read_text(encoding="utf-8"))
    files = {f["file"]: f["sha256"] for package in told for f in package["files"]}
    there = {p.name for p in folder.iterdir()} - {"vendor.json"}
    out = [f"{name} is not in vendor.json" for name in sorted(there - set(files))]
    out += [f"{name} is missing" for name in sorted(set(files) - there)]
    for name in sorted(there & set(files)):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != files[name]:
            out.append(f"{name} has another sha256 than vendor.json says")
    asked = {(p.name, p.version) for p in PACKAGES}
    out += [
        f"{p['name']} {p['version']} is not what PACKAGES asks for"
        for p in told
        if (p["name"], p["version"]) not in asked
    ]
    if weight(told) > BUDGET:
        out.append(f"the libraries weigh {weight(told)} bytes compressed, {BUDGET} are allowed")
    return out


if __name__ == "__main__":
    sys.exit(main())
