"""Run a script where `anyvlm` cannot be imported, even if it is installed: `python -I without_package.py SCRIPT …`.

Run by path, never imported; it needs the standard library only.
"""

import importlib
import runpy
import sys
from importlib.abc import MetaPathFinder


class PackageBlocker(MetaPathFinder):
    """Answers before every other finder, those of editable installs included."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "anyvlm":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


def main() -> None:
    loaded = [name for name in sys.modules if name.split(".")[0] == "anyvlm"]
    if loaded:
        sys.exit(f"This process is not fresh: {loaded[0]} was loaded when Python started.")
    sys.meta_path.insert(0, PackageBlocker())
    try:
        importlib.import_module("anyvlm")
    except ModuleNotFoundError:
        pass
    else:
        sys.exit("anyvlm can still be imported, so this process proves nothing.")
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
