"""The benchmarks are scripts beside one another, not a package: they import each other from their own folder."""

import sys
from pathlib import Path


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
