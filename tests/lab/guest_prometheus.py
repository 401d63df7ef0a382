"""Runs inside a machine, beside a copy of tests/prometheus.py: a Prometheus, and one query a line.

Usage: guest_prometheus.py TARGET RULES... A line of stdin is a PromQL query; it is answered by one
line of JSON, [[labels, value], ...]. End of input ends Prometheus.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prometheus import Prometheus  # type: ignore[import-not-found] # the copy beside this file

with Prometheus(sys.argv[1], *map(Path, sys.argv[2:])) as server:
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = server.query(json.loads(line))
        except (AssertionError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
