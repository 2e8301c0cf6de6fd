"""Which pairs of vision tower and language model work: measured, never written by hand. A developer's tool.

`python -m anyvlm.compatibility.run` (or `make matrix`) measures and writes `docs/compatibility.{md,json}`.
"""
