"""A training that is killed three times, while it computes and while it saves, goes on as if it had not been."""

import json
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "interrupted.py"


def test_killed_trainings_give_the_losses_of_the_uninterrupted_one(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--output", tmp_path / "rows.json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["kills"] == found["equal"] == 3
    assert all(row["logs_compared"] >= 1 for row in found["rows"])
