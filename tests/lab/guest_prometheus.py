"""Run Prometheus in a machine and answer queries; needs a copy of tests/prometheus.py beside it.

Usage: guest_prometheus.py TARGET RULES... A line of stdin is a PromQL query (a JSON string). The
answer is one line of JSON, [[labels, value], ...]. Prometheus ends with stdin.
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
