"""Run Prometheus and Alertmanager in a machine; needs a copy of tests/prometheus.py beside it.

Usage: guest_prometheus.py TARGET INSTANCE RULES... A line of stdin is a JSON list of a PromQL query
and its time or null, or null for the notifications that a webhook has received. The answer is one
line of JSON: [[labels, value], ...] or [alert, ...]. All of it ends with stdin.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prometheus import (  # type: ignore[import-not-found] # the copy beside this file
    Alertmanager,
    Prometheus,
    Webhook,
)

target, instance, *rules = sys.argv[1:]
with (
    Webhook() as webhook,
    Alertmanager(webhook.url, inhibits=False) as alertmanager,
    Prometheus(
        target,
        *map(Path, rules),
        instance=instance,
        alertmanager=alertmanager.address,
        interval=3,  # an emulated machine is slow
    ) as server,
):
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            answer = webhook.notifications() if asked is None else server.query(*asked)
        except (AssertionError, OSError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
