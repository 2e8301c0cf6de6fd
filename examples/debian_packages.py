"""Files of a Debian package: where it is installed, or fetched."""

import subprocess
from pathlib import Path


def package_files(
    names: tuple[str, ...], package: str, installed: Path, data: Path | None, output: Path, option: str
) -> list[Path]:
    """The first file of each name, or whose name begins so.

    Args:
        installed: Folder in which the package puts them.
        data: Folder to look in instead.
        output: Where the package is unpacked if it is not installed.
        option: The example's option that names `data`, for the error.

    Raises:
        SystemExit: they are nowhere, and the package could not be fetched.
    """
    places = [data] if data else [installed, output]
    for fetched in (False, True):
        for place in places:
            found = [next(iter(sorted(place.rglob(f"{name}*"))), None) for name in names]
            if all(found):
                return found
        if data or fetched:
            break
        output.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {package} …", flush=True)
        try:
            subprocess.run(["apt-get", "download", package], cwd=output, check=True, capture_output=True)
            archive = next(output.glob("*.deb")).name
            subprocess.run(["dpkg-deb", "-x", archive, "."], cwd=output, check=True, capture_output=True)
        except (OSError, StopIteration, subprocess.CalledProcessError):
            break
    raise SystemExit(
        f"{', '.join(names)} not found in {' or '.join(map(str, places))}. Install Debian's package {package}, or pass "
        f"{option} with a folder that has them."
    )
